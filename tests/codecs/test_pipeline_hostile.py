"""Pipelines and hostile messages: nothing but a CodecError is raised."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.codecs.base import Encoded
from fedmq.codecs.errors import DecodeError
from fedmq.codecs.registry import decode, make_codec
from tests.codecs.pipeline_messages import PIPELINES, message, try_decode
from tests.codecs.test_hostile import anything

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


@pytest.mark.parametrize("spec", PIPELINES)
def test_any_value_of_a_meta_field_decodes_or_is_rejected(spec):
    good = message(spec)
    assert try_decode(good.codec, good.meta, good.buffers) is not None
    for key in [*good.meta, "sizes", "large", "seed", "tensors"]:
        rest = {name: each for name, each in good.meta.items() if name != key}
        try_decode(good.codec, rest, good.buffers)
        if key in good.meta:
            assert try_decode(good.codec, rest, good.buffers) is None
        for value in NASTY:
            try_decode(good.codec, {**good.meta, key: value}, good.buffers)


@pytest.mark.slow
@pytest.mark.parametrize("spec", PIPELINES)
def test_any_cell_of_the_table_decodes_or_is_rejected(spec):
    good = message(spec)
    for row in range(4):
        for column in range(3):
            for value in [*NASTY, "float64", "int64", "float32", [0, 5], [5, 0], [6, 11], [1] * 5]:
                table = [list(each) for each in good.meta["tensors"]]
                table[row][column] = value
                for large in (good.meta["large"], [0], [0, 1, 2], [1], []):
                    try_decode(
                        good.codec, {**good.meta, "tensors": table, "large": large}, good.buffers
                    )


@pytest.mark.slow
@pytest.mark.parametrize("spec", PIPELINES)
@pytest.mark.parametrize("shape", [[0], [0, 5], [5, 0], [3, 0, 2], [], [1], [1, 1], [2, 1]])
def test_large_tensors_that_are_tiny_or_empty(spec, shape):
    good = message(spec)
    meta = {"tensors": [["a", "float32", shape]], "large": [0], "seed": 1}
    count = len(make_codec(spec).encode({"a": torch.ones(3, 3)}, 0).buffers)
    for size in (0, 1, 2, 4, 8):
        meta["sizes"] = [-1] * count
        try_decode(good.codec, meta, [bytes(size)] * count)
        try_decode(good.codec, meta, [bytes(8)] * (count - 1) + [bytes(size)])


@pytest.mark.parametrize("spec", PIPELINES)
def test_missing_additional_short_long_and_swapped_buffers(spec):
    good = message(spec)
    buffers = [bytes(each) for each in good.buffers]

    def rejected(these):
        sizes = {"sizes": [-1] * len(these)} if "sizes" in good.meta else {}
        assert try_decode(good.codec, good.meta, these) is None
        assert try_decode(good.codec, {**good.meta, **sizes}, these) is None

    rejected([])
    rejected(buffers[:-1])
    rejected([*buffers, b""])
    rejected([*buffers, bytes(100)])
    rejected(buffers[1:])
    for at, whole in enumerate(buffers):
        rest = (buffers[:at], buffers[at + 1 :])
        for size in {0, 1, len(whole) // 2, len(whole) - 4, len(whole) - 1}:
            if 0 <= size < len(whole):
                cut = [*rest[0], whole[:size], *rest[1]]
                assert try_decode(good.codec, good.meta, cut) is None
        for more in (b"\0", bytes(4), bytes(8), whole):
            long = [*rest[0], whole + more, *rest[1]]
            # Bytes after a zstd frame are ignored.
            if more and good.meta.get("sizes", [-1] * len(buffers))[at] == -1:
                assert try_decode(good.codec, good.meta, long) is None
            else:
                try_decode(good.codec, good.meta, long)
    try_decode(good.codec, good.meta, buffers[::-1])


@pytest.mark.slow
@pytest.mark.parametrize("spec", PIPELINES)
def test_a_flipped_byte_decodes_or_is_rejected(spec):
    good = message(spec)
    buffers = [bytearray(each) for each in good.buffers]
    for buffer in buffers:
        for at in range(0, len(buffer), 1 + len(buffer) // 64):
            for bits in (1, 0x80, 0xFF):
                buffer[at] ^= bits
                try_decode(good.codec, good.meta, buffers)
                buffer[at] ^= bits


@pytest.mark.slow
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
    try_decode(name, good.meta, good.buffers)
    try_decode(name, {**good.meta, **fields}, good.buffers if buffers is None else buffers)


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
        try_decode(name, good.meta, good.buffers)
        try_decode(name, {**good.meta, "sizes": [-1] * len(good.buffers)}, good.buffers)


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
def test_names_that_are_not_pipelines_are_rejected(name):
    good = message(PIPELINES[0])
    with pytest.raises(DecodeError):
        decode(Encoded(name, good.meta, good.buffers))
