"""Rounds as version 0.1.0 counted them, for replays of its runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedmq.algorithms.schedules.base import ScheduleView
from fedmq.algorithms.schedules.rounds import Rounds


@dataclass(frozen=True)
class RecordedRounds(Rounds):
    """Rounds in which a late result counts as one of the round in which it arrives.

    After one lost client, every later round ended one result early and so made that result late.
    Only replays of runs of version 0.1.0 use this schedule.
    """

    def num_to_start(self, view: ScheduleView) -> int:
        """Draw the cohort; draw again only when no result is outstanding."""
        if view.outstanding or self.is_ready(view):
            return 0
        missing = self.cohort(view.clients) - view.results
        return math.ceil(missing * self.over_select)

    def is_ready(self, view: ScheduleView) -> bool:
        """Commit when enough results of any round have arrived, or none is outstanding."""
        if view.results >= self.cohort(view.clients):
            return True
        enough = view.results >= self.min_results
        return enough and view.started > 0 and (view.deadline_passed or not view.outstanding)
