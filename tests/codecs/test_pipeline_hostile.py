"""Pipelines trust no message: whatever stands in it, only a CodecError, and little memory."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.codecs import kernels
from fedmq.codecs.base import Encoded
from fedmq.codecs.errors import CodecError, DecodeError
from fedmq.codecs.registry import decode, make_codec
from tests.codecs.test_hostile import anything
from tests.codecs.test_pipeline import SPECS

LIMIT = 1 << 20
PIPELINES = [f"limit(0) | {spec}" for spec in SPECS]
NASTY = [
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    1 << 31,
    1 << 40,
    (1 << 63) - 1,
    1 << 64,
    -(1 << 63),
    1.0,
    float("nan"),
    float("inf"),
    "",
    "x",
    b"\0",
    [],
    {},
    [0],
    [-1],
    [1, 0],
    [0, 0],
    [0, 1, 2, 3, 4],
    [2],
    [1 << 40],
    [None],
    [[0]],
    [-1, -1],
    [1 << 50] * 8,
    [0.5],
    [True],
    {"a": 1},
]


def message(spec, seed=3):
    """Two large tensors, one of integers, and one that a shape leaves empty."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "a": torch.randn(6, 10, generator=generator),
        "e": torch.empty(0, 5),
        "b": torch.randn(37, generator=generator),
        "n": torch.tensor([1, 2]),
    }
    return make_codec(spec).encode(tensors, seed)


def tried(codec, meta, buffers, limit=LIMIT):
    """Decode; return the tensors, or None if it was refused."""
    try:
        tensors = decode(Encoded(codec, meta, buffers), limit)
    except CodecError as error:
        text = str(error)
    else:
        assert sum(each.nbytes for each in tensors.values()) <= limit
        return tensors
    assert "\n" not in text
    assert len(text) < 1000
    return None


@pytest.mark.parametrize("spec", PIPELINES)
def test_every_field_of_meta_may_be_anything(spec):
    good = message(spec)
    assert tried(good.codec, good.meta, good.buffers) is not None
    for key in [*good.meta, "sizes", "large", "seed", "tensors"]:
        rest = {name: each for name, each in good.meta.items() if name != key}
        tried(good.codec, rest, good.buffers)
        if key in good.meta:
            assert tried(good.codec, rest, good.buffers) is None
        for value in NASTY:
            tried(good.codec, {**good.meta, key: value}, good.buffers)


@pytest.mark.parametrize("spec", PIPELINES)
def test_every_cell_of_the_table_may_be_anything(spec):
    good = message(spec)
    for row in range(4):
        for column in range(3):
            for value in [*NASTY, "float64", "int64", "float32", [0, 5], [5, 0], [6, 11], [1] * 5]:
                table = [list(each) for each in good.meta["tensors"]]
                table[row][column] = value
                for large in (good.meta["large"], [0], [0, 1, 2], [1], []):
                    tried(good.codec, {**good.meta, "tensors": table, "large": large}, good.buffers)


@pytest.mark.parametrize("spec", PIPELINES)
@pytest.mark.parametrize("shape", [[0], [0, 5], [5, 0], [3, 0, 2], [], [1], [1, 1], [2, 1]])
def test_large_tensors_that_are_tiny_or_empty(spec, shape):
    good = message(spec)
    meta = {"tensors": [["a", "float32", shape]], "large": [0], "seed": 1}
    count = len(make_codec(spec).encode({"a": torch.ones(3, 3)}, 0).buffers)
    for size in (0, 1, 2, 4, 8):
        meta["sizes"] = [-1] * count
        tried(good.codec, meta, [bytes(size)] * count)
        tried(good.codec, meta, [bytes(8)] * (count - 1) + [bytes(size)])


@pytest.mark.parametrize("spec", PIPELINES)
def test_buffers_too_few_too_many_short_long_or_in_disorder(spec):
    good = message(spec)
    buffers = [bytes(each) for each in good.buffers]

    def refused(these):
        sizes = {"sizes": [-1] * len(these)} if "sizes" in good.meta else {}
        assert tried(good.codec, good.meta, these) is None
        assert tried(good.codec, {**good.meta, **sizes}, these) is None

    refused([])
    refused(buffers[:-1])
    refused([*buffers, b""])
    refused([*buffers, bytes(100)])
    refused(buffers[1:])
    for at, whole in enumerate(buffers):
        rest = (buffers[:at], buffers[at + 1 :])
        for size in {0, 1, len(whole) // 2, len(whole) - 4, len(whole) - 1}:
            if 0 <= size < len(whole):
                cut = [*rest[0], whole[:size], *rest[1]]
                assert tried(good.codec, good.meta, cut) is None
        for more in (b"\0", bytes(4), bytes(8), whole):
            long = [*rest[0], whole + more, *rest[1]]
            # What lies behind a zstd frame is never looked at.
            if more and good.meta.get("sizes", [-1] * len(buffers))[at] == -1:
                assert tried(good.codec, good.meta, long) is None
            else:
                tried(good.codec, good.meta, long)
    tried(good.codec, good.meta, buffers[::-1])


@pytest.mark.parametrize("spec", PIPELINES)
def test_every_byte_may_be_flipped(spec):
    good = message(spec)
    buffers = [bytearray(each) for each in good.buffers]
    for buffer in buffers:
        for at in range(0, len(buffer), 1 + len(buffer) // 64):
            for bits in (1, 0x80, 0xFF):
                buffer[at] ^= bits
                tried(good.codec, good.meta, buffers)
                buffer[at] ^= bits


@given(
    st.sampled_from(PIPELINES),
    st.sampled_from(PIPELINES),
    st.fixed_dictionaries(
        {},
        optional={"large": anything, "seed": anything, "sizes": anything, "tensors": anything},
    ),
    st.lists(st.binary(max_size=40), max_size=4) | st.none(),
)
@settings(deadline=None, max_examples=300)
def test_messages_under_other_names_and_with_other_fields(spec, other, fields, buffers):
    good, name = message(spec), message(other).codec
    tried(name, good.meta, good.buffers)
    tried(name, {**good.meta, **fields}, good.buffers if buffers is None else buffers)


@pytest.mark.parametrize(
    "name",
    [
        "limit@1(0) | hadamard@1(32)",
        "limit@1(0) | hadamard@1(65536) | quantize@1(4, 65536)",
        "limit@1(0) | kashin@1(2, 3, 0.3, 0.5)",
        "limit@1(0) | kashin@1(65536, 100, 1e-300, 1e-300) | quantize@1(8, 65536)",
        "limit@1(0) | subsample@1(1e-300)",
        "limit@1(0) | randommask@1(5e-324) | quantize@1(1, 1048576)",
        "limit@1(0) | topk@1(1e-9) | quantize@1(8, 1)",
        "limit@1(0) | lowrank@1(65536)",
        "limit@1(0) | lowrank@1(9) | topk@1(0.5)",
        "limit@1(1099511627776) | quantize@1(1, 1)",
        "entropy@1(19)",
        "identity@1 | entropy@1(1)",
    ],
)
def test_parameters_that_do_not_fit_the_bytes(name):
    for spec in PIPELINES:
        good = message(spec)
        tried(name, good.meta, good.buffers)
        tried(name, {**good.meta, "sizes": [-1] * len(good.buffers)}, good.buffers)


@pytest.mark.parametrize(
    "name",
    [
        "hadamard@1(3)",
        "hadamard@2(4)",
        "hadamard(4) | quantize@1(4)",
        "quantize@1(4) | hadamard@1(4)",
        "quantize@1(0, 4)",
        "quantize@1(4, 16777216)",
        "quantize@1",
        "limit@1 | quantize@1(4)",
        "limit@1(-1) | quantize@1(4)",
        "raw@1 | quantize@1(4)",
        "cast@1(float16) | cast@1(float16)",
        "topk@1(2)",
        "topk@1(nan)",
        "lowrank@1(0)",
        "entropy@1(3) | entropy@1(3)",
        "pipeline@1",
        "quantize@1(4) |",
        "| quantize@1(4)",
        "quantize@1(4) | " * 70 + "entropy@1(3)",
        "quantize@1('|')",
        "quantize@1(__import__)",
        "quantize@1(9**9**9)",
    ],
)
def test_names_that_are_no_pipeline_are_refused(name):
    good = message(PIPELINES[0])
    with pytest.raises(DecodeError):
        decode(Encoded(name, good.meta, good.buffers))


# ---- single stages


@pytest.mark.parametrize(
    "places",
    [
        [5, 0],  # one place twice
        [0, 1, 0],
        [100, 1],  # behind the end
        [0, 100],
        [2**32 - 1, 1],
        [2**32 - 1, 2**32 - 1],  # it does not come round again
        [99, 1],
    ],
)
def test_places_out_of_order_or_range_are_refused(places):
    spec = f"topk@1({len(places) / 100!r})"
    meta = {"tensors": [["x", "float32", [100]]], "large": [0], "seed": 0}
    steps, values = np.array(places, np.uint32), np.ones(len(places), np.float32)
    with pytest.raises(DecodeError, match="places in order"):
        decode(Encoded(f"limit@1(0) | {spec}", meta, [steps.tobytes(), values.tobytes()]))


def test_places_at_both_ends_are_taken():
    meta = {"tensors": [["x", "float32", [100]]], "large": [0], "seed": 0}
    steps, values = np.array([0, 99], np.uint32), np.array([1, 2], np.float32)
    found = decode(Encoded("limit@1(0) | topk@1(0.02)", meta, [steps.tobytes(), values.tobytes()]))
    assert (found["x"][0], found["x"][99], found["x"].sum()) == (1, 2, 3)


@pytest.mark.parametrize("basis", ["", "hadamard(16) | ", "hadamard(8) | ", "kashin(16) | "])
@pytest.mark.parametrize("low", [0.0, 1.0, math.nan, math.inf, -math.inf, 3.4e38])
@pytest.mark.parametrize("high", [0.5, math.nan, math.inf, -math.inf, -3.4e38])
def test_ranges_that_are_none_are_refused(basis, low, high):
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


def test_bytes_at_odd_addresses_are_read_as_any():
    for spec in PIPELINES:
        good = message(spec)
        shifted = [memoryview(b"\0" + bytes(each))[1:] for each in good.buffers]
        one, other = decode(good), decode(Encoded(good.codec, good.meta, shifted))
        assert all(torch.equal(one[name], other[name]) for name in one)


# ---- zstd


def frames(size, count=1, *, window=False):
    if window:
        parameters = zstandard.ZstdCompressionParameters(window_log=27)
        compressor = zstandard.ZstdCompressor(compression_params=parameters)
    else:
        compressor = zstandard.ZstdCompressor()
    return [compressor.compress(bytes(size))] * count


def peak_of(codec, meta, buffers, limit):
    """Return the most memory that Python took while a message was refused."""
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            decode(Encoded(codec, meta, buffers), limit)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


SMALL = {"tensors": [["x", "float32", [100]]], "large": [0], "seed": 0}
ENTROPY = "limit@1(0) | entropy@1(3)"


@pytest.mark.parametrize("said", [400, 4000, 7000, 1 << 20, 1 << 26, 1 << 40, 0, 1])
@pytest.mark.parametrize("window", [False, True])
def test_a_bomb_takes_no_memory(said, window):
    (bomb,) = frames(1 << 26, window=window)
    assert len(bomb) < 1 << 14
    assert peak_of(ENTROPY, {**SMALL, "sizes": [said]}, [bomb], 1 << 30) < 1 << 18


def test_many_small_bombs_are_one_large_one():
    """Each within what a message of this size may need, all of them 64 MiB."""
    count = 16384
    buffers = frames(4096, count)
    meta = {**SMALL, "sizes": [4096] * count}
    assert peak_of(ENTROPY, meta, buffers, 1 << 30) < 1 << 20


@pytest.mark.parametrize("said", [399, 401, 0, -1, -2, 400.0, "400", None, 1 << 64])
def test_sizes_that_lie_are_refused(said):
    (frame,) = frames(400)
    with pytest.raises(DecodeError):
        decode(Encoded(ENTROPY, {**SMALL, "sizes": [said]}, [frame]))
    assert not decode(Encoded(ENTROPY, {**SMALL, "sizes": [400]}, [frame]))["x"].any()


@given(st.binary(max_size=60), st.integers(-1, 500))
@settings(deadline=None)
def test_what_is_no_zstd_is_refused(data, said):
    tried(ENTROPY, {**SMALL, "sizes": [said]}, [data])
    tried(ENTROPY, {**SMALL, "sizes": [said]}, [frames(400)[0][:20] + data])


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
def test_no_more_is_taken_than_the_limit_allows(codec, shape):
    """One value stands for many: of some codecs, that is what they are for."""
    meta = {"tensors": [["x", "float32", shape]], "large": [0], "seed": 0, "sizes": [-1] * 2}
    for limit in (0, 1 << 12, 1 << 20, 1 << 22):
        for buffers in ([b""], [bytes(4)], [bytes(4), bytes(4)], [bytes(8), bytes(1 << 15)]):
            tracemalloc.start()
            tried(codec, {**meta, "sizes": [-1] * len(buffers)}, buffers, limit)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak <= limit + (1 << 17)


@pytest.mark.parametrize("rank", [100, 4000, 65536])
def test_a_frame_is_not_larger_than_what_it_is_for(rank):
    """Two rows of 65,537: with a rank of 65,536 their frame would be 16 GiB."""
    width = rank + 1
    meta = {"tensors": [["x", "float32", [2, width]]], "large": [0], "seed": 0}
    for size in (2 * rank, 2 * width):
        tracemalloc.start()
        tried(f"limit@1(0) | lowrank@1({rank})", meta, [bytes(4 * size)], 1 << 30)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= 100 * 8 * width


@pytest.mark.parametrize("stage", ["subsample", "randommask", "topk"])
def test_more_values_than_can_be_chosen_from_are_refused(stage):
    """Their number, and not memory, is what ends it."""
    meta = {"tensors": [["x", "float32", [kernels.MAX_VALUES + 1]]], "large": [0], "seed": 0}
    buffers = [bytes(4)] * (2 if stage == "topk" else 1)
    with pytest.raises(DecodeError, match="values to choose from"):
        decode(Encoded(f"limit@1(0) | {stage}@1(1e-12)", meta, buffers))


def test_a_hundred_thousand_tensors_take_no_more_time_than_they_need():
    """Quadratic, it would be minutes; no clock, the test's own time limit tells."""
    count = 100_000
    meta = {
        "tensors": [[str(i), "float32", [1]] for i in range(count)],
        "large": list(range(count)),
        "seed": 0,
    }
    encoded = Encoded("limit@1(0) | hadamard@1(64)", meta, [bytes(4 * count)])
    assert len(decode(encoded)) == count
