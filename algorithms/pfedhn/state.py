"""One version of pFedHN: the hypernetwork, the embeddings, and what a version gathers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmq.algorithms.base import Payload
from fedmq.algorithms.pfedhn.hypernetwork import HyperNet
from fedmq.algorithms.pfedhn.model_parts import ModelPartition
from fedmq.algorithms.toolkit.flat_model import zeros
from fedmq.algorithms.toolkit.states import saved


@dataclass(frozen=True)
class HyperState:
    """One version of the hypernetwork.

    phi: its parameters, float32 [P]. embeddings: v_i, float32 [K, D_e]. phi_momentum,
    embedding_momentum: of the server's SGD, shaped alike. shared: float32, what is not
    trained in the clients' models. counters: int64, theirs. used: int64 [K], versions in
    which each client had a result.
    """

    net: HyperNet
    partition: ModelPartition
    phi: Tensor = field(metadata=saved("weights"))
    embeddings: Tensor = field(metadata=saved("weights"))
    phi_momentum: Tensor = field(metadata=saved("weights"))
    embedding_momentum: Tensor = field(metadata=saved("weights"))
    shared: Tensor = field(metadata=saved("weights", finite=False))
    counters: Tensor
    used: Tensor = field(metadata=saved(least=0))

    def embedding(self, client: int) -> Tensor:
        """Return v_i; of a new client the mean of those that were trained, float32 [D_e]."""
        if client < len(self.embeddings):
            return self.embeddings[client]
        trained = self.used > 0
        return self.embeddings[trained if trained.any() else ~trained].mean(dim=0)

    def model_of(self, embedding: Tensor) -> Payload:
        """Return the model that belongs to an embedding, and what all models share."""
        sent = self.partition.sent
        weights = torch.cat([self.net.theta(self.phi, embedding), self.shared])
        return sent.write(weights, self.counters)


@dataclass
class HyperAccumulator:
    """The running sum over a version's results, whatever their number.

    phi, embeddings: sum of weight * (d theta_i / d (phi, v_i))^T dtheta_i.
    shared: sum of weight * the change of what is not trained. counters: largest so far.
    present: bool [K], who has a result in it.
    """

    phi: Tensor
    embeddings: Tensor
    shared: Tensor
    counters: Tensor
    present: Tensor

    @classmethod
    def empty(cls, state: HyperState) -> HyperAccumulator:
        """Return an empty sum."""
        return cls(
            zeros(len(state.phi)),
            torch.zeros_like(state.embeddings),
            torch.zeros_like(state.shared),
            state.counters.clone(),
            torch.zeros(len(state.used), dtype=torch.bool),
        )
