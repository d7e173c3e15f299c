"""Progress of a simulated run: as that of a live one, but in virtual time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedmq.nodes.cluster.view import LiveView, figures, in_one_line, sparkline, warnings
from fedmq.nodes.history.run import RunHistory
from fedmq.nodes.process.terminal import duration

_RATE_OVER_S = 5.0
"""Real seconds over which the rate of results is measured."""
_PER_ROW = 6


class SimulationView(LiveView):
    """Shows the progress of a simulated run; a context manager.

    Its cost does not depend on the number of clients, nor of tasks in progress.

    Args:
        console, title, report: see `LiveView`.
        clock: real time in seconds, for the rate of results.
    """

    evaluation_every_s = 5.0

    def __init__(
        self,
        console: Console,
        title: str,
        report: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(console, title, report)
        self._clock, self._began = clock, clock()
        self._counts = deque([(self._began, 0)])
        """Real times, and the number of results until then."""

    def render(self, history: RunHistory, *, waits: bool) -> RenderableType:
        """Return the live view."""
        del waits  # between two entries, a simulation computes
        known = list(self._figures(history).items())
        rows = [known[:_PER_ROW], known[_PER_ROW:]]
        tables: list[RenderableType] = []
        for row in rows:
            table = Table.grid(padding=(0, 2))
            table.add_row(*(Text(name, style="dim") for name, _ in row))
            table.add_row(*(Text(value, style="bold") for _, value in row))
            tables.append(table)
        found = warnings(history, waits=False)
        lines = [Text(f"{name} {value}", style="red") for name, value in found.items()]
        return Group(*tables, *lines, Text(sparkline(history, self.bars), style="green"))

    def line(self, history: RunHistory, *, waits: bool) -> str:
        """Return a plain line."""
        del waits
        return in_one_line({**self._figures(history), **warnings(history, waits=False)})

    def _figures(self, history: RunHistory) -> dict[str, str]:
        known = figures(history)
        del known["time"]
        return {
            "simulated": duration(history.wall_s),
            "in": duration(self._clock() - self._began),
            **known,
            "in progress": f"{len(history.tracker.unanswered)}",
            "results/s": self._rate(history),
        }

    def _rate(self, history: RunHistory) -> str:
        """Return the results for each second of real time, lately."""
        now, counts, total = self._clock(), self._counts, history.outcomes.results
        while len(counts) > 1 and counts[1][0] <= now - _RATE_OVER_S:
            counts.popleft()
        since, before = counts[0]
        counts.append((now, total))
        return f"{(total - before) / (now - since):.0f}" if now > since else "-"
