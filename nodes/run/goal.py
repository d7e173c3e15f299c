"""What a run is to reach; a run that is taken up again may be given more to reach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from fedmq.nodes.run.config import RunTable, parse


class Goal(Struct, frozen=True):
    """When a run has reached its end.

    versions: it ends when this many have been committed.
    target_accuracy: it ends earlier when an evaluation reaches this.
    failures: number in a row after which it fails; None for as many as `Progress` allows.
    """

    versions: int
    target_accuracy: float | None = None
    failures: int | None = None

    @classmethod
    def of(cls, settings: RunTable) -> Goal:
        """Return what a run's configuration says."""
        return cls(settings.versions, settings.target_accuracy, settings.failures)

    @classmethod
    def told(cls, body: Mapping[str, Any]) -> Goal:
        """Return what the broker tells when a run was taken up again.

        Raises:
            ConfigError: its configuration is none.
        """
        return cls.of(parse(body["config"]).run)

    def after(self, version: int) -> str:
        """Return why the run ends with this version; empty if it does not."""
        return f"{version} versions committed" if version >= self.versions else ""

    def met_by(self, accuracy: float | None) -> str:
        """Return why the run ends with an evaluation; empty if it does not."""
        target = self.target_accuracy
        if accuracy is not None and target is not None and accuracy >= target:
            return f"accuracy {accuracy:.4f} reached the target of {target:g}"
        return ""
