"""The time of a live broker or node."""

from __future__ import annotations

import math
import time


class Clock:
    """Seconds since 1970 that never run backwards while the process lives."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> float:
        """Return the time."""
        return time.monotonic() + self._offset


def milliseconds_until(deadline: float | None, now: float) -> int | None:
    """Return a timeout for a poller, rounded up so that waking early never makes it spin."""
    return None if deadline is None else max(0, math.ceil((deadline - now) * 1000))
