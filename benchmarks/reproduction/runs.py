"""Run ``fedmq cluster`` or ``fedmq simulate`` in its own process and read the run's folder."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedmq.broker.ledger.entries import Accepted, Ended
from fedmq.broker.ledger.reader import read_entries

FEDMQ = Path(sys.executable).with_name("fedmq")

Table = Mapping[str, Any]
"""One table of a configuration."""


class RunError(Exception):
    """A run failed; the text is its output."""


@dataclass(frozen=True)
class Settings:
    """One configuration, as the tables of its TOML file.

    simulation: of a run in virtual time; None for one in real time.
    """

    run: Table
    problem: Table
    algorithm: Table
    schedule: Table
    codec: Table = field(default_factory=dict)
    simulation: Table | None = None

    def toml(self, seed: int) -> str:
        """Return the configuration file."""
        return tomli_w.dumps(
            {
                "run": {**self.run, "seed": seed},
                "problem": dict(self.problem),
                "algorithm": dict(self.algorithm),
                "schedule": dict(self.schedule),
                "codec": dict(self.codec),
                **({} if self.simulation is None else {"simulation": dict(self.simulation)}),
                "worker": {"count": 2},
                # Thousands of models would fill a disk; the kept messages hold their sizes.
                "broker": {"retain": "unfinished"},
            }
        )


@dataclass(frozen=True)
class Traffic:
    """Bytes to and from clients, without evaluations.

    down, up: mean bytes of one client's task and result, message and tensors: the bytes on
        the wire if each client is alone on its host.
    sockets_down, sockets_up: all bytes at the workers' sockets in this run, as counted by the
        broker. A node that hosts several clients of a round fetches their shared blobs once.
    """

    down: float
    up: float
    sockets_down: int
    sockets_up: int


@dataclass(frozen=True)
class Result:
    """Results of a run.

    curve: (version, accuracy) of every evaluation, in order.
    traffic: bytes to and from clients.
    seconds: duration of the whole command.
    points: the curve in ``summary.json``, with its other columns, in the same order.
    """

    curve: Sequence[tuple[int, float]]
    traffic: Traffic
    seconds: float
    points: Sequence[Mapping[str, Any]] = ()

    def first(self, target: float) -> int | None:
        """Return the first evaluated version with at least this accuracy."""
        return next((version for version, accuracy in self.curve if accuracy >= target), None)

    def crossing(self, target: float) -> float | None:
        """Return the version at which the linearly interpolated running maximum is ``target``.

        The FedAvg paper counts rounds in this way.
        """
        best, at = 0.0, 0
        for version, accuracy in self.curve:
            if accuracy >= target:
                return at + (version - at) * (target - best) / (accuracy - best)
            if accuracy > best:
                best = accuracy
            at = version
        return None

    @property
    def best(self) -> float:
        """Return the best accuracy."""
        return max(accuracy for _, accuracy in self.curve)

    @property
    def last(self) -> float:
        """Return the last accuracy."""
        return self.curve[-1][1]

    def late(self, count: int) -> float:
        """Return the mean of the last ``count`` accuracies."""
        tail = [accuracy for _, accuracy in self.curve[-count:]]
        return sum(tail) / len(tail)


class Runs:
    """Runs configurations, each at most once.

    Args:
        seed: seed of every run.
        overrides: ``key=value`` settings, applied to every configuration.
    """

    def __init__(self, seed: int, overrides: Sequence[str] = ()) -> None:
        self.seed, self.overrides = seed, tuple(overrides)
        self._results: dict[str, Result] = {}

    def result(self, settings: Settings, seed: int | None = None) -> Result:
        """Return the results of a configuration; run it if it has not run yet.

        Args:
            settings: the configuration.
            seed: of the run; by default that of all runs.

        Raises:
            RunError: the run failed.
        """
        text = settings.toml(self.seed if seed is None else seed)
        if text not in self._results:
            command = "cluster" if settings.simulation is None else "simulate"
            self._results[text] = self._run(command, text)
        return self._results[text]

    def _run(self, command: str, text: str) -> Result:
        with tempfile.TemporaryDirectory(prefix="fedmq-reproduce-") as temporary:
            folder, file = Path(temporary) / "run", Path(temporary) / "run.toml"
            file.write_text(text)
            sets = [each for override in self.overrides for each in ("--set", override)]
            began = time.monotonic()
            _run_to_end([str(FEDMQ), command, str(file), "--run", str(folder), *sets])
            took = time.monotonic() - began
            summary = json.loads((folder / "summary.json").read_text())
            points = sorted(summary["curve"], key=lambda point: int(point["version"]))
            if not points:
                raise RunError("the run ended without an evaluation")
            curve = [(point["version"], point["accuracy"]) for point in points]
            return Result(curve, traffic(folder / "ledger"), took, points)


def traffic(ledger: Path) -> Traffic:
    """Count the bytes of a run from its ledger."""
    sizes: dict[str, list[int]] = {"task": [], "result": []}
    sockets_down = sockets_up = 0
    for entry in read_entries(ledger):
        match entry:
            case Accepted():
                message = entry.read()
                if message.kind in sizes:
                    blobs = sum(blob.size for blob in message.blobs)
                    sizes[message.kind].append(len(entry.message) + blobs)
            case Ended(nodes=nodes):
                workers = [counts for name, counts in nodes.items() if name.startswith("worker-")]
                sockets_down += sum(counts["sent_bytes"] for counts in workers)
                sockets_up += sum(counts["received_bytes"] for counts in workers)
    down, up = (sum(each) / max(1, len(each)) for each in sizes.values())
    return Traffic(down, up, sockets_down, sockets_up)


def _run_to_end(command: Sequence[str]) -> None:
    """Run a command to its end; on any exception stop it and wait for it."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            process.terminate()
            process.communicate()
            raise
    if process.returncode:
        raise RunError(output.strip())


@dataclass(frozen=True)
class Outcome:
    """Result of a cell.

    ours: our figure, as text.
    met: whether the bar is met; None for a cell without a bar.
    figures: all numbers, by name.
    lines: details to print below.
    """

    ours: str
    met: bool | None
    figures: Mapping[str, float]
    lines: Sequence[str] = ()


@dataclass(frozen=True)
class Cell(ABC):
    """One figure of a paper.

    name: the cell's name on the command line.
    paper: the paper's figure, and its place in the paper.
    bar: the value that our figure must reach, as text; empty for none.
    hours: whether it needs hours; such a cell runs only with ``--hours`` or by name.
    """

    name: str
    paper: str
    bar: str
    hours: bool = field(default=False, kw_only=True)

    @abstractmethod
    def measure(self, runs: Runs) -> Outcome:
        """Return our figure.

        Raises:
            RunError: a run failed.
        """
