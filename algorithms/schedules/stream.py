"""FedAsync: Xie, Koyejo, Gupta, "Asynchronous Federated Optimization", 2019."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from fedmq.algorithms.schedules.base import Asynchronous, ScheduleView
from fedmq.algorithms.schedules.staleness import StalenessSpec
from fedmq.algorithms.tasks import Reply


@dataclass(frozen=True)
class Stream(Asynchronous):
    """Algorithm 1: mix in every result at once.

    x_t = (1 - alpha_t) x_{t-1} + alpha_t x_new, alpha_t = alpha * s(t - tau).

    mixing: alpha, the share of the client's model before the discount.
    concurrency, staleness, max_staleness: as in `Asynchronous`.

    Clients send their model, not its change, because x_new is mixed with a newer model than the
    one it was trained from. FedAsync's local regularisation (rho) is FedProx's mu.
    """

    name: ClassVar[str] = "stream"
    reply: ClassVar[Reply] = "model"
    folding: ClassVar[frozenset[str]] = Asynchronous.folding | {"mixing"}

    mixing: Annotated[float, Field(gt=0, le=1)] = 0.6
    staleness: StalenessSpec = "polynomial(0.5)"

    def weight(self, n: int, staleness: int) -> float | None:
        """alpha_t = alpha * s(t - tau)."""
        discount = super().weight(n, staleness)
        return None if discount is None else self.mixing * discount

    def is_ready(self, view: ScheduleView) -> bool:
        """Commit after every result."""
        return view.results >= 1

    def divisor(self, weights: float, results: int) -> float:
        """1: the weight is the mixing rate itself."""
        return 1.0
