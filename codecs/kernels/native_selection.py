"""The compiled functions of `selection`: the k smallest of n 32-bit ranks, in two passes.

A rank is a random number (mask) or an inverted magnitude (top k); no more than a chunk of
ranks is in memory. The first pass counts ranks by their upper bits, which gives the bin of
the k-th rank; the second writes the indices below that bin and, separately, those in it.
"""
# These functions are compiled; `selection` checks the arguments and declares the types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from fedmq.codecs.kernels.jit import entry, helper
from fedmq.codecs.kernels.native import halves, random_bits

u32 = np.uint32

SHIFT = 20
BINS = 1 << (32 - SHIFT)

_CHUNK = 4096
_MAGNITUDE = u32(0x7FFFFFFF)


@helper
def _ranks(words, key, start, ranks):
    """Write the ranks of the values from ``start`` on: by magnitude; random if words is None."""
    if words is None:
        low, high = halves(key)
        for j in range(ranks.size):
            ranks[j] = random_bits(u32(start + j), low, high)
    else:
        part = words[start : start + ranks.size]
        for j in range(ranks.size):
            ranks[j] = u32(_MAGNITUDE - u32(u32(part[j]) & _MAGNITUDE))


@entry
def count(words, key, n):
    """Return how many ranks fall into each of BINS bins, int64."""
    # Four tables: adjacent ranks are often in one bin, and their updates would be serialized.
    bins = np.zeros((4, BINS), np.int64)
    chunk = np.empty(_CHUNK, np.uint32)
    for start in range(0, n, _CHUNK):
        ranks = chunk[: min(_CHUNK, n - start)]
        _ranks(words, key, start, ranks)
        for j in range(ranks.size):
            bins[j & 3, ranks[j] >> u32(SHIFT)] += 1
    return bins[0] + bins[1] + bins[2] + bins[3]


@entry
def collect(words, key, n, border, below, inside, inside_ranks):
    """Write the indices of ranks in bins before ``border`` to below, those in it to inside.

    below, inside: int64, with the sizes of `count` plus one scratch element each.
    inside_ranks: uint32 [size of inside], the ranks of those inside.
    """
    chunk = np.empty(_CHUNK, np.uint32)
    first = second = 0
    for start in range(0, n, _CHUNK):
        ranks = chunk[: min(_CHUNK, n - start)]
        _ranks(words, key, start, ranks)
        for j in range(ranks.size):
            # Always write, and advance only for a match: a branch would be mispredicted.
            bin_ = np.int64(ranks[j] >> u32(SHIFT))
            below[first] = start + j
            first += bin_ < border
            inside[second] = start + j
            inside_ranks[second] = ranks[j]
            second += bin_ == border


@entry
def gather(x, indices, out):
    """Write x[indices] to out."""
    for k in range(indices.size):
        out[k] = x[indices[k]]


@entry
def scatter_add(total, indices, values, weight):
    """Add weight * values to total[indices]."""
    for k in range(indices.size):
        i = indices[k]
        total[i] = total[i] + weight * values[k]
