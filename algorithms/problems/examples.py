"""Labelled examples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """Labelled examples, kept as whole tensors: indexing them beats a DataLoader on small data.

    x: float32 [n, ...]; y: int64 [n] for classification. Labels of other whole-number dtypes
    are taken as int64.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device | str) -> Examples:
        """Return the same examples on another device."""
        return Examples(self.x.to(device), self.y.to(device))
