"""The clock of a broker or node."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_DAY_S = 86_400.0


class Clock:
    """Seconds since 1970; never runs backwards within a process.

    Args:
        wall: the machine's clock, in seconds since 1970, which can be set at any time; read once.
        monotonic: seconds that are never set back.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monotonic = monotonic
        self._offset = wall() - monotonic()

    def __call__(self) -> float:
        """Return the time."""
        return self._monotonic() + self._offset

    def not_before(self, at: float) -> None:
        """Set the clock forward to a time, if it is behind: the machine's clock was set back."""
        self._offset += max(0.0, at - self())


def milliseconds_until(deadline: float | None, now: float) -> int | None:
    """Return a poller's timeout, rounded up so that it never wakes early and spins.

    It is a day at most, because a poller's timeout has 32 bits; the caller computes a new one then.
    """
    if deadline is None:
        return None
    return math.ceil(min(max(0.0, deadline - now), _DAY_S) * 1000)
