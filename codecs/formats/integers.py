"""Integers in few bytes: the sample ids, labels and counts of features and logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedmq.codecs.errors import DecodeError
from fedmq.codecs.text import shorten

Integers = NDArray[np.int64]

MAX_COUNT = 1 << 31
"""Limit on the number of integers: the sum of this many 4-byte numbers fits int64."""

_WIDTHS = (0, 1, 2, 4)
_LEAST, _MOST = -(1 << 63), (1 << 63) - 1
_STORED = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<i8"}


def pack_integers(values: Tensor) -> tuple[dict[str, Any], bytes]:
    """Pack integers in the fewest bytes each; equal or consecutive integers take none.

    Value i is ``base + stored[i]``; if ``rising``, it is the previous value plus
    ``1 + stored[i]``. ``stored`` are unsigned numbers of ``width`` bytes; width 8 is int64.

    Args:
        values: int64 [n].

    Returns:
        The map for `unpack_integers` (``width``, ``base``, ``rising``), and the bytes.
    """
    array: Integers = values.detach().cpu().numpy()
    if not array.size:
        return {"width": 0, "base": 0, "rising": False}, b""
    base, most = int(array.min()), int(array.max())
    span = most - base
    best, stored, rising = _width(span), None, False
    if span <= _MOST:  # larger differences do not fit int64
        stored = array - base
        if best and bool((array[1:] > array[:-1]).all()):
            gaps = np.zeros_like(array)
            gaps[1:] = array[1:] - array[:-1] - 1
            if _width(int(gaps.max())) < best:
                best, stored, rising = _width(int(gaps.max())), gaps, True
    if best == 8 or stored is None:
        return {"width": 8, "base": 0, "rising": False}, array.astype("<i8").tobytes()
    data = stored.astype(_STORED[best]).tobytes() if best else b""
    return {"width": best, "base": base, "rising": rising}, data


def packed_size(meta: object, count: int, what: str) -> int:
    """Return the size of ``count`` packed integers in bytes; check their ``meta``.

    Args:
        meta: the received map.
        count: number of integers.
        what: the name of the integers in errors.

    Raises:
        DecodeError: ``meta`` is not a map of `pack_integers`.
    """
    if not isinstance(meta, dict):
        raise DecodeError(f"expected meta.{what} with width, base and rising, got {shorten(meta)}")
    width, base, rising = meta.get("width"), meta.get("base"), meta.get("rising")
    if type(width) is not int or width not in (*_WIDTHS, 8):
        raise DecodeError(f"expected meta.{what}.width as 0, 1, 2, 4 or 8, got {shorten(width)}")
    if type(base) is not int or not _LEAST <= base <= _MOST or (width == 8 and base):
        raise DecodeError(
            f"expected meta.{what}.base as an int64, 0 at width 8, got {shorten(base)}"
        )
    if type(rising) is not bool or (width == 8 and rising):
        raise DecodeError(
            f"expected meta.{what}.rising as a boolean, false at width 8, got {shorten(rising)}"
        )
    return width * count


def unpack_integers(meta: dict[str, Any], data: memoryview, count: int, what: str) -> Integers:
    """Unpack ``count`` integers; `packed_size` must have checked ``meta`` and the size of ``data``.

    Returns:
        int64 [count]; unpacking needs at most twice that memory.

    Raises:
        DecodeError: a value does not fit int64.
    """
    width, base, rising = meta["width"], meta["base"], meta["rising"]
    if width == 0:
        values: Integers = np.zeros(count, np.int64)
    else:
        values = np.frombuffer(data, _STORED[width]).astype(np.int64)
    if not count or width == 8:
        return values
    if rising:
        values[0] -= 1  # the first value is base + stored[0], without 1
        values += 1
        np.cumsum(values, out=values)
    # Only the maximum can overflow int64: the minimum is at least the base.
    if base + int(values.max()) > _MOST:
        raise DecodeError(f"{what} do not fit int64")
    values += base
    return values


def repeated(values: Integers) -> int | None:
    """Return a value that occurs more than once; None if all are different."""
    if bool((values[1:] > values[:-1]).all()):
        return None
    inorder = np.sort(values)
    twice = np.flatnonzero(inorder[1:] == inorder[:-1])
    return int(inorder[twice[0]]) if twice.size else None


def _width(most: int) -> int:
    return next((width for width in _WIDTHS if most < 1 << (8 * width)), 8)
