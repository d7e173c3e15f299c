"""Stages reject invalid positions and ranges, at any address."""

import math

import numpy as np
import pytest
import torch

from fedmq.codecs.base import Encoded
from fedmq.codecs.errors import DecodeError
from fedmq.codecs.registry import decode, make_codec
from tests.codecs.pipeline_messages import PIPELINES, message


@pytest.mark.parametrize(
    "indices",
    [
        [5, 0],  # a repeated position
        [0, 1, 0],
        [100, 1],  # after the end
        [0, 100],
        [2**32 - 1, 1],
        [2**32 - 1, 2**32 - 1],  # no wrap-around
        [99, 1],
    ],
)
def test_positions_out_of_order_or_range_are_rejected(indices):
    spec = f"topk@1({len(indices) / 100!r})"
    meta = {"tensors": [["x", "float32", [100]]], "large": [0], "seed": 0}
    steps, values = np.array(indices, np.uint32), np.ones(len(indices), np.float32)
    with pytest.raises(DecodeError, match="expected ascending positions"):
        decode(Encoded(f"limit@1(0) | {spec}", meta, [steps.tobytes(), values.tobytes()]))


def test_the_first_and_last_positions_decode():
    meta = {"tensors": [["x", "float32", [100]]], "large": [0], "seed": 0}
    steps, values = np.array([0, 99], np.uint32), np.array([1, 2], np.float32)
    found = decode(Encoded("limit@1(0) | topk@1(0.02)", meta, [steps.tobytes(), values.tobytes()]))
    assert (found["x"][0], found["x"][99], found["x"].sum()) == (1, 2, 3)


@pytest.mark.parametrize("basis", ["", "hadamard(16) | ", "hadamard(8) | ", "kashin(16) | "])
@pytest.mark.parametrize("low", [0.0, 1.0, math.nan, math.inf, -math.inf, 3.4e38])
@pytest.mark.parametrize("high", [0.5, math.nan, math.inf, -math.inf, -3.4e38])
def test_invalid_ranges_are_rejected(basis, low, high):
    codec = make_codec(f"limit(0) | {basis}quantize(3, 16)")
    good = codec.encode({"x": torch.randn(40)}, 0)
    for block in range(len(good.buffers[0]) // 8):
        ranges = np.frombuffer(bytes(good.buffers[0]), np.float32).reshape(-1, 2).copy()
        ranges[block] = low, high
        encoded = Encoded(good.codec, good.meta, [ranges.tobytes(), good.buffers[1]])
        if low <= high < math.inf and low > -math.inf:
            decode(encoded)
        else:
            with pytest.raises(DecodeError, match="expected finite ranges"):
                decode(encoded)


def test_unaligned_bytes_decode():
    for spec in PIPELINES:
        good = message(spec)
        shifted = [memoryview(b"\0" + bytes(each))[1:] for each in good.buffers]
        one, other = decode(good), decode(Encoded(good.codec, good.meta, shifted))
        assert all(torch.equal(one[name], other[name]) for name in one)
