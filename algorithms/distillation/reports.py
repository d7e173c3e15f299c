"""Reports of devices: mean outputs in federated distillation and co-distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmq.algorithms.base import Payload
from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.toolkit.states import DERIVED
from fedmq.codecs.text import shorten

MOST_COUNTED = 10**12
"""Limit of the number of outputs in one mean; honest reports stay far below."""


@dataclass(frozen=True)
class Reports:
    """The last report of each device: M devices, R rows (labels or samples), L classes.

    means: float32 [M, R, L], mean softmax outputs; a row with a count of 0 is 0.
    counts: int64 [M, R], the number of outputs in the mean of a row.
    total: float64 [R, L], the sum of the means over devices.
    having: int64 [R], the number of devices with a row.
    """

    means: Tensor
    counts: Tensor
    total: Tensor = field(metadata=DERIVED)
    having: Tensor = field(metadata=DERIVED)

    @classmethod
    def of(cls, means: Tensor, counts: Tensor) -> Reports:
        """Return reports with their sums."""
        # Along the first axis numpy adds one device after the other on any number of threads, so
        # a restored state has the same sums to the bit.
        total = means.numpy().sum(axis=0, dtype=np.float64)
        return cls(means, counts, torch.from_numpy(total), (counts > 0).sum(dim=0))

    @classmethod
    def none(cls, devices: int, rows: int, classes: int) -> Reports:
        """Return reports without any output."""
        counts = torch.zeros((devices, rows), dtype=torch.int64)
        return cls.of(torch.zeros((devices, rows, classes)), counts)

    def others(self, device: int) -> tuple[Tensor, Tensor]:
        """Return the means of the *other* devices' rows, and the number of devices with each.

        float32 [R, L] and int64 [R]; both are 0 for a row that no other device has. For a device
        beyond these M, all M are others.
        """
        total, having = self.total, self.having
        if device < len(self.means):
            total = total - self.means[device]
            having = having - (self.counts[device] > 0).long()
        means = (total / having.clamp(min=1).unsqueeze(1)).clamp(min=0).float()
        return means * (having > 0).unsqueeze(1), having

    def updated(self, new: Mapping[int, tuple[Tensor, Tensor]]) -> Reports:
        """Return reports with the new ones of these devices."""
        means, counts = self.means.clone(), self.counts.clone()
        for device, (rows, of) in new.items():
            means[device], counts[device] = rows, of
        return Reports.of(means, counts)


NewOutputs = dict[int, tuple[Tensor, Tensor]]
"""The newest (means, counts) for the next version, by device."""


def group_of(payload: Payload, key: Literal["ids", "counts"]) -> tuple[Tensor, Tensor]:
    """Return logits and their ids or counts.

    Raises:
        ResultError: they are missing, or there are other tensors.
    """
    if set(payload.logits) != {"logits", key} or payload.weights or payload.features:
        found = shorten(sorted([*payload.logits, *payload.weights, *payload.features]))
        raise ResultError(f"expected logits with {key} and no other tensors, got {found}")
    return payload.logits["logits"], payload.logits[key]


def check_probabilities(rows: Tensor) -> None:
    """Raise ResultError if rows, float32 [n, L], are not probabilities.

    The tolerance covers codecs, which change a value by up to 1/510 of the row's span.
    """
    values: NDArray[np.float32] = rows.numpy()
    slack = 0.0025
    if not np.isfinite(values).all() or (values < -slack).any() or (values > 1 + 2 * slack).any():
        raise ResultError("expected probabilities, got values that are not from 0 to 1")
    off = float(np.abs(values.sum(axis=1, dtype=np.float64) - 1).max(initial=0))
    if off > 0.01 + slack * values.shape[1]:
        raise ResultError(f"expected probabilities that sum to 1, got a sum off by {off:.3g}")
