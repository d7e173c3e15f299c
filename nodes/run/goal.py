"""The goal of a run, which a continued run can extend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from fedmq.nodes.run.config import RunTable, parse


class Goal(Struct, frozen=True):
    """When a run ends; the keys of the same names in ``[run]``.

    versions: number of versions after which the run ends.
    target_accuracy: accuracy of an evaluation that ends the run earlier.
    failures: number of failures in a row after which the run fails; None for the default.
    """

    versions: int
    target_accuracy: float | None = None
    failures: int | None = None

    @classmethod
    def of(cls, settings: RunTable) -> Goal:
        """Return the goal in a run's configuration."""
        return cls(settings.versions, settings.target_accuracy, settings.failures)

    @classmethod
    def of_continued(cls, body: Mapping[str, Any]) -> Goal:
        """Return the goal in the body of the broker's ``continued`` message.

        Raises:
            ConfigError: the configuration in it is invalid.
        """
        return cls.of(parse(body["config"]).run)

    def after(self, version: int) -> str:
        """Return the reason if the run ends with this version, else ""."""
        return f"{version} versions committed" if version >= self.versions else ""

    def met_by(self, accuracy: float | None) -> str:
        """Return the reason if the run ends with an evaluation of this accuracy, else ""."""
        target = self.target_accuracy
        if accuracy is not None and target is not None and accuracy >= target:
            return f"accuracy {accuracy:.4f} reached the target of {target:g}"
        return ""
