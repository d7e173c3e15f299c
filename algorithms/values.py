"""Convert values that a user's code returns to Python's numbers, or refuse them.

A metric may be a numpy scalar or a tensor on a GPU, a number of clients ``ids.max() + 1``. A value
that is no number is refused before it reaches a message; the error names the method.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fedmq.algorithms.errors import AlgorithmError
from fedmq.codecs.text import shorten

MAX_METRICS_BYTES = 32 * 1024
"""Limit of all metrics of one evaluation with their names: they must fit into a message."""
_MAX_NAME = 200
_NUMBER_BYTES = 16


class ReturnedError(AlgorithmError):
    """A method of a problem or algorithm returned an unusable value; the message names it."""


def plain_number(value: object) -> int | float | None:
    """Return a value as Python's int or float; None if it is no number.

    Numbers are those of Python and numpy, tensors and arrays of one element on any device and
    of any real dtype, and objects that convert to int or float (fractions, decimals).
    """
    if type(value) in (int, float):
        return value  # type: ignore[return-value] # checked
    if value is None or isinstance(value, str | bytes | bytearray | complex):
        return None
    try:
        if isinstance(value, Tensor):
            return plain_number(value.detach().item()) if value.numel() == 1 else None
        if isinstance(value, np.ndarray):
            return plain_number(value.item()) if value.size == 1 else None
        if isinstance(value, np.bool_):
            return int(value)
        if isinstance(value, np.generic) and not isinstance(value, np.integer | np.floating):
            return None
        if hasattr(value, "__index__"):
            return int(operator.index(value))
        return float(value) if hasattr(value, "__float__") else None
    except (TypeError, ValueError, OverflowError, RuntimeError, NotImplementedError):
        return None  # without values (torch's "meta"), or larger than a float


def is_utf8(text: str) -> bool:
    """Return whether a text can be encoded; half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def kind_of_value(value: object) -> str:
    """Return a value's type and shape in a few words, never its elements (private data)."""
    if value is None or isinstance(value, bool | int | float):
        return shorten(value)
    kind = type(value).__name__
    shape = getattr(value, "shape", None)
    if isinstance(value, Tensor | np.ndarray) and shape is not None:
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {kind} of {dtype} {list(shape)}"
    return f"a value of type {kind!r}"


def metrics_of(found: object, who: str) -> dict[str, float]:
    """Return metrics as floats by name.

    Args:
        found: value that a method returned.
        who: method, such as ``Regression.metrics``, for the error.

    Raises:
        ReturnedError: the value is no map of names to numbers, or too large for a message.
    """
    if not isinstance(found, Mapping):
        raise ReturnedError(
            f"{who}: expected a map from names to numbers, got {kind_of_value(found)}"
        )
    metrics: dict[str, float] = {}
    for name, value in found.items():
        if not isinstance(name, str):
            raise ReturnedError(
                f"{who}: expected the name of a metric as text, got {shorten(name)}"
            )
        if not is_utf8(name):
            raise ReturnedError(f"{who}: expected the name of a metric in UTF-8, got {name!a:.100}")
        if not 1 <= len(name) <= _MAX_NAME:
            raise ReturnedError(
                f"{who}: expected 1 to {_MAX_NAME} characters in the name of a metric, "
                f"got {len(name)}"
            )
        metrics[str(name)] = _as_float(plain_number(value), name, value, who)
    size = sum(len(name.encode()) + _NUMBER_BYTES for name in metrics)
    if size > MAX_METRICS_BYTES:
        raise ReturnedError(
            f"{who}: expected at most {MAX_METRICS_BYTES} bytes of metrics with their names, "
            f"got {len(metrics)} metrics of {size} bytes"
        )
    return metrics


def plain_settings(value: Any) -> Any:
    """Return settings with numpy's numbers and tensors converted to Python's numbers."""
    if isinstance(value, Mapping):
        return {key: plain_settings(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        each_plain = (plain_settings(each) for each in value)
        return list(each_plain) if isinstance(value, list) else tuple(each_plain)
    if value is None or isinstance(value, str | bool):
        return value
    number = plain_number(value)
    return value if number is None else number


def _as_float(number: float | None, name: object, value: object, who: str) -> float:
    try:
        if number is not None:
            return float(number)
    except OverflowError:
        pass
    raise ReturnedError(f"{who}: expected a number for {name!r}, got {kind_of_value(value)}")
