"""FedBuff: Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba,
"Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from fedmq.algorithms.schedules.base import Asynchronous, ScheduleView
from fedmq.algorithms.schedules.staleness import StalenessSpec


@dataclass(frozen=True)
class Buffered(Asynchronous):
    """Algorithm 1: commit after every K results of any clients.

    size: K, results in a buffer.
    concurrency: M_c; staleness, max_staleness: as in `Asynchronous`. s = 1 / sqrt(1 + tau) in
        the paper, which equals `polynomial(0.5)`. The sum of the s * Delta is divided by K,
        not by the sum of the s, and n_k does not count.

    The paper's server learning rate eta_g is the algorithm's ``server_lr``.
    """

    name: ClassVar[str] = "buffered"
    folding: ClassVar[frozenset[str]] = Asynchronous.folding | {"size"}

    size: Annotated[int, Field(ge=1)] = 5
    staleness: StalenessSpec = "inverse_sqrt"

    def is_ready(self, view: ScheduleView) -> bool:
        """Commit when the buffer is full."""
        return view.results >= self.size

    def divisor(self, weights: float, results: int) -> float:
        """K."""
        return float(results)
