"""Which values are sent at all: a random mask that both ends know, or the largest."""

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

# Magnitudes stand upside down: infinity and NaN have the smallest ranks, in these bins.
_FINITE = 8


def mask(n: int, k: int, seed: int) -> Indices:
    """Return which k of n values are kept: indices int64, ascending.

    Those whose random number (32 bits, of seed and index) is smallest; of equal ones the
    first. So every value is kept with probability k / n as far as the hash is uniform, and
    n / k times the kept values is an unbiased estimate (Konecny et al. 2016, section 4 (i)).
    A fixed number for the whole vector, not one a block: messages have one size, and there is
    no grid of blocks in which neighbours exclude one another.

    Raises:
        ValueError: n is not in 0..MAX_VALUES, or k not in 0..n.
    """
    check_count(n, k)
    return _smallest(None, state(seed, Purpose.MASK), n, k)


def top(x: Floats, k: int) -> tuple[Indices, Floats]:
    """Return the k values of largest magnitude: indices int64, ascending, and values.

    Of equal magnitudes the first are taken.

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
        ValueError: x is no float32 vector, or an index lies outside of it.
    """
    from fedmq.codecs.kernels import native_selection

    x = vector(x)
    out = np.empty(_inside(indices, x.size).size, np.float32)
    native_selection.gather(readonly(x), readonly(indices), out)
    return out


def scatter(values: Floats, indices: Indices, n: int) -> Floats:
    """Return n zeros with the values at their indices.

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
        ValueError: an index lies outside of total, there are not as many values, the weight
            is not finite, or an array is of another type.
    """
    from fedmq.codecs.kernels import native_selection

    if not vector(total).flags.writeable:
        raise ValueError("expected a total that can be added to in place")
    if not math.isfinite(weight):
        raise ValueError(f"expected a finite weight, got {weight}")
    _paired(values, _inside(indices, total.size))
    native_selection.scatter_add(total, readonly(indices), readonly(values), np.float32(weight))


def check_count(n: int, k: int) -> None:
    """Raise if k of n values cannot be chosen.

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
    # Two ascending runs: this sort merges them.
    indices.sort(kind="stable")
    return indices


def _first(inside: Indices, ranks: NDArray[np.uint32], k: int) -> Indices:
    """Return the k of smallest rank, ascending; of equal ranks the first."""
    if k == 0:
        return inside[:0]
    border = np.partition(ranks, k - 1)[k - 1]
    taken = ranks < border
    equal = np.flatnonzero(ranks == border)
    taken[equal[: k - np.count_nonzero(taken)]] = True
    chosen: Indices = inside[taken]
    return chosen


def _inside(indices: Indices, n: int) -> Indices:
    if indices.dtype != np.int64 or indices.ndim != 1 or not indices.flags.c_contiguous:
        raise ValueError(f"expected int64 indices, got {indices.dtype} {indices.shape}")
    if indices.size and not (indices.min() >= 0 and indices.max() < n):
        raise ValueError(f"expected indices in 0..{n - 1}")
    return indices


def _paired(values: Floats, indices: Indices) -> None:
    if vector(values).shape != indices.shape:
        raise ValueError(f"expected {indices.size} values for as many indices, got {values.size}")
