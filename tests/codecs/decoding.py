"""Messages as received, and the check that invalid ones are rejected in little memory."""

import tracemalloc

import numpy as np
import pytest
import torch

from fedmq.codecs.base import Encoded
from fedmq.codecs.errors import DecodeError

INVALID_GRIDS = [
    (float("nan"), 1.0),
    (0.0, float("nan")),
    (float("-inf"), 1.0),
    (0.0, float("inf")),
    (0.0, 0.0),
    (0.0, -1.0),
    (3e38, 1e36),
    (0.0, 1e38),
]
"""Invalid (low, step) of quantized values."""


def small(make):
    """Wrap torch.empty or torch.zeros, whose memory tracemalloc does not see."""

    def made(size, **options):
        assert np.prod(size) < 1 << 14, "a tensor was made before the message was checked"
        return make(size, **options)

    return made


def received(encoded):
    """Return a copy of a message, as the receiver has it."""
    return Encoded(encoded.codec, encoded.meta, [bytes(each) for each in encoded.buffers])


def rejected(codec, meta, buffers, message, limit=1 << 40):
    """Assert that a message is rejected and costs almost no memory."""
    tracemalloc.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", small(torch.empty))
            patch.setattr(torch, "zeros", small(torch.zeros))
            with pytest.raises(DecodeError, match=message):
                codec.decode(Encoded(codec.wire_name, meta, buffers), limit)
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()
