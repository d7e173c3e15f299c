"""The cells of a sweep: one configuration for each combination of values."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmq.nodes.api.given import Given
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.run.toml import NONE, setting_value

SEED = "run.seed"
_ID = "run.id"
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")
_EXACT = 2.0**53
"""Below it, each whole number is exact as a float."""
_LONGEST_NAME = 150
"""Characters of a cell's name, at most: a file name has 255 bytes at most."""


@dataclass(frozen=True)
class GridCell:
    """One combination of values.

    name: of its folder, such as ``lr=0.1,seed=0``.
    settings: the values by key.
    given: the configuration of its run.
    """

    name: str
    settings: Mapping[str, Any]
    given: Given


def grid(base: Given, over: Mapping[str, Iterable[Any]]) -> list[GridCell]:
    """Return the cells; the values of the first key change last.

    Args:
        base: the configuration; its run's id is not used.
        over: values by key, such as ``{"algorithm.lr": [0.1, 0.01]}``. A key without a dot is a
            whole table.

    Raises:
        ConfigError: a value is invalid; two cells have the same configuration; a key cannot be
            swept, or has no effect because a later one replaces its table; or there is no key or
            value.
    """
    _check_keys(list(over))
    values = {key: _values(key, each) for key, each in over.items()}
    if not values:
        raise ConfigError("expected at least one key with its values, such as algorithm.lr=0.1,0.2")
    short = short_names(values)
    cells: list[GridCell] = []
    names: dict[str, str] = {}
    for chosen in itertools.product(*values.values()):
        settings = dict(zip(values, chosen, strict=True))
        given = Given.of(base.tables, {**settings, _ID: ""})
        name = _name(settings, short)
        # Two values may be one to fedmq: a default, for example, and the same value in full.
        content = json.dumps(_whole(given.checked.model_dump()), default=str, sort_keys=True)
        other = names.setdefault(content, name)
        if other != name:
            raise ConfigError(f"{other} and {name} have the same configuration; leave out one")
        cells.append(GridCell(name, settings, given))
    return cells


def parse_over(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Read values such as ``algorithm.lr=0.1,0.01``: TOML values or plain text.

    Commas within brackets, parentheses and quotes belong to the value:
    ``codec.up=raw,quantize(4, 256)`` has two values.

    Raises:
        ConfigError: a text has another form, or a key comes twice.
    """
    found: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, rest = text.partition("=")
        key = key.strip()
        if not equals or "." not in key:
            raise ConfigError(
                f"--over {text}: expected table.key=value,value, such as algorithm.lr=0.1,0.01"
            )
        if key in found:
            raise ConfigError(
                f"--over {text}: {key} comes twice; give all its values in one --over"
            )
        parts = [part.strip() for part in _split(rest, text)]
        if not all(parts):
            raise ConfigError(f"--over {text}: expected a value before and after each comma")
        found[key] = [setting_value(part) for part in parts]
    return found


def value_text(value: Any) -> str:
    """Return a value as a person writes it."""
    match value:
        case None:
            return NONE
        case str():
            return value
        case {"name": str(name), **others}:
            return name + (f" {value_text(others)}" if others else "")
        case Mapping():
            return ", ".join(f"{key}={value_text(each)}" for key, each in value.items())
        case _:
            return json.dumps(_whole(value), default=str)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the shortest end of each key that no other key has: ``lr`` of ``algorithm.lr``."""
    keys = list(keys)
    short = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
        others = [f".{other}" for other in keys if other != key]
        short[key] = next(
            (end for end in ends if not any(other.endswith(f".{end}") for other in others)), key
        )
    return short


def _whole(value: Any) -> Any:
    """Return a value with whole numbers as int: 1.0 and 1 are one value, and so one cell."""
    match value:
        case float() if value.is_integer() and abs(value) < _EXACT:
            return int(value)
        case Mapping():
            return {key: _whole(each) for key, each in value.items()}
        case list() | tuple():
            return [_whole(each) for each in value]
    return value


def _check_keys(keys: Sequence[str]) -> None:
    """Raise ConfigError if a key cannot be swept, or a later one replaces its values."""
    if _ID in keys or "run" in keys:
        wrong = _ID if _ID in keys else "run"
        raise ConfigError(
            f"{wrong}: cannot be swept, each run of a sweep gets an id of its own; sweep single "
            f"keys of the table, such as {SEED}"
        )
    for number, key in enumerate(keys):
        for later in keys[number + 1 :]:
            if key.startswith(f"{later}."):
                raise ConfigError(
                    f"{key}: the tables of {later} replace its values; put {later} before it"
                )


def _values(key: str, values: Iterable[Any]) -> list[Any]:
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise ConfigError(f"{key}: expected a list of values, got {values!r:.200}")
    found = list(values)
    if not found:
        raise ConfigError(f"{key}: expected at least one value, got none")
    for number, value in enumerate(found):
        if any(value_text(value) == value_text(other) for other in found[:number]):
            raise ConfigError(f"{key}: the value {value_text(value)} comes twice")
    return found


def _name(settings: Mapping[str, Any], short: Mapping[str, str]) -> str:
    """Return a name that no other cell has, in characters that need no quotes in a shell."""
    texts = {short[key]: value_text(value) for key, value in settings.items()}
    safe = {
        key: _UNSAFE.sub("-", text).strip("-") if _UNSAFE.search(text) else text
        for key, text in texts.items()
    }
    name = ",".join(f"{key}={text}" for key, text in safe.items())
    if safe == texts and len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:6]
    return f"{name[:_LONGEST_NAME]}-{digest}"


def _split(text: str, whole: str) -> Iterator[str]:
    """Yield the parts between commas that are in no brackets and no quotes."""
    begin, quote = 0, ""
    open_: list[str] = []
    for index, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in _CLOSING:
            open_.append(_CLOSING[character])
        elif character in _CLOSING.values():
            if not open_ or open_.pop() != character:
                raise ConfigError(f"--over {whole}: {character} closes nothing")
        elif character == "," and not open_:
            yield text[begin:index]
            begin = index + 1
    if quote or open_:
        raise ConfigError(f"--over {whole}: expected a closing {quote or open_[-1]}")
    yield text[begin:]
