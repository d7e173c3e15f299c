"""The curve of a run: its evaluations, and what each version had cost when it was committed."""

from __future__ import annotations

import bisect
import math
from array import array
from dataclasses import dataclass, field


@dataclass
class CurvePoint:
    """The evaluation of one version, by the evaluator or by the clients.

    wall_s: seconds since the start of the run, without the time in which it was stopped; of the
        newest answer.
    by_evaluator: metrics from the evaluator, by name.
    clients: metrics of each client that has answered, by its address.
    asked: number of clients that were asked; 0 for an evaluation by the evaluator.
    """

    version: int
    wall_s: float
    by_evaluator: dict[str, float] = field(default_factory=dict)
    clients: dict[str, dict[str, float]] = field(default_factory=dict)
    asked: int = 0
    _means: dict[str, float] | None = None
    """Means over the clients, once they are needed; None after another answer."""

    @property
    def metrics(self) -> dict[str, float]:
        """Return the metrics by name; means over the clients that have answered so far."""
        if not self.clients:
            return self.by_evaluator
        if self._means is None:
            known: dict[str, list[float]] = {}
            for metrics in self.clients.values():
                for name, value in metrics.items():
                    known.setdefault(name, []).append(value)
            self._means = {name: sum(values) / len(values) for name, values in known.items()}
        return self._means

    @property
    def is_partial(self) -> bool:
        """Return whether some of the clients that were asked have not answered."""
        return len(self.clients) < self.asked

    @property
    def accuracy(self) -> float | None:
        """Return the accuracy, if it is among the metrics."""
        return self.metrics.get("accuracy")

    @property
    def loss(self) -> float | None:
        """Return the loss, if it is among the metrics."""
        return self.metrics.get("loss")

    def withdraw(self, client: str) -> None:
        """Remove the metrics of a client, if it has any."""
        self.clients.pop(client, None)
        self._means = None

    def add(self, client: str, metrics: dict[str, float]) -> None:
        """Add a client's metrics of this version."""
        self.clients[client] = metrics
        self._means = None


@dataclass(frozen=True)
class Totals:
    """Totals of a run when it committed a version.

    bytes_up: bytes of the blobs of all answers before it.
    bytes_down: bytes of the blobs of all tasks and evaluations before it.
    results_used: number of results in the versions up to it.
    staleness: mean staleness of the version's own results, in versions; None if unknown.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    results_used: int = 0
    staleness: float | None = None


class VersionTotals:
    """The totals of each version; 40 bytes a version."""

    def __init__(self) -> None:
        self._versions = array("q")  # ascending
        self._up, self._down, self._used = array("q"), array("q"), array("q")
        self._staleness = array("d")  # NaN for None

    def add(self, version: int, up: int, down: int, used: int, staleness: float | None) -> None:
        """Record the totals at the commit of a version, see `Totals`.

        A version that is not the next one is ignored: no aggregator commits it.
        """
        if self._versions and version <= self._versions[-1]:
            return
        self._versions.append(version)
        self._up.append(up)
        self._down.append(down)
        self._used.append(used)
        self._staleness.append(math.nan if staleness is None else staleness)

    def at(self, version: int) -> Totals | None:
        """Return the totals of a version: zeros for version 0, None if no message commits it."""
        row = bisect.bisect_left(self._versions, version)
        if row == len(self._versions) or self._versions[row] != version:
            return None if version else Totals()
        stale = self._staleness[row]
        known = None if math.isnan(stale) else stale
        return Totals(self._up[row], self._down[row], self._used[row], known)
