"""Selecting values to send: a random mask known to both ends, or the largest values."""

# The compiled functions have no types; those of this module are theirs.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedmq.codecs.kernels.quantization import Floats, readonly, vector
from fedmq.codecs.kernels.seeds import Purpose, state

Indices = NDArray[np.int64]

MAX_VALUES = (1 << 31) - 1

# Ranks are inverted magnitudes: infinity and NaN have the smallest ranks, in these bins.
_FINITE = 8


def mask(n: int, k: int, seed: int) -> Indices:
    """Return a random subset of k of n indices, int64, ascending.

    These are the k indices with the smallest random numbers (32 bits, from seed and index);
    ties go to the first. Each value is chosen with probability k / n if the hash is uniform,
    so n / k times the chosen values is an unbiased estimate (Konecny et al. 2016, section 4
    (i)). The number is fixed for the whole vector, not per block: messages have one size, and
    no block structure correlates adjacent values.

    Raises:
        ValueError: n is not in 0..MAX_VALUES, or k not in 0..n.
    """
    check_count(n, k)
    return _smallest(None, state(seed, Purpose.MASK), n, k)


def top(x: Floats, k: int) -> tuple[Indices, Floats]:
    """Return the k values of largest magnitude: indices int64, ascending, and values float32.

    Ties go to the first.

    Raises:
        ValueError: k is not in 0..n, n is above MAX_VALUES, or a value is NaN or infinite.
    """
    x = vector(x)
    check_count(x.size, k)
    indices = _smallest(readonly(x.view(np.int32)), np.uint64(0), x.size, k)
    return indices, gather(x, indices)


def gather(x: Floats, indices: Indices) -> Floats:
    """Return x[indices].

    Raises:
        ValueError: x is not a float32 vector, or an index is outside of it.
    """
    from fedmq.codecs.kernels import native_selection

    x = vector(x)
    out = np.empty(_inside(indices, x.size).size, np.float32)
    native_selection.gather(readonly(x), readonly(indices), out)
    return out


def scatter(values: Floats, indices: Indices, n: int) -> Floats:
    """Return a vector of n zeros with the values at their indices, float32.

    Raises:
        ValueError: as `scatter_add`, or n is not in 0..MAX_VALUES.
    """
    check_count(n, n)
    _paired(values, _inside(indices, n))
    out = np.zeros(n, np.float32)
    out[indices] = values
    return out


def scatter_add(total: Floats, indices: Indices, values: Floats, weight: float) -> None:
    """Add ``weight`` times the values to total at their indices.

    Raises:
        ValueError: an index is outside of total, the numbers of values and indices differ,
            the weight is not finite, or an array has a wrong type.
    """
    from fedmq.codecs.kernels import native_selection

    if not vector(total).flags.writeable:
        raise ValueError("expected a writable total")
    if not math.isfinite(weight):
        raise ValueError(f"expected a finite weight, got {weight}")
    _paired(values, _inside(indices, total.size))
    native_selection.scatter_add(total, readonly(indices), readonly(values), np.float32(weight))


def check_count(n: int, k: int) -> None:
    """Check that k of n values can be chosen.

    Raises:
        ValueError: n is not in 0..MAX_VALUES, or k not in 0..n.
    """
    if type(n) is not int or not 0 <= n <= MAX_VALUES:
        raise ValueError(f"expected 0 to {MAX_VALUES} values, got {n!r}")
    if type(k) is not int or not 0 <= k <= n:
        raise ValueError(f"expected to choose 0 to {n} values, got {k!r}")


def _smallest(words: NDArray[np.int32] | None, key: np.uint64, n: int, k: int) -> Indices:
    from fedmq.codecs.kernels import native_selection

    counts = native_selection.count(words, key, n)
    if words is not None and counts[:_FINITE].any():
        raise ValueError("expected finite values, got an infinity or NaN")
    before = np.concatenate([[0], np.cumsum(counts)])
    border = int(np.searchsorted(before, k, side="right")) - 1
    if border >= counts.size:
        return np.arange(n)
    below = np.empty(int(before[border]) + 1, np.int64)
    inside = np.empty(int(counts[border]) + 1, np.int64)
    ranks = np.empty(inside.size, np.uint32)
    native_selection.collect(words, key, n, border, below, inside, ranks)
    missing = k - (below.size - 1)
    indices = np.concatenate([below[:-1], _first(inside[:-1], ranks[:-1], missing)])
    # This sort merges the two ascending runs.
    indices.sort(kind="stable")
    return indices


def _first(inside: Indices, ranks: NDArray[np.uint32], k: int) -> Indices:
    """Return the k indices of smallest rank, ascending; ties go to the first."""
    if k == 0:
        return inside[:0]
    border = np.partition(ranks, k - 1)[k - 1]
    is_chosen = ranks < border
    equal = np.flatnonzero(ranks == border)
    is_chosen[equal[: k - np.count_nonzero(is_chosen)]] = True
    chosen: Indices = inside[is_chosen]
    return chosen


def _inside(indices: Indices, n: int) -> Indices:
    if indices.dtype != np.int64 or indices.ndim != 1 or not indices.flags.c_contiguous:
        raise ValueError(f"expected int64 indices, got {indices.dtype} {indices.shape}")
    if indices.size and not (indices.min() >= 0 and indices.max() < n):
        raise ValueError(f"expected indices in 0..{n - 1}")
    return indices


def _paired(values: Floats, indices: Indices) -> None:
    if vector(values).shape != indices.shape:
        raise ValueError(f"expected {indices.size} values, one per index, got {values.size}")
