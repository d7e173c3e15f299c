"""What is learned: a model, each client's data, test data, loss and metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Examples:
    """Labelled examples, kept as whole tensors: indexing them beats a DataLoader on small data.

    x: float32 [n, ...]; y: int64 [n] for classification.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device | str) -> Examples:
        """Return the same examples on another device."""
        return Examples(self.x.to(device), self.y.to(device))


class Problem(ABC):
    """A model, the data of each client, test data, and what is measured.

    Everything is a deterministic function of the problem's fields and seed. Data are
    read only when asked for: the aggregator needs the model alone.
    """

    clients: int
    """Number of clients, K; they are numbered 0 to K-1."""

    @abstractmethod
    def model(self) -> nn.Module:
        """Return a freshly initialised model; the same values at every call."""

    @abstractmethod
    def client(self, index: int) -> Examples:
        """Return the training examples of one client.

        Raises:
            ProblemError: there is no such client.
            DataError: the data set is not there.
        """

    @abstractmethod
    def test(self) -> Examples:
        """Return the test examples.

        Raises:
            DataError: the data set is not there.
        """

    @abstractmethod
    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss over a batch, as a scalar tensor."""

    @abstractmethod
    def metrics(self, outputs: Tensor, y: Tensor) -> Mapping[str, float]:
        """Return means over a batch, at least ``loss``, and ``accuracy`` where it has a meaning."""
