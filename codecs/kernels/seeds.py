"""Random numbers as hashes of a counter and a key, the same on every machine.

state  = mix(seed + purpose * GOLDEN)                64 bits, per call
key    = mix(state + (index + 1) * GOLDEN)           64 bits, per block: splitmix64's outputs
random = hash(j, key)                                32 bits, per value j of the block

`mix` is the finalizer of splitmix64 (Steele et al. 2014); `hash` is the two-round multiply and
shift of "lowbias32" (triple32 family, Wellons 2018), with the lower half of the key XORed in
before and the upper half in the middle, so that blocks share no sequence. A change here
changes how old messages decode.
"""

from __future__ import annotations

import enum

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
MIX_A = 0xBF58476D1CE4E5B9
MIX_B = 0x94D049BB133111EB
HASH_A = 0x21F0AAAD
HASH_B = 0x735A2D97

_WORD = (1 << 64) - 1


class Purpose(enum.IntEnum):
    """The use of a seed: one seed gives independent numbers for each purpose."""

    ROUNDING = 1
    SIGNS = 2
    MASK = 3


def state(seed: int, purpose: Purpose) -> np.uint64:
    """Return the 64-bit state from which a call derives its keys."""
    return np.uint64(mix((seed + purpose * GOLDEN) & _WORD))


def mix(z: int) -> int:
    """Return splitmix64's finalizer of a 64-bit integer."""
    z = ((z ^ (z >> 30)) * MIX_A) & _WORD
    z = ((z ^ (z >> 27)) * MIX_B) & _WORD
    return z ^ (z >> 31)
