"""How long each client is available and away, in turn, in whole steps.

Spell k of a client is a function of (seed, client, k), so it does not depend on other clients.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedmq.algorithms.seeds import derive_rng, derive_seed
from fedmq.nodes.population.distributions import Distribution
from fedmq.nodes.population.hashing import Clients, uniforms, words

NEVER = int(np.iinfo(np.int32).max)
"""Number of a step that no run reaches."""
DAY_S = 24 * 3600.0
_DRAWS = 1 << 16
"""Lengths drawn from a distribution; each spell has one of them."""

First = tuple[NDArray[np.bool_], Clients]


class Spells(Protocol):
    """Alternating spells, on and off, of each client."""

    def first(self, clients: Clients) -> First:
        """Return whether spell 0 of each client is on, and its length in steps, from 0."""

    def length(self, clients: Clients, numbers: Clients, on: NDArray[np.bool_]) -> Clients:
        """Return the lengths in steps, 1 to `NEVER`, of the spells of these numbers.

        Args:
            clients: int64 [n].
            numbers: int64 [n], from 1.
            on: bool [n], whether the client is available in the spell.
        """


class RandomSteps:
    """Each client is available with a probability, drawn again at each step.

    The steps until a draw differs from the last one have a geometric distribution, so steps
    without a change cost nothing.

    Args:
        probability: of each client, float64 [clients]; or one for all.
        seed: of the run.
    """

    def __init__(self, probability: NDArray[np.float64] | float, seed: int) -> None:
        self._probability = np.asarray(probability, np.float64)
        self._at_start = derive_seed(seed, "available at the start")
        self._lengths = derive_seed(seed, "lengths of spells")

    def first(self, clients: Clients) -> First:
        """As in `Spells`."""
        on = uniforms(self._at_start, clients) < self._of(clients)
        return on, self.length(clients, np.zeros(len(clients), np.int64), on)

    def length(self, clients: Clients, numbers: Clients, on: NDArray[np.bool_]) -> Clients:
        """As in `Spells`."""
        probability = self._of(clients)
        stay = np.where(on, probability, 1 - probability)
        draw = np.log(uniforms(self._lengths, clients, numbers))
        with np.errstate(divide="ignore"):
            steps = np.where(stay < 1, 1 + np.floor(draw / np.log(stay)), NEVER)
        return np.minimum(steps, NEVER).astype(np.int64)

    def _of(self, clients: Clients) -> NDArray[np.float64]:
        return self._probability[clients] if self._probability.ndim else self._probability


class DrawnSpells:
    """Spells of drawn lengths, rounded to whole steps.

    A client is available at the start with probability mean(on) / (mean(on) + mean(off)); of its
    first spell, a uniform share is left.

    Args:
        on: length of a spell in which a client is available, in seconds.
        off: length of a spell in which it is away, in seconds.
        step_s: step in seconds.
        seed: of the run.
    """

    def __init__(self, on: Distribution, off: Distribution, step_s: float, seed: int) -> None:
        self._share = on.mean / (on.mean + off.mean)
        self._at_start = derive_seed(seed, "available at the start")
        self._lengths = derive_seed(seed, "lengths of spells")
        self._steps = [
            each.draw(derive_rng(seed, "spells", name), _DRAWS) / step_s
            for name, each in (("off", off), ("on", on))
        ]

    def first(self, clients: Clients) -> First:
        """As in `Spells`."""
        on = uniforms(self._at_start, clients, 0) < self._share
        left = uniforms(self._at_start, clients, 1)
        return on, _whole(left * self._drawn(clients, 0, on), 0)

    def length(self, clients: Clients, numbers: Clients, on: NDArray[np.bool_]) -> Clients:
        """As in `Spells`."""
        return _whole(self._drawn(clients, numbers, on), 1)

    def _drawn(
        self, clients: Clients, numbers: Clients | int, on: NDArray[np.bool_]
    ) -> NDArray[np.float64]:
        chosen = words(self._lengths, clients, numbers) % np.uint64(_DRAWS)
        off, there = self._steps
        return np.asarray(np.where(on, there[chosen], off[chosen]), np.float64)


class DailySpells:
    """Each client is available at the same hours of every day.

    Args:
        on_s: time a day in which a client is available, in seconds.
        start: when each client becomes available, as a share of the day, float64 [clients].
        step_s: step in seconds.
    """

    def __init__(self, on_s: float, start: NDArray[np.float64], step_s: float) -> None:
        self._day = max(2, round(DAY_S / step_s))
        self._on = min(max(1, round(on_s / step_s)), self._day - 1)
        self._start = np.floor(start * self._day).astype(np.int64)

    def first(self, clients: Clients) -> First:
        """As in `Spells`."""
        since = -self._start[clients] % self._day
        on = since < self._on
        return on, np.where(on, self._on, self._day) - since

    def length(
        self,
        clients: Clients,  # noqa: ARG002 - part of `Spells`
        numbers: Clients,  # noqa: ARG002 - part of `Spells`
        on: NDArray[np.bool_],
    ) -> Clients:
        """As in `Spells`."""
        return np.where(on, self._on, self._day - self._on)


class TracedSpells:
    """Spells of a trace; a client is away before, between and after those of its intervals.

    Args:
        owner: client of each interval, int64 [intervals], ascending.
        start, end: of each interval in seconds, ascending for each client, without overlaps.
        clients: number of clients.
        step_s: step in seconds.
    """

    def __init__(
        self,
        owner: Clients,
        start: NDArray[np.float64],
        end: NDArray[np.float64],
        clients: int,
        step_s: float,
    ) -> None:
        low, high = _whole(start / step_s, 0), _whole(end / step_s, 0)
        kept = high > low
        owner, low, high = owner[kept], low[kept], high[kept]
        # Intervals that touch after rounding are one.
        joined = np.zeros(len(owner), np.bool_)
        joined[1:] = (owner[1:] == owner[:-1]) & (low[1:] <= high[:-1])
        last = np.append(~joined[1:], True)[: len(owner)]
        owner, low, high = owner[~joined], low[~joined], high[last]
        self._begin = np.searchsorted(owner, np.arange(clients))
        self._count = np.searchsorted(owner, np.arange(clients), "right") - self._begin
        self._low, self._high = low, high

    def first(self, clients: Clients) -> First:
        """As in `Spells`."""
        on = np.zeros(len(clients), np.bool_)
        return on, self._end(clients, np.zeros(len(clients), np.int64))

    def length(
        self,
        clients: Clients,
        numbers: Clients,
        on: NDArray[np.bool_],  # noqa: ARG002 - part of `Spells`
    ) -> Clients:
        """As in `Spells`."""
        return self._end(clients, numbers) - self._end(clients, numbers - 1)

    def _end(self, clients: Clients, numbers: Clients) -> Clients:
        """Return the step at which spells end: those of even numbers before an interval."""
        which = numbers // 2
        there = which < self._count[clients]
        place = np.where(there, self._begin[clients] + which, 0)
        if not len(self._low):
            return np.full(len(clients), NEVER)
        end = np.where(numbers % 2 == 0, self._low[place], self._high[place])
        return np.where(there, end, NEVER)


def _whole(steps: NDArray[np.float64], least: int) -> Clients:
    """Return lengths rounded to whole steps, within ``least`` and `NEVER`."""
    return np.clip(np.rint(steps), least, NEVER).astype(np.int64)
