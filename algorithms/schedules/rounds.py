"""Synchronous rounds: McMahan et al. 2017, with what a real fleet needs around them.

Over-selection and a deadline are those of Bonawitz et al., "Towards Federated Learning
at Scale: System Design", MLSys 2019, section 2.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedmq.algorithms.schedules import staleness as functions
from fedmq.algorithms.schedules.base import Schedule, ScheduleView


@dataclass(frozen=True)
class Rounds(Schedule):
    """Draw a cohort, wait for its results, commit; again.

    fraction: C, the share of all clients that a round wants results from; at least one.
    over_select: tasks sent per result wanted, at least 1. The round closes when the
        wanted number is in; who comes later is late.
    deadline_s: after this many seconds the round closes with what is in hand, but for
        min_results; None waits for everyone who is still there.
    min_results: a round never closes with fewer. When too few clients are left to reach
        it, others are drawn in their place.
    late: what becomes of a result that comes after its round: ``use`` counts it like any
        other, ``discount`` multiplies its weight by the staleness function, ``refuse``
        does not use it. It never takes the place of a client of the round it comes in.
    staleness: the function for ``discount``.

    A client that was away, or busy with a task of an earlier round, when the cohort was drawn
    gets its task as soon as it is free. A round without a deadline waits for those who were
    there, but busy, when it began: a lost client that comes back is missing for no longer.

    With over_select = 1 and no deadline, results are added up in cohort order and late
    ones do not exist, so the same configuration and seed give the same model to the bit.
    """

    name: ClassVar[str] = "rounds"
    ordered: ClassVar[bool] = True
    folding: ClassVar[frozenset[str]] = frozenset({"late", "staleness"})

    fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    over_select: Annotated[float, Field(ge=1, le=10)] = 1.0
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    min_results: Annotated[int, Field(ge=1)] = 1
    late: Literal["use", "discount", "refuse"] = "discount"
    staleness: functions.StalenessSpec = "polynomial(0.5)"

    def deadline(self) -> float | None:
        """Return the deadline of a round, in seconds."""
        return self.deadline_s

    def cohort(self, clients: int) -> int:
        """m = max(C * K, 1), and never less than min_results."""
        return max(round(self.fraction * clients), self.min_results, 1)

    def at_once(self, clients: int) -> int:
        """Return how many tasks a round sends."""
        return min(self._tasks(clients), clients)

    def least_clients(self) -> tuple[str, int]:
        """A client counts once in a round."""
        return "min_results", self.min_results

    def num_to_start(self, view: ScheduleView) -> int:
        """Draw the cohort; draw again only when nobody is left to wait for.

        Where there were not enough clients at first, those who come are drawn later.
        """
        if self.is_ready(view):
            return 0
        if not view.outstanding:
            missing = self.cohort(view.clients) - (view.results - view.late)
            return math.ceil(missing * self.over_select)
        return 0 if view.deadline_passed else max(0, self._tasks(view.clients) - view.started)

    def weight(self, n: int, staleness: int) -> float | None:
        """n_k, discounted or refused if late."""
        if staleness == 0 or self.late == "use":
            return float(n)
        return (
            n * functions.staleness(self.staleness)(staleness) if self.late == "discount" else None
        )

    def is_ready(self, view: ScheduleView) -> bool:
        """Close when all that is wanted is in, or nobody is left, or time is up.

        Only results of the round's own cohort count: late ones are added to them.
        """
        own = view.results - view.late
        if own >= self.cohort(view.clients):
            return True
        if not view.started or own < self.min_results:
            return False
        # Who is still busy with an earlier round is drawn when that is over.
        more = view.behind + view.idle if view.started < self._tasks(view.clients) else 0
        return view.deadline_passed or not (view.outstanding or more)

    def _tasks(self, clients: int) -> int:
        """Return how many tasks a round sends at first."""
        return math.ceil(self.cohort(clients) * self.over_select)

    def divisor(self, weights: float, results: int) -> float:
        """m_t, the sum of the cohort's weights: a weighted mean."""
        return weights
