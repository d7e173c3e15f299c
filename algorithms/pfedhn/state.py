"""One version of pFedHN, the hypernetwork and the embeddings; and its accumulator."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmq.algorithms.base import Payload
from fedmq.algorithms.pfedhn.hypernetwork import HyperNet
from fedmq.algorithms.pfedhn.model_parts import ModelPartition
from fedmq.algorithms.toolkit.flat_model import zeros
from fedmq.algorithms.toolkit.states import DERIVED, SavedAs


@dataclass(frozen=True)
class HyperState:
    """One version of the hypernetwork.

    phi: its parameters, float32 [P]. embeddings: v_i, float32 [K, D_e]. phi_momentum,
    embedding_momentum: of the server's SGD, of the same shapes. shared: float32, the tensors of
    the clients' models that are not trained. counters: int64, their integers. used: int64 [K],
    number of versions with a result of each client.
    """

    net: HyperNet = field(metadata=DERIVED)
    partition: ModelPartition = field(metadata=DERIVED)
    phi: Tensor = field(metadata=SavedAs("weights").field)
    embeddings: Tensor = field(metadata=SavedAs("weights").field)
    phi_momentum: Tensor = field(metadata=SavedAs("weights").field)
    embedding_momentum: Tensor = field(metadata=SavedAs("weights").field)
    shared: Tensor = field(metadata=SavedAs("weights", finite=False).field)
    counters: Tensor
    used: Tensor = field(metadata=SavedAs(least=0).field)

    def embedding(self, client: int) -> Tensor:
        """Return v_i, float32 [D_e]; for a new client the mean of the trained ones."""
        if client < len(self.embeddings):
            return self.embeddings[client]
        trained = self.used > 0
        return self.embeddings[trained if trained.any() else ~trained].mean(dim=0)

    def model_of(self, embedding: Tensor) -> Payload:
        """Return the model of an embedding, with the tensors that all models share."""
        sent = self.partition.sent
        weights = torch.cat([self.net.theta(self.phi, embedding), self.shared])
        return sent.write(weights, self.counters)


@dataclass
class HyperAccumulator:
    """Running sum over a version's results.

    phi, embeddings: sum of weight * (d theta_i / d (phi, v_i))^T dtheta_i.
    shared: sum of weight * the change of tensors that are not trained. counters: see
        `merge_counters`. present: bool [K], the clients with a result in the sum.
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
