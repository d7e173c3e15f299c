"""The clients that are available, as virtual time passes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedmq.nodes.population.hashing import Clients
from fedmq.nodes.population.spells import NEVER, Spells

Range = tuple[int, int]
"""Clients from the first to the second number, both included."""

_MOST_SPELLS = 10_000
"""Spells of a client during one task, after which the rest of the task is extrapolated."""


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
        """Advance to a time; return the ranges of clients that came back, and that went away.

        Args:
            now: virtual time in seconds, not before the present time.
        """
        step = math.floor(now / self._step_s + 1e-9)  # k * step / step can be just below k
        due = changed = np.flatnonzero(self._until <= step)
        before = self.available[changed]
        while len(due):  # ends: each spell takes at least a step
            on = ~self.available[due]
            self.available[due] = on
            self._number[due] += 1
            length = self._spells.length(due, self._number[due].astype(np.int64), on)
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
            The virtual time; infinite if the client does not come back. A task of very many spells
            ends as if the client were available as often in the rest as in those.
        """
        began, wanted = begin, seconds
        on, until = bool(self.available[client]), int(self._until[client])
        number, who = int(self._number[client]), np.array([client])
        for _ in range(_MOST_SPELLS):
            end = math.inf if until >= NEVER else until * self._step_s
            if end > begin:
                if on and begin + seconds <= end:
                    return begin + seconds
                if end == math.inf:
                    return math.inf
                seconds -= end - begin if on else 0.0
                begin = end
            on, number = not on, number + 1
            until += int(self._spells.length(who, np.array([number]), np.array([on]))[0])
        done = wanted - seconds
        return begin + seconds * (begin - began) / done if done > 0 else math.inf


def _ranges(clients: Clients) -> list[Range]:
    """Return the ranges of ascending numbers."""
    if not len(clients):
        return []
    cuts = np.flatnonzero(np.diff(clients) != 1)
    lows = clients[np.append(0, cuts + 1)]
    highs = clients[np.append(cuts, len(clients) - 1)]
    return list(zip(lows.tolist(), highs.tolist(), strict=True))
