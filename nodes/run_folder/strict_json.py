"""Strict JSON, in which NaN and infinities are null.

`not_finite` lists those values, so that a reader can distinguish them from missing ones.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

_MOST = 100
"""Number of listed values: after a divergence, the metrics of every version are not finite."""


def to_strict_json(value: Any) -> str:
    """Return a value as indented JSON text, with null for NaN and infinities."""
    return json.dumps(_strict(value), indent=2, allow_nan=False) + "\n"


def not_finite(value: Any) -> dict[str, str]:
    """Return the numbers that are not finite, such as ``{"metrics.loss": "NaN"}``, at most 100."""
    return dict(itertools.islice(_paths(value, ""), _MOST))


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return value


def _paths(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, float):
        if not math.isfinite(value):
            infinity = "Infinity" if value > 0 else "-Infinity"
            yield path, "NaN" if math.isnan(value) else infinity
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _paths(each, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _paths(each, f"{path}[{index}]")
