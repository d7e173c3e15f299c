"""Messages of feature maps: their kinds, their tensors, and what a wire makes of them."""

import torch

from fedmq.codecs.base import Encoded

DTYPES = ["float32", "float16", "bfloat16", "int8", "int4"]
PACKS = ["none", "zstd"]
HONEST = [(dtype, pack) for dtype in DTYPES for pack in PACKS]
LIMIT = 1 << 20


def sent(encoded):
    """Return what the other end of a wire holds: the same bytes in memory of its own."""
    return Encoded(encoded.codec, encoded.meta, [bytes(each) for each in encoded.buffers])


def group(features, ids=None, labels=None):
    """Return the tensors of one message, with ids 0, 1, ... unless others are given."""
    n = features.shape[0]
    found = {"features": features, "ids": torch.arange(n) if ids is None else ids}
    return found if labels is None else {**found, "labels": labels}
