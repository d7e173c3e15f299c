"""How the numbers of a run are computed, as in its ``run`` record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fedmq
from fedmq.algorithms.toolkit.arithmetic import ARITHMETIC
from fedmq.nodes.aggregator.progress import RULES
from fedmq.nodes.errors import NodeError
from fedmq.nodes.run.agreement import Fingerprint


@dataclass(frozen=True)
class Computed:
    """How the aggregator's numbers are computed.

    arithmetic: version, see `fedmq.algorithms.toolkit.arithmetic.ARITHMETIC`.
    device: kind of CPU, see `devices.kind_of`.
    version_0: fingerprint of the problem's model, see `fedmq.nodes.run.version_zero`.
    rules: version of the rules for failures, see `fedmq.nodes.aggregator.progress.RULES`.
    release: of fedmq. Sentences for people may change between releases.
    """

    arithmetic: int = ARITHMETIC
    device: str = ""
    version_0: Fingerprint | None = None
    rules: int = RULES
    release: str = fedmq.__version__

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Computed:
        """Return what a run's record contains; 0.1.0 recorded nothing."""
        match body:
            case {"arithmetic": int(arithmetic), "device": str(device), **rest}:
                # 0.2.0, the first release with these fields, did not record its name at first.
                rules, release = rest.get("rules", 0), str(rest.get("release", "0.2.0"))
                return cls(arithmetic, device, rest.get("version_0"), rules, release)
            case _:
                return cls(arithmetic=1, rules=0, release="")

    def check(self, arithmetic: int, run: str) -> None:
        """Check that a run was started with this arithmetic.

        Raises:
            NodeError: it was started with another one.
        """
        if arithmetic != self.arithmetic:
            raise NodeError(
                f"run {run!r} was started by a release of fedmq that computes differently: finish "
                "it with that release, or start a new run"
            )

    def facts(self) -> dict[str, Any]:
        """Return the fields for the run's record."""
        facts: dict[str, Any] = {"arithmetic": self.arithmetic, "device": self.device}
        facts |= {"rules": self.rules} if self.rules else {}
        facts |= {"release": self.release} if self.release else {}
        return facts if self.version_0 is None else {**facts, "version_0": self.version_0}
