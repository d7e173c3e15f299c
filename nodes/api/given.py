"""The configuration that a caller gives: a dict, a file, or a `Config`."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedmq.nodes.errors import ConfigError
from fedmq.nodes.run.config import Config, apply_setting, build, read_tables
from fedmq.nodes.run.toml import with_none_words
from fedmq.nodes.run_folder.folder import is_record

GivenConfig = Mapping[str, Any] | str | os.PathLike[str] | Config | None
"""Tables as in TOML (keys such as ``"algorithm.lr"`` work, too), the path of a TOML file, a
`Config`, or None for the defaults."""


@dataclass(frozen=True)
class Given:
    """A configuration that is valid as far as it can be checked without torch.

    tables: as the caller gave them; a missing key has its default.
    checked: the same, complete but for the defaults of problem, algorithm and schedule.
    """

    tables: dict[str, Any]
    checked: Config

    @classmethod
    def of(cls, config: GivenConfig, settings: Mapping[str, Any] | None = None) -> Given:
        """Read a configuration.

        Args:
            config: see `GivenConfig`.
            settings: replaces keys, such as ``{"algorithm.lr": 0.1}``, or whole tables.

        Raises:
            ConfigError: a key or value is wrong, or the file cannot be read.
        """
        tables = _tables(config)
        for key, value in (settings or {}).items():
            _set(tables, key, _plain(value, key))
        return cls(tables, build(tables))

    @classmethod
    def of_command(cls, file: Path | None, settings: Sequence[str]) -> Given:
        """Read the configuration of a command: a file and its ``key=value`` settings.

        Raises:
            ConfigError: a key or value is wrong, or the file cannot be read.
        """
        tables = _tables(file)
        for setting in settings:
            apply_setting(tables, setting)
        return cls(tables, build(tables))

    def to_toml(self) -> str:
        """Return the tables as TOML."""
        return tomli_w.dumps(with_none_words(self.tables))


def _tables(config: GivenConfig) -> dict[str, Any]:
    match config:
        case None:
            return {}
        case Config():
            _check_allowed(config)
            return config.model_dump()
        case Mapping():
            return _nested(config)
        case str() | os.PathLike():
            file = usable_path(config, "a configuration file")
            recorded = is_record(file)
            tables = read_tables(file, recorded=recorded)
            if recorded and isinstance(tables.get("run"), dict):
                tables["run"].pop("id", None)  # the id is in use
            return tables
    raise ConfigError(
        f"expected a configuration as a dict, the path of a TOML file or a Config, got {config!r}"
    )


def usable_path(given: str | os.PathLike[str], what: str) -> Path:
    """Return a path that a caller gave.

    Args:
        given: the path.
        what: what it should be, for the message.

    Raises:
        ConfigError: the operating system has no such path.
    """
    try:
        encoded = os.fsencode(given)
    except (TypeError, ValueError):
        encoded = b""
    if not encoded or b"\0" in encoded:
        raise ConfigError(f"expected the path of {what}, got {given!r:.200}")
    return Path(os.fsdecode(encoded))


def _check_allowed(config: Config) -> None:
    """Raise ConfigError if a configuration names code that it must not import.

    `fedmq.nodes.parse` reads configurations of unknown authors: starting a run with one would
    import what the author chose.
    """
    named = [str(table.get("name")) for table in (config.problem, config.algorithm)]
    wrong = [name for name in named if ":" in name and name not in config.allowed.names]
    if wrong:
        raise ConfigError(
            f"this Config may not import {' and '.join(wrong)}, because its author is unknown: "
            "if you trust the code, pass the same keys as a dict"
        )


def _nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return tables within tables; a key with dots replaces the same key in its table."""
    plain = {key: _plain(value, str(key)) for key, value in config.items()}
    tables = {key: value for key, value in plain.items() if "." not in str(key)}
    for key, value in plain.items():
        if "." in str(key):
            _set(tables, key, value)
    return tables


def _set(tables: dict[str, Any], key: str, value: Any) -> None:
    """Set a key such as ``algorithm.lr``, or a whole table."""
    *path, name = key.split(".")
    table = tables
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{key}: expected a table in {part}, got {table!r}")
    if not name or not all(path):
        raise ConfigError(f"expected a key such as algorithm.lr, got {key!r}")
    table[name] = value


def _plain(value: Any, key: str) -> Any:
    """Return a value as TOML has it.

    Raises:
        ConfigError: TOML has no such value.
    """
    if isinstance(value, Mapping):
        return {name: _plain(each, f"{key}.{name}") for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, key) for each in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    number = getattr(value, "item", None)  # of numpy and torch
    if callable(number) and getattr(value, "ndim", None) == 0:
        value = number()
    if value is None or isinstance(value, bool | int | float | str | dt.date | dt.time):
        return value
    raise ConfigError(f"{key}: expected a number, a text, a list or a table, got {value!r:.200}")
