"""Hostile messages cost pipelines little memory and time."""

import tracemalloc

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.codecs import kernels
from fedmq.codecs.base import Encoded
from fedmq.codecs.errors import DecodeError
from fedmq.codecs.registry import decode
from tests.codecs.pipeline_messages import try_decode

# ---- zstd


def frames(size, count=1, *, window=False):
    if window:
        parameters = zstandard.ZstdCompressionParameters(window_log=27)
        compressor = zstandard.ZstdCompressor(compression_params=parameters)
    else:
        compressor = zstandard.ZstdCompressor()
    return [compressor.compress(bytes(size))] * count


def peak_of(codec, meta, buffers, limit):
    """Return the peak of Python's memory while a message is rejected."""
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            decode(Encoded(codec, meta, buffers), limit)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


SMALL = {"tensors": [["x", "float32", [100]]], "large": [0], "seed": 0}
ENTROPY = "limit@1(0) | entropy@1(3)"


@pytest.mark.slow
@pytest.mark.parametrize("stated", [400, 4000, 7000, 1 << 20, 1 << 26, 1 << 40, 0, 1])
@pytest.mark.parametrize("window", [False, True])
def test_a_zstd_bomb_allocates_little_memory(stated, window):
    (bomb,) = frames(1 << 26, window=window)
    assert len(bomb) < 1 << 14
    assert peak_of(ENTROPY, {**SMALL, "sizes": [stated]}, [bomb], 1 << 30) < 1 << 18


def test_many_small_bombs_are_one_large_one():
    """Each is within the limit for a message of this size; together they are 64 MiB."""
    count = 16384
    buffers = frames(4096, count)
    meta = {**SMALL, "sizes": [4096] * count}
    assert peak_of(ENTROPY, meta, buffers, 1 << 30) < 1 << 20


@pytest.mark.parametrize("stated", [399, 401, 0, -1, -2, 400.0, "400", None, 1 << 64])
def test_wrong_sizes_are_rejected(stated):
    (frame,) = frames(400)
    with pytest.raises(DecodeError):
        decode(Encoded(ENTROPY, {**SMALL, "sizes": [stated]}, [frame]))
    assert not decode(Encoded(ENTROPY, {**SMALL, "sizes": [400]}, [frame]))["x"].any()


@given(st.binary(max_size=60), st.integers(-1, 500))
@settings(deadline=None)
def test_damaged_zstd_frames_are_rejected(data, stated):
    try_decode(ENTROPY, {**SMALL, "sizes": [stated]}, [data])
    try_decode(ENTROPY, {**SMALL, "sizes": [stated]}, [frames(400)[0][:20] + data])


# ---- memory


HUGE = [
    "limit@1(0)",
    "limit@1(0) | hadamard@1(16)",
    "limit@1(0) | kashin@1(64, 3, 0.3, 0.5)",
    "limit@1(0) | quantize@1(1, 1048576)",
    "limit@1(0) | hadamard@1(65536) | quantize@1(1, 65536)",
    "limit@1(0) | subsample@1(1e-12)",
    "limit@1(0) | randommask@1(1e-12)",
    "limit@1(0) | topk@1(1e-12)",
    "limit@1(0) | lowrank@1(1)",
    "limit@1(0) | cast@1(float16)",
    "limit@1(0) | entropy@1(3)",
]


@pytest.mark.parametrize("codec", HUGE)
@pytest.mark.parametrize("shape", [[1 << 18], [512, 512], [2, 1 << 17], [1 << 39], [2, 1 << 39]])
def test_decoding_allocates_no_more_than_the_limit(codec, shape):
    """A few bytes encode many values, as some codecs do."""
    meta = {"tensors": [["x", "float32", shape]], "large": [0], "seed": 0, "sizes": [-1] * 2}
    for limit in (0, 1 << 12, 1 << 20, 1 << 22):
        for buffers in ([b""], [bytes(4)], [bytes(4), bytes(4)], [bytes(8), bytes(1 << 15)]):
            tracemalloc.start()
            try_decode(codec, {**meta, "sizes": [-1] * len(buffers)}, buffers, limit)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak <= limit + (1 << 17)


@pytest.mark.parametrize("rank", [100, 4000, 65536])
def test_a_frame_is_not_much_larger_than_its_matrix(rank):
    """Two rows of 65,537: with a rank of 65,536 their frame would be 16 GiB."""
    width = rank + 1
    meta = {"tensors": [["x", "float32", [2, width]]], "large": [0], "seed": 0}
    for size in (2 * rank, 2 * width):
        tracemalloc.start()
        try_decode(f"limit@1(0) | lowrank@1({rank})", meta, [bytes(4 * size)], 1 << 30)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= 100 * 8 * width


@pytest.mark.parametrize("stage", ["subsample", "randommask", "topk"])
def test_more_values_than_can_be_indexed_are_rejected(stage):
    """Their number is the reason, not memory."""
    meta = {"tensors": [["x", "float32", [kernels.MAX_VALUES + 1]]], "large": [0], "seed": 0}
    buffers = [bytes(4)] * (2 if stage == "topk" else 1)
    with pytest.raises(DecodeError, match="values to choose from"):
        decode(Encoded(f"limit@1(0) | {stage}@1(1e-12)", meta, buffers))


@pytest.mark.slow
def test_decoding_time_is_linear_in_the_number_of_tensors():
    """Quadratic time would take minutes and exceed the test's time limit."""
    count = 100_000
    meta = {
        "tensors": [[str(i), "float32", [1]] for i in range(count)],
        "large": list(range(count)),
        "seed": 0,
    }
    encoded = Encoded("limit@1(0) | hadamard@1(64)", meta, [bytes(4 * count)])
    assert len(decode(encoded)) == count
