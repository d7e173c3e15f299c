"""Messages of feature maps."""

import torch

DTYPES = ["float32", "float16", "bfloat16", "int8", "int4"]
PACKS = ["none", "zstd"]
HONEST = [(dtype, pack) for dtype in DTYPES for pack in PACKS]
LIMIT = 1 << 20


def group(features, ids=None, labels=None):
    """Return the tensors of one message, with ids 0, 1, ... unless others are given."""
    n = features.shape[0]
    found = {"features": features, "ids": torch.arange(n) if ids is None else ids}
    return found if labels is None else {**found, "labels": labels}
