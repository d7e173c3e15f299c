"""Compiled selection: the k smallest of n 32-bit ranks, in two passes that hold no n ranks.

A rank is a random number (a mask) or a magnitude upside down (top k). The first pass counts
ranks by their upper bits and so finds the one bin that the border lies in; the second writes
all indices below that bin, and those in it aside.
"""
# The functions are compiled, not run by the interpreter; the facade has the types.
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
    # Four tables, because neighbours often fall into one bin and would wait for each other.
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
    """Write the indices of ranks in lower bins than border to below, those in it to inside.

    below, inside: int64, as long as `count` says, and one longer each, which is scratch.
    """
    chunk = np.empty(_CHUNK, np.uint32)
    first = second = 0
    for start in range(0, n, _CHUNK):
        ranks = chunk[: min(_CHUNK, n - start)]
        _ranks(words, key, start, ranks)
        for j in range(ranks.size):
            # Written in any case, kept only if it counts: a jump would be mispredicted.
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
