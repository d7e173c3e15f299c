"""Synchronous rounds: McMahan et al. 2017, with over-selection and a deadline.

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
    """Draw a cohort, wait for its results, commit, and repeat.

    fraction: C, the share of all clients in a round's cohort; at least one client.
    over_select: tasks sent per wanted result, at least 1. The round ends when the wanted number
        has arrived; the other results are late.
    deadline_s: seconds after which the round ends with the results that it has, unless they are
        fewer than min_results; None waits for all clients that are still connected.
    min_results: smallest number of results of a round. If too few clients are left for it,
        others are drawn in their place.
    late: use of a result that arrives after its round: ``use`` counts it in full, ``discount``
        multiplies its weight by the staleness function, ``refuse`` rejects it. It never counts
        as one of the round in which it arrives.
    staleness: staleness function for ``discount``.

    A client that was disconnected, or busy with a task of an earlier round, when the cohort was
    drawn gets its task as soon as it is free. A round without a deadline waits for clients that
    were connected but busy when it began, so that a lost client is missing in no later round.

    With over_select = 1 and no deadline, results are added up in cohort order and none is late,
    so the same configuration and seed give the same model to the bit.
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
        """Return the deadline of a round, in seconds; None if it has none."""
        return self.deadline_s

    def cohort(self, clients: int) -> int:
        """m = max(C * K, 1), or min_results if that is larger."""
        return max(round(self.fraction * clients), self.min_results, 1)

    def at_once(self, clients: int) -> int:
        """Return the number of tasks of a round."""
        return min(self._tasks(clients), clients)

    def least_clients(self) -> tuple[str, int]:
        """Return min_results: a client counts once in a round."""
        return "min_results", self.min_results

    def num_to_start(self, view: ScheduleView) -> int:
        """Draw the cohort; draw again only when no result is outstanding.

        If there were too few clients at first, those that connect later are drawn then.
        """
        if self.is_ready(view):
            return 0
        if not view.outstanding:
            missing = self.cohort(view.clients) - (view.results - view.late)
            return math.ceil(missing * self.over_select)
        return 0 if view.deadline_passed else max(0, self._tasks(view.clients) - view.started)

    def weight(self, n: int, staleness: int) -> float | None:
        """n_k; of a late result discounted, or None."""
        if staleness == 0 or self.late == "use":
            return float(n)
        return (
            n * functions.staleness(self.staleness)(staleness) if self.late == "discount" else None
        )

    def is_ready(self, view: ScheduleView) -> bool:
        """Commit when the cohort's results have arrived, none is outstanding, or time is up.

        Only results of the round's own cohort count; late ones are added to them.
        """
        own = view.results - view.late
        if own >= self.cohort(view.clients):
            return True
        if not view.started or own < self.min_results:
            return False
        # Clients that are still busy with an earlier round are drawn later.
        more = view.behind + view.idle if view.started < self._tasks(view.clients) else 0
        return view.deadline_passed or not (view.outstanding or more)

    def _tasks(self, clients: int) -> int:
        """Return the number of tasks that a round sends at first."""
        return math.ceil(self.cohort(clients) * self.over_select)

    def divisor(self, weights: float, results: int) -> float:
        """m_t, the sum of the cohort's weights: a weighted mean."""
        return weights
