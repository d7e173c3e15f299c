"""What a decoder refuses, it refuses before it makes room for it."""

import tracemalloc

import numpy as np
import pytest
import torch

from fedmq.codecs.base import Encoded
from fedmq.codecs.errors import DecodeError

UNSOUND_RANGES = [
    (float("nan"), 1.0),
    (0.0, float("nan")),
    (float("-inf"), 1.0),
    (0.0, float("inf")),
    (0.0, 0.0),
    (0.0, -1.0),
    (3e38, 1e36),
    (0.0, 1e38),
]
"""Of quantized values: the lowest, and the step."""


def small(make):
    """Wrap torch.empty or torch.zeros, whose memory tracemalloc does not see."""

    def made(size, **options):
        assert np.prod(size) < 1 << 14, "a tensor was made before the message was checked"
        return make(size, **options)

    return made


def refused(codec, meta, buffers, message, limit=1 << 40):
    """Assert that a message is refused and costs next to no memory."""
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
