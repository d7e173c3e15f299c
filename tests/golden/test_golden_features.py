"""Bytes that never change: what version 1 of ``features`` and of ``logits`` wrote stays readable.

These constants are not edited. Other bytes mean another version, beside this one.
"""

import pytest
import torch

from fedmq.codecs.base import Codec, Encoded
from fedmq.codecs.features import Features
from fedmq.codecs.logits import Logits
from fedmq.codecs.spec import build

CHOICES: dict[str, type[Codec]] = {"features": Features, "logits": Logits}
LIMIT = 1 << 20

# Three samples, two channels, an odd number of values a sample.
FEATURES = {
    "features": torch.tensor(
        [[[0.0, 1.0, 7.5]], [[-1.0, 0.0, 0.0]], [[2.5, 0.0, 14.0]]]
    ).transpose(1, 2),
    "ids": torch.tensor([4, 5, 300]),
    "labels": torch.tensor([9, 0, 9]),
}
SAMPLES = {"logits": torch.tensor([[1.0, -2.0, 0.5], [3.0, 3.0, 3.0]]), "ids": torch.tensor([7, 6])}
LABELS = {"logits": torch.tensor([[1.5, -1.0], [0.0, 0.0]]), "counts": torch.tensor([513, 0])}
