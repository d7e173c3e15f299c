"""Limit the log lines of each kind: peers can cause very many."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

_MAX_KINDS = 256
"""Most kinds that are counted one by one; further ones count as one kind."""
SUPPRESSED = "suppressed log lines"
"""The event of the line that says how many."""


class LogLimit:
    """Counts log lines of each kind, second by second.

    Args:
        lines_per_s: most lines of one kind in a second.

    Attributes:
        due: time at which lines can be reported as suppressed; infinite if none were.
    """

    def __init__(self, lines_per_s: float) -> None:
        self._most = max(1, math.floor(lines_per_s))
        self._period_s = self._most / lines_per_s
        self._counts: dict[str, int] = {}
        """Lines of each kind in the present period."""
        self._ends_at = -math.inf
        self.due = math.inf

    def admits(self, kind: str, now: float) -> bool:
        """Count a line, and return whether to write it.

        While `due` has passed, and nobody has taken the suppressed lines, a period goes on.

        Args:
            kind: what the line reports, without its details.
            now: in seconds.
        """
        if now >= self._ends_at and self.due == math.inf:
            self._counts.clear()
            self._ends_at = now + self._period_s
        if kind not in self._counts and len(self._counts) >= _MAX_KINDS:
            kind = ""
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        if count > self._most:
            self.due = self._ends_at
        return count <= self._most

    def take_suppressed(self) -> list[tuple[str, int]]:
        """Return the kinds of the suppressed lines, and their numbers; begin to count again."""
        found = [(kind, n - self._most) for kind, n in self._counts.items() if n > self._most]
        self._counts.clear()
        self._ends_at, self.due = -math.inf, math.inf
        return found


class LimitedLog:
    """A log with a limit of lines.

    Args:
        write: takes level, event and fields of a line.
        clock: in seconds.
        lines_per_s: most lines of one event in a second.
    """

    def __init__(
        self,
        write: Callable[[str, str, dict[str, Any]], None],
        clock: Callable[[], float],
        lines_per_s: float,
    ) -> None:
        self._write, self._clock = write, clock
        self._limit = LogLimit(lines_per_s)

    def __call__(self, level: str, event: str, fields: dict[str, Any]) -> None:
        """Write a line, or count it as suppressed."""
        if self._limit.admits(event, self._clock()):
            self._write(level, event, fields)

    @property
    def due(self) -> float:
        """Time at which to call `report`; infinite if no line was suppressed."""
        return self._limit.due

    def report(self) -> None:
        """Write how many lines of each event were suppressed, if any were."""
        for event, lines in self._limit.take_suppressed() if self.due < math.inf else ():
            self._write("warning", SUPPRESSED, {"of": event, "lines": lines})
