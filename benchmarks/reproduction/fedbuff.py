"""Asynchronous schedules: Nguyen et al., AISTATS 2022, "Federated Learning with Buffered
Asynchronous Aggregation" (FedBuff), and Xie, Koyejo, Gupta, 2019, "Asynchronous Federated
Optimization" (FedAsync), beside synchronous rounds.

FedBuff's metric is the number of client updates that reach a target accuracy. Its data sets are
CelebA, Sent140 and CIFAR-10; here it is MNIST with 100 clients, 20 of them at work at a time. The
runs are simulated: devices differ by a long-tailed training time, lognormal with a median of 1 s
and sigma 1 (1 client in 40 is 7 times slower than the median). Every schedule is evaluated after
each 20 client updates. Three seeds; mean and standard deviation.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reproduction.runs import Cell, Outcome, Result, Runs, Settings

SEEDS = 3
UPDATES, EVERY = 2500, 20
"""Most client updates of a run, and client updates between evaluations."""
SCHEDULES: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    # Client updates in a version, and the schedule.
    "rounds": (20, {"name": "rounds", "fraction": 0.2}),
    "FedBuff": (5, {"name": "buffered", "concurrency": 20, "size": 5, "staleness": "inverse_sqrt"}),
    "FedAsync": (
        1,
        {"name": "stream", "concurrency": 20, "mixing": 0.6, "staleness": "polynomial(0.5)"},
    ),
}


def settings(schedule: str, partition: str, target: float) -> Settings:
    """Return one schedule in the common setting."""
    size, options = SCHEDULES[schedule]
    return Settings(
        run={
            "versions": UPDATES // size,
            "evaluate_every": EVERY // size,
            "target_accuracy": target,
        },
        problem={"name": "mnist", "model": "2nn", "clients": 100, "partition": partition},
        algorithm={"name": "fedavg", "epochs": 1, "batch_size": 10, "lr": 0.05},
        schedule=options,
        simulation={"compute": "lognormal(1, 1)"},
    )


@dataclass(frozen=True)
class Reached:
    """Costs of the first evaluation with the target accuracy: updates, bytes, virtual seconds."""

    updates: float
    megabytes_up: float
    megabytes_down: float
    seconds: float

    @classmethod
    def of(cls, result: Result, target: float) -> Reached | None:
        """Return the costs of a run, or None if it does not reach the target."""
        for point in result.points:
            if point["accuracy"] is not None and point["accuracy"] >= target:
                up, down = point["bytes_up"] / 1e6, point["bytes_down"] / 1e6
                return cls(point["results_used"], up, down, point["wall_s"])
        return None


@dataclass(frozen=True)
class SideBySide(Cell):
    """Client updates, bytes and virtual time to a target accuracy, under three schedules.

    The bar: FedBuff needs fewer client updates than rounds, and than FedAsync, in the mean; a
    schedule that does not reach the target needs more.

    partition: of MNIST among the clients. target: the accuracy.
    """

    partition: str
    target: float

    def measure(self, runs: Runs) -> Outcome:
        """Run every schedule with every seed."""
        figures: dict[str, float] = {}
        lines = [f"{'':<9} {'updates':>13} {'MB up':>13} {'MB down':>13} {'virtual s':>15}"]
        means: dict[str, float] = {}
        for name in SCHEDULES:
            chosen = settings(name, self.partition, self.target)
            results = [runs.result(chosen, runs.seed + each) for each in range(SEEDS)]
            found = [Reached.of(each, self.target) for each in results]
            reached = [each for each in found if each is not None]
            figures[f"{name}.reached"] = len(reached)
            if len(reached) < SEEDS:
                best = ", ".join(f"{each.best:.4f}" for each in results)
                lines.append(f"{name:<9} reached by {len(reached)} of {SEEDS}; best {best}")
                means[name] = math.inf
                continue
            columns = []
            for key in ("updates", "megabytes_up", "megabytes_down", "seconds"):
                mean, spread = _spread([getattr(each, key) for each in reached])
                figures |= {f"{name}.{key}": mean, f"{name}.{key}_std": spread}
                columns.append(f"{mean:.0f} +- {spread:.0f}")
            means[name] = figures[f"{name}.updates"]
            lines.append(
                f"{name:<9} {columns[0]:>13} {columns[1]:>13} {columns[2]:>13} {columns[3]:>15}"
            )
        others = (means["rounds"], means["FedAsync"])
        if means["FedBuff"] == math.inf:
            return Outcome("FedBuff does not reach it", met=False, figures=figures, lines=lines)
        ours = ", ".join(
            f"more than {UPDATES / means['FedBuff']:.2f}x" if each == math.inf
            else f"{each / means['FedBuff']:.2f}x"
            for each in others
        )  # fmt: skip
        return Outcome(ours, min(others) > means["FedBuff"], figures, lines)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values)


_PAPER = "FedBuff: 3.3x fewer updates than sync, 2.5x than async"
_BAR = "above 1x of both"
IID = SideBySide("fedbuff-iid", _PAPER, _BAR, "iid", 0.95)
SHARDS = SideBySide("fedbuff-shards", _PAPER, _BAR, "shards(2)", 0.93)
