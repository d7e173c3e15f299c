"""Rounds as version 0.1.0 counted them, for replays of the runs that it recorded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedmq.algorithms.schedules.base import ScheduleView
from fedmq.algorithms.schedules.rounds import Rounds


@dataclass(frozen=True)
class RecordedRounds(Rounds):
    """Rounds in which a late result took the place of a client of the round it came in.

    After one lost client every later round closed without one of its own, and so made its own
    result late. A recorded run replays as it was; no new run is made like this.
    """

    def num_to_start(self, view: ScheduleView) -> int:
        """Draw the cohort; draw again only when nobody is left to wait for."""
        if view.outstanding or self.is_ready(view):
            return 0
        missing = self.cohort(view.clients) - view.results
        return math.ceil(missing * self.over_select)

    def is_ready(self, view: ScheduleView) -> bool:
        """Close when as many results are in as are wanted, whichever, or nobody is left."""
        if view.results >= self.cohort(view.clients):
            return True
        enough = view.results >= self.min_results
        return enough and view.started > 0 and (view.deadline_passed or not view.outstanding)
