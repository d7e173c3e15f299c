"""Reading TOML: errors say which file, which line, and what stands there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from fedmq.nodes.errors import ConfigError

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")  # byte order marks, little and big endian
_MANY_DOTS = re.compile(r"(?:\.[^.\n]*){200}")
_PLACE = re.compile(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", re.DOTALL)
_TWICE = re.compile(r"Cannot declare \((.*?),?\) twice")
_OVERWRITTEN = "Cannot overwrite a value"


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file in UTF-8, with or without a byte order mark.

    Raises:
        OSError: the file cannot be read.
        ConfigError: the file is not TOML.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if data.startswith(_UTF16_MARKS):
            raise ConfigError(f"{path} is not TOML: expected UTF-8, got UTF-16") from None
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x}"
        raise ConfigError(f"{path} is not TOML: line {line} is not UTF-8 ({found})") from None
    return parse_toml(text, str(path))


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
