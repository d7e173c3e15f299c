"""Which clients are available at what virtual time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Clients = NDArray[np.int64]
Range = tuple[int, int]
"""Clients from the first to the second number, both included."""

NEVER = np.iinfo(np.int32).max
"""Number of a step that no run reaches."""
_MOST_SPELLS = 100_000
"""Spells of one client after which a task counts as never done."""


class Spells(Protocol):
    """Alternating spells, on and off, of each client: a function of client and number alone."""

    def first(self, clients: Clients) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Return whether spell 0 of each client is on, and its length in steps, from 0."""

    def length(self, clients: Clients, numbers: Clients, *, on: NDArray[np.bool_]) -> Clients:
        """Return the length in steps, at least 1, of the spells of these numbers."""


class Availability:
    """The clients that are available, as virtual time passes.

    Availability changes at multiples of a step only. Memory: 9 bytes a client; time: one
    comparison a client at a step with changes, and some work for each change.

    Args:
        spells: of each client.
        clients: number of clients.
        step_s: step in seconds.

    Attributes:
        available: bool [clients], at the present time, which starts at 0.
        next_change: virtual time in seconds of the next change; infinite if there is none.
    """

    def __init__(self, spells: Spells, clients: int, step_s: float) -> None:
        self._spells, self._step_s = spells, step_s
        on, until = spells.first(np.arange(clients))
        self.available: NDArray[np.bool_] = on
        self._until = np.minimum(until, NEVER).astype(np.int32)
        self._number = np.zeros(clients, np.int32)
        self.next_change = 0.0
        self.advance(0.0)

    def advance(self, now: float) -> tuple[list[Range], list[Range]]:
        """Advance to a time; return the ranges of clients that came back, and that went away."""
        step = math.floor(now / self._step_s + 1e-9)
        due = changed = np.flatnonzero(self._until <= step)
        before = self.available[changed]
        while len(due):
            on = ~self.available[due]
            self.available[due] = on
            self._number[due] += 1
            length = self._spells.length(due, self._number[due].astype(np.int64), on=on)
            until = np.minimum(self._until[due] + length, NEVER).astype(np.int32)
            self._until[due] = until
            due = due[until <= step]
        after = self.available[changed]
        first = int(self._until.min(initial=NEVER))
        self.next_change = math.inf if first == NEVER else first * self._step_s
        return _ranges(changed[after & ~before]), _ranges(changed[before & ~after])

    def work_until(self, client: int, begin: float, seconds: float) -> float:
        """Return when a client has worked this long, if it pauses while it is away.

        Args:
            client: its number.
            begin: virtual time at which it begins, not before the present time.
            seconds: of work.

        Returns:
            The virtual time; infinite if the client does not come back often enough.
        """
        on, until = bool(self.available[client]), int(self._until[client])
        number, who = int(self._number[client]), np.array([client])
        for _ in range(_MOST_SPELLS):
            end = math.inf if until >= NEVER else until * self._step_s
            if end > begin:
                if on and begin + seconds <= end:
                    return begin + seconds
                if end == math.inf:
                    break
                if on:
                    seconds -= end - begin
                begin = end
            on, number = not on, number + 1
            until += int(self._spells.length(who, np.array([number]), on=np.array([on]))[0])
        return math.inf


def _ranges(clients: Sequence[int] | Clients) -> list[Range]:
    """Return the ranges of ascending numbers."""
    numbers = np.asarray(clients, np.int64)
    if not len(numbers):
        return []
    cut = np.flatnonzero(np.diff(numbers) != 1)
    lows = numbers[np.concatenate(([0], cut + 1))]
    highs = numbers[np.concatenate((cut, [len(numbers) - 1]))]
    pairs: Iterable[Range] = zip(lows.tolist(), highs.tolist(), strict=True)
    return list(pairs)
