"""Labelled examples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """Labelled examples as whole tensors; on small data, indexing is faster than a DataLoader.

    x: float32 [n, ...]; y: int64 [n] for classification; other integer dtypes become int64.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device | str) -> Examples:
        """Return the same examples on another device."""
        return Examples(self.x.to(device), self.y.to(device))
