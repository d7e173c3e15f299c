"""When clients start, how much a result counts, and when a version is committed."""

from collections.abc import Mapping

from fedmq.algorithms.errors import AlgorithmError
from fedmq.algorithms.schedules.base import Schedule, ScheduleView
from fedmq.algorithms.schedules.buffered import Buffered
from fedmq.algorithms.schedules.rounds import Rounds
from fedmq.algorithms.schedules.stream import Stream
from fedmq.codecs.text import unknown

SCHEDULES: Mapping[str, type[Schedule]] = {each.name: each for each in (Rounds, Buffered, Stream)}
"""The schedules by the name that a configuration uses."""


def find_schedule(name: str) -> type[Schedule]:
    """Return the schedule of this name.

    Raises:
        AlgorithmError: there is no such schedule; the message lists the choices.
    """
    if name not in SCHEDULES:
        raise AlgorithmError(unknown("schedule", name, SCHEDULES))
    return SCHEDULES[name]


__all__ = ["SCHEDULES", "Buffered", "Rounds", "Schedule", "ScheduleView", "Stream", "find_schedule"]
