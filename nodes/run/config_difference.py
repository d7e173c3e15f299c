"""Keys in which two configurations of one run differ."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from fedmq.nodes.run.toml import NONE

_SHOWN = 10
"""Number of keys that the text names."""
_LONGEST = 100
"""Characters of a shown value."""
_MISSING = object()

Differences = dict[str, tuple[Any, Any]]
"""Both values by key; `shown` formats a value."""


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Differences:
    """Return the keys that differ between the tables of two configurations."""
    ours, theirs = dict(_leaves(one, "")), dict(_leaves(other, ""))
    keys = [*ours, *(key for key in theirs if key not in ours)]
    pairs = {key: (ours.get(key, _MISSING), theirs.get(key, _MISSING)) for key in keys}
    return {key: pair for key, pair in pairs.items() if not _same(*pair)}


def shown(value: Any) -> str:
    """Format one of the two values."""
    if value is _MISSING:
        return "not set"
    text = NONE if value is None else repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def differing_keys(here: str, there: str) -> str:
    """Return the keys that differ between two complete configurations, and both values.

    Args:
        here: TOML of this node's configuration.
        there: TOML of the broker's.

    Returns:
        "" if no key differs or one of them cannot be read.
    """
    try:
        found = differences(tomllib.loads(here), tomllib.loads(there))
    except (tomllib.TOMLDecodeError, RecursionError):
        return ""
    named = [f"{key} (here {shown(a)}, there {shown(b)})" for key, (a, b) in sorted(found.items())]
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return ", ".join(named[:_SHOWN]) + more


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _leaves(each, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)
