"""FedProx: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith,
"Federated Optimization in Heterogeneous Networks", MLSys 2020.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from fedmq.algorithms.base import Client
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.rng import derive_rng


@dataclass(frozen=True)
class FedProx(FedAvg):
    """Algorithm 2: FedAvg whose clients minimise F_k(w) + (mu/2) ||w - w_t||^2, inexactly.

    mu: weight of the proximal term; 0 is FedAvg.
    partial: share of the tasks whose client is too slow for all E epochs: it does a number
        drawn uniformly from 1 to E (section 5.2, "systems heterogeneity": 0, 0.5 and 0.9), and
        its result counts in full.
    Other fields are FedAvg's.
    """

    name: ClassVar[str] = "fedprox"

    mu: Annotated[float, Field(ge=0)] = 0.01
    partial: Annotated[float, Field(ge=0, le=1)] = 0.0

    def local_epochs(self, client: Client) -> int:
        """Return E, or for a slow client a number from 1 to E."""
        rng = derive_rng(client.seed, "partial work")
        slow = rng.random() < self.partial
        return int(rng.integers(1, self.epochs + 1)) if slow else self.epochs

    @property
    def proximal_weight(self) -> float:
        """Return mu."""
        return self.mu

    def regularize(self, gradient: Tensor, trained: Tensor, anchor: Tensor) -> None:
        """Add mu * (w - w_t), the gradient of the proximal term."""
        super().regularize(gradient, trained, anchor)
        if self.mu:
            gradient.add_(trained, alpha=self.mu).sub_(anchor, alpha=self.mu)
