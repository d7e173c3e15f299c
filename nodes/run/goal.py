"""The goal of a run: what ends it, and what it has used of its limits so far.

A continued run can extend its goal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from fedmq.nodes.run.config import RunTable, parse


class Spent(Struct):
    """What a run has used of its limits so far.

    payload_bytes: of tasks, evaluations and their answers.
    started_at: time of the run's first message, in seconds since 1970; None before it.
    stopped_s: seconds in which the run was stopped, until it was resumed.
    best: best accuracy of an evaluation; None before the first.
    not_better: number of evaluations since then.
    """

    payload_bytes: int = 0
    started_at: float | None = None
    stopped_s: float = 0.0
    best: float | None = None
    not_better: int = 0

    def wall_s(self, now: float) -> float:
        """Return the seconds since the run's start, without the time in which it was stopped."""
        return 0.0 if self.started_at is None else now - self.started_at - self.stopped_s

    def evaluated(self, accuracy: float) -> None:
        """Record the accuracy of an evaluation; NaN is not better than any other."""
        if not math.isnan(accuracy) and (self.best is None or accuracy > self.best):
            self.best, self.not_better = accuracy, 0
        else:
            self.not_better += 1


class Goal(Struct, frozen=True):
    """When a run ends; the keys of the same names in ``[run]``.

    versions: number of versions after which the run ends.
    target_accuracy: accuracy of an evaluation that ends the run earlier.
    failures: number of failures in a row after which the run fails; None for the default.
    max_bytes, max_wall_s, patience: limits that end the run earlier; see `limit_reached`.
    """

    versions: int
    target_accuracy: float | None = None
    failures: int | None = None
    max_bytes: int | None = None
    max_wall_s: float | None = None
    patience: int | None = None

    @classmethod
    def of(cls, settings: RunTable) -> Goal:
        """Return the goal in a run's configuration."""
        return cls(**{name: getattr(settings, name) for name in cls.__struct_fields__})

    @classmethod
    def of_continued(cls, body: Mapping[str, Any]) -> Goal:
        """Return the goal in the body of the broker's ``continued`` message.

        Raises:
            ConfigError: the configuration in it is invalid.
        """
        return cls.of(parse(body["config"]).run)

    @property
    def needs_accuracy(self) -> str:
        """Return the key that needs the accuracy of evaluations, or ""."""
        if self.target_accuracy is not None:
            return "run.target_accuracy"
        return "" if self.patience is None else "run.patience"

    def after(self, version: int) -> str:
        """Return the reason if the run ends with this version, else ""."""
        return f"{version} versions committed" if version >= self.versions else ""

    def met_by(self, accuracy: float | None) -> str:
        """Return the reason if the run ends with an evaluation of this accuracy, else ""."""
        target = self.target_accuracy
        if accuracy is not None and target is not None and accuracy >= target:
            return f"accuracy {accuracy:.4f} reached the target of {target:g}"
        return ""

    def limit_reached(self, spent: Spent, wall_s: float = 0.0) -> tuple[str, str]:
        """Return the key of a limit that the run has reached, and the reason; ("", "") if none.

        Args:
            spent: so far.
            wall_s: the run's duration in seconds; compared with ``max_wall_s``.
        """
        if self.max_bytes is not None and spent.payload_bytes >= self.max_bytes:
            text = f"{spent.payload_bytes:,} bytes transferred, run.max_bytes is {self.max_bytes:,}"
            return "run.max_bytes", text
        if self.patience is not None and spent.not_better >= self.patience:
            best = "" if spent.best is None else f" than {spent.best:.4f}"
            text = (
                f"{spent.not_better} evaluations in a row had no better accuracy{best} "
                "(run.patience)"
            )
            return "run.patience", text
        if self.max_wall_s is not None and wall_s >= self.max_wall_s:
            text = f"{wall_s:.1f} s have passed, run.max_wall_s is {self.max_wall_s:g}"
            return "run.max_wall_s", text
        return "", ""
