"""Read TOML: errors give file, line, key and value; keys with an old name get the new one."""

from __future__ import annotations

import difflib
import functools
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from fedmq.algorithms.hyperparameters import fault_of
from fedmq.broker.settings import InvalidLimit
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.process.terminal import renaming_notice

STDIN = Path("-")
"""The path that stands for standard input."""
NONE = "none"
"""The word for null, which TOML does not have, for example ``batch_size = "none"``."""
RENAMED_KEYS: Mapping[str, str] = {"broker.beat_s": "broker.heartbeat_s"}
"""New names of keys by their names in the last release, which work for one release more."""

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")  # byte order marks, little and big endian
_MANY_DOTS = re.compile(r"(?:\.[^.\n]*){200}")
_PLACE = re.compile(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", re.DOTALL)
_TWICE = re.compile(r"Cannot declare \((.*?),?\) twice")
_OVERWRITTEN = "Cannot overwrite a value"


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file, or standard input, in UTF-8, with or without a byte order mark.

    Raises:
        OSError: the file cannot be read.
        ConfigError: the file is not TOML.
    """
    is_input = path == STDIN
    data = sys.stdin.buffer.read() if is_input else path.read_bytes()
    name = "standard input" if is_input else str(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if data.startswith(_UTF16_MARKS):
            raise ConfigError(f"{name} is not TOML: expected UTF-8, got UTF-16") from None
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x}"
        raise ConfigError(f"{name} is not TOML: line {line} is not UTF-8 ({found})") from None
    return parse_toml(text, name)


def parse_toml(text: str, what: str) -> dict[str, Any]:
    """Read TOML text; errors name it ``what``.

    Raises:
        ConfigError: the text is not TOML.
    """
    if _MANY_DOTS.search(text):
        # tomllib's time and memory grow with the square of a key's length.
        raise ConfigError(f"{what} is not a configuration: a key has too many parts")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError
        raise ConfigError(f"{what} is not TOML: {_described(str(error), text)}") from None


def _described(error: str, text: str) -> str:
    """Return an error of tomllib with the line first, and the name of a duplicate key."""
    match = _PLACE.fullmatch(error)
    if match is None:
        return error
    lines = text.splitlines() or [""]
    number = int(match[2] or len(lines))
    reason = match[1]
    if reason == _OVERWRITTEN:
        key = lines[number - 1].partition("=")[0].strip()
        reason = f"duplicate key {key:.100}"
    elif table := _TWICE.fullmatch(reason):
        name = ".".join(part.strip(" '\"") for part in table[1].split(","))
        reason = f"duplicate table [{name:.100}]"
    return f"line {number}: {reason}"


def rename_keys(given: Mapping[str, Any], *, notice: bool) -> dict[str, Any]:
    """Return a configuration with every key under its new name.

    Args:
        given: tables of keys.
        notice: print a line for each old name.

    Raises:
        ConfigError: a key is there under both names.
    """
    tables = dict(given)
    for old, new in RENAMED_KEYS.items():
        table, key = old.split(".")
        values = tables.get(table)
        if not isinstance(values, dict) or key not in values:
            continue
        new_key = new.split(".")[1]
        if new_key in values:
            raise ConfigError(f"{old} is the old name of {new}: expected one of them, got both")
        tables[table] = {new_key if name == key else name: each for name, each in values.items()}
        if notice:
            _print_notice(old)
    return tables


def rename_key(key: str) -> str:
    """Return the new name of a key such as ``broker.lease_s``; print a line if it has one."""
    if key not in RENAMED_KEYS:
        return key
    _print_notice(key)
    return RENAMED_KEYS[key]


@functools.cache  # prints once in a process, which may read one configuration twice
def _print_notice(old: str) -> None:
    click.echo(renaming_notice(old, RENAMED_KEYS[old]), err=True)


def without_none_words(value: Any) -> Any:
    """Return a value of a configuration with None for each `NONE`.

    Raises:
        ConfigError: a number has more than 64 bits.
    """
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise ConfigError(f"expected numbers of at most 64 bits, got one of {value.bit_length()}")
    if isinstance(value, dict):
        return {key: without_none_words(each) for key, each in value.items()}
    return None if value == NONE else value


def with_none_words(value: Any) -> Any:
    """Return a value of a configuration with `NONE` for each None."""
    if isinstance(value, dict):
        return {key: with_none_words(each) for key, each in value.items()}
    return NONE if value is None else value


def setting_value(text: str) -> Any:
    """Read a TOML value; other text is a string."""
    try:
        return parse_toml(f"value = {text}", text)["value"]
    except ConfigError:
        return text


def describe(
    error: ValidationError,
    table: str,
    keys: Mapping[str, Sequence[str]],
    forms: Mapping[str, str] = {},
) -> str:
    """Return the first error as one sentence: key, expected value, given value.

    Args:
        error: of pydantic.
        table: table of the validated value, for example ``algorithm``.
        keys: known keys by table.
        forms: what a text that must match a pattern looks like, in words.
    """
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if not _is_type_name(str(part))]
    where = ".".join([table, *path] if table else path)
    match first["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            parent, _, name = where.rpartition(".")
            choices = keys.get(parent, ())
            close = difflib.get_close_matches(name, choices, n=1)
            close += [f"{other}.{name}" for other in keys if other and name in keys[other]]
            guess = f" (did you mean {close[0]!r}?)" if close else ""
            return f"unknown key {where!r}{guess}; choose from {', '.join(choices)}"
        case "dataclass_type":
            return f"{where}: expected a table, got {first['input']!r:.200}"
        case "missing" | "missing_argument":
            return f"{where}: expected a value, it is missing"
        case "string_pattern_mismatch":
            pattern = first["ctx"]["pattern"]
            form = forms.get(pattern, f"text that matches {pattern}")
            return f"{where}: expected {form}, got {first['input']!r:.200}"
        case _:
            error_itself = first.get("ctx", {}).get("error")
            if isinstance(error_itself, InvalidLimit):
                where = f"{where}.{error_itself.name}"
            return f"{where}: {fault_of(first)}"


def _is_type_name(part: str) -> bool:
    """Return whether a part of an error's location is pydantic's name of a union member."""
    return part in {"int", "float", "str", "none"} or part.startswith(("constrained", "literal["))
