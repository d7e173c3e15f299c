"""Random numbers of single clients: splitmix64's function of a key, a client and a counter.

A generator would have to be made for each client; these numbers are computed for any array of
clients at once, in any order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmq.codecs.kernels.seeds import GOLDEN, MIX_A, MIX_B

Clients = NDArray[np.int64]

_GOLDEN, _A, _B = np.uint64(GOLDEN), np.uint64(MIX_A), np.uint64(MIX_B)


def words(key: int, clients: Clients, numbers: Clients | int = 0) -> NDArray[np.uint64]:
    """Return 64 random bits for each client.

    Args:
        key: of one purpose, from `derive_seed`.
        clients: int64 [n].
        numbers: int64 [n], from 0; or one for all, for several words of a client.
    """
    z = _mix(np.uint64(key) + (clients.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return _mix(z + (np.atleast_1d(numbers).astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def uniforms(key: int, clients: Clients, numbers: Clients | int = 0) -> NDArray[np.float64]:
    """Return a random number above 0 and below 1 for each client; arguments as in `words`."""
    bits = words(key, clients, numbers) >> np.uint64(12)  # 52 bits: the sum below stays exact
    return np.asarray((bits.astype(np.float64) + 0.5) * 2.0**-52)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * _A
    z = (z ^ (z >> np.uint64(27))) * _B
    return np.asarray(z ^ (z >> np.uint64(31)))
