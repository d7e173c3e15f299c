"""The clock of a live broker or node."""

from __future__ import annotations

import math
import time

_DAY_S = 86_400.0


class Clock:
    """Seconds since 1970; never runs backwards within a process."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> float:
        """Return the time."""
        return time.monotonic() + self._offset


def milliseconds_until(deadline: float | None, now: float) -> int | None:
    """Return a poller's timeout, rounded up so that it never wakes early and spins.

    It is a day at most, because a poller's timeout has 32 bits; the caller computes a new one then.
    """
    if deadline is None:
        return None
    return math.ceil(min(max(0.0, deadline - now), _DAY_S) * 1000)
