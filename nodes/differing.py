"""In which keys two configurations of one run differ, for people."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

_SHOWN = 10
_LONGEST = 60


def differing_keys(here: str, there: str) -> str:
    """Return the keys that differ between two complete configurations, and both values.

    Args:
        here: TOML of this node's.
        there: of the broker's.

    Returns:
        "" if one of them cannot be read, or none differs.
    """
    try:
        ours, theirs = dict(_leaves(tomllib.loads(here))), dict(_leaves(tomllib.loads(there)))
    except (tomllib.TOMLDecodeError, RecursionError):
        return ""
    keys = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    shown = [f"{key} (here {_value(ours, key)}, there {_value(theirs, key)})" for key in keys]
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more


def _leaves(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _value(leaves: Mapping[str, Any], key: str) -> str:
    if key not in leaves:
        return "not set"
    text = repr(leaves[key])
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
