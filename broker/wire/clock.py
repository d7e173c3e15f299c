"""The time of a live broker or node."""

from __future__ import annotations

import math
import time

_DAY_S = 86_400.0


class Clock:
    """Seconds since 1970 that never run backwards while the process lives."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> float:
        """Return the time."""
        return time.monotonic() + self._offset


def milliseconds_until(deadline: float | None, now: float) -> int | None:
    """Return a timeout for a poller, rounded up so that waking early never makes it spin.

    It is a day at most: a poller's number has 32 bits, and one that wakes too early asks again.
    """
    if deadline is None:
        return None
    return math.ceil(min(max(0.0, deadline - now), _DAY_S) * 1000)
