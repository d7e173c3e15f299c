"""A sweep: its runs, what they came to, and the table of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmq.nodes.api.array_table import ArrayTable
from fedmq.nodes.api.run import Run
from fedmq.nodes.api.sweep_grid import GridCell
from fedmq.nodes.api.sweep_table import FINISHED, failure_lines, lines, row_of, to_csv

INVALID, FAILED, INTERRUPTED = "invalid", "failed", "interrupted"
IN_USE, WAITING = "in use", "not started"
"""Statuses of a run that has not finished."""


@dataclass
class SweepRun:
    """One run of a sweep.

    name: of its folder within that of the sweep.
    settings: its values by key.
    folder: of the run.
    status: ``finished``, ``failed``, ``interrupted``, ``invalid`` (the configuration) or
        ``in use`` (another command makes it) or ``not started``.
    reason: why it has not finished; "" if it has.
    run: the run, if its folder has one.
    """

    name: str
    settings: Mapping[str, Any]
    folder: Path
    status: str = WAITING
    reason: str = ""
    run: Run | None = None

    def row(self) -> dict[str, Any]:
        """Return its settings, figures, folder and reason."""
        summary = None if self.run is None else self.run.summary
        found = row_of(self.settings, self.status, summary)
        return {**found, "folder": self.name, "reason": self.reason}


class Sweep:
    """The runs of a sweep, in the order of the grid; iterate over it to get them.

    Attributes:
        folder: of the sweep, as an absolute path.
        runs: all of them, see `SweepRun`.
    """

    def __init__(self, folder: Path, cells: Sequence[GridCell]) -> None:
        self.folder = folder.absolute()
        self.runs = [SweepRun(each.name, each.settings, self.folder / each.name) for each in cells]

    def __iter__(self) -> Iterator[SweepRun]:
        return iter(self.runs)

    def __len__(self) -> int:
        return len(self.runs)

    @property
    def failed(self) -> list[SweepRun]:
        """Return the runs that have not finished."""
        return [each for each in self.runs if each.status != FINISHED]

    @property
    def table(self) -> ArrayTable:
        """Return a row for each run, NaN where a value is missing.

        Columns: the settings; ``status``, ``versions``, ``accuracy``, ``best_accuracy``, ``loss``,
        ``wall_s``, ``bytes_up``, ``bytes_down``, ``results_used``; the other metrics of the last
        evaluation; ``folder``, ``reason``.
        """
        return ArrayTable.of_rows((each.row() for each in self.runs), "run")

    def to_pandas(self) -> Any:
        """Return `table` as a `pandas.DataFrame`.

        Raises:
            ImportError: pandas is not installed.
        """
        return self.table.to_pandas()

    def to_csv(self) -> str:
        """Return `table` as CSV."""
        return to_csv([each.row() for each in self.runs])

    def lines(self) -> list[str]:
        """Return the table of means and standard deviations over seeds, and what failed."""
        keys = list(self.runs[0].settings)
        failures = {each.name: (each.status, each.reason) for each in self.failed}
        return [*lines([each.row() for each in self.runs], keys), *failure_lines(failures)]

    def __repr__(self) -> str:
        return "\n".join([f"<fedmq sweep {self.folder}: {len(self)} runs>", *self.lines()])
