"""Damaged and hostile messages raise a CodecError and allocate little memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.codecs.base import Encoded
from fedmq.codecs.errors import CodecError, DecodeError
from fedmq.codecs.raw import DTYPES
from fedmq.codecs.registry import decode

LIMIT = 1 << 16
WIRE_NAMES = ["raw@1", "cast@1(float16)", "cast@1(bfloat16)"]

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)
sizes = st.sampled_from([0, 1, 2, 3, -1, 1 << 20, 1 << 39, 1 << 40, 1 << 63]) | anything
dtypes = st.sampled_from([*sorted(DTYPES), "float8", "object", ""]) | anything
names = st.sampled_from(["a", "b", ""]) | anything
rows = st.tuples(names, dtypes, st.lists(sizes, max_size=3)).map(list) | anything
metas = st.fixed_dictionaries(
    {}, optional={"tensors": st.lists(rows, max_size=4) | anything, "dtypes": anything}
) | st.dictionaries(st.text(max_size=8), anything, max_size=3)


@pytest.mark.slow
@given(st.sampled_from(WIRE_NAMES), metas, st.lists(st.binary(max_size=24), max_size=3))
@settings(deadline=None, max_examples=300)
def test_any_message_raises_nothing_but_a_codec_error(wire_name, meta, buffers):
    try:
        tensors = decode(Encoded(wire_name, meta, buffers), LIMIT)
    except CodecError:
        return
    assert sum(each.nbytes for each in tensors.values()) <= LIMIT


@given(
    st.sampled_from(WIRE_NAMES),
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 3), max_size=3),
    st.binary(max_size=40),
)
@settings(deadline=None)
def test_a_buffer_of_a_wrong_size_is_rejected(wire_name, dtype, shape, data):
    meta = {"tensors": [["a", dtype, shape]], "dtypes": ["float32"]}
    needed = torch.empty(shape, dtype=DTYPES[dtype]).nbytes
    encoded = Encoded(wire_name, meta, [data])
    if len(data) == needed:
        assert decode(encoded, LIMIT)["a"].shape == tuple(shape)
    else:
        with pytest.raises(DecodeError):
            decode(encoded, LIMIT)


@given(st.text(max_size=40) | st.from_regex(r"(raw|cast)@\d+\(.{0,20}\)", fullmatch=True))
@settings(deadline=None)
def test_any_codec_name_raises_nothing_but_a_decode_error(wire_name):
    try:
        decode(Encoded(wire_name, {"tensors": [], "dtypes": []}, []))
    except DecodeError:
        return
    assert wire_name.startswith(("raw@", "cast@"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a", "float32", [-1]], "expected a shape"),
        (["a", "float32", [1 << 40]], "expected a shape"),
        (["a", "float32", [2.0]], "expected a shape"),
        (["a", "float32", [True]], "expected a shape"),
        (["a", "float32", "2"], "expected a shape"),
        (["a", "float32", [1] * 17], "expected a shape"),
        (["a", "float32", [1 << 39]], "at most 65536 bytes"),
        (["a", "float32", [1 << 39, 1 << 39]], "at most 65536 bytes"),
        (["a", "float32", [3]], "has 8 bytes, its tensors need 12"),
        (["a", "float32", [1]], "a buffer has 8 bytes, its tensors need 4"),
        (["a", "float8", [2]], "unknown dtype 'float8'"),
        (["a", ["float32"], [2]], "unknown dtype"),
        ([7, "float32", [2]], "expected a unique tensor name, got 7"),
        (["a", "float32"], r"expected \[name, dtype, shape\]"),
        ({"a": 1}, r"expected \[name, dtype, shape\]"),
    ],
)
def test_each_fault_of_a_table_is_named(row, message):
    with pytest.raises(DecodeError, match=message):
        decode(Encoded("raw@1", {"tensors": [row]}, [bytes(8)]), LIMIT)


def test_a_repeated_tensor_name_is_rejected():
    meta = {"tensors": [["a", "float32", [1]], ["a", "float32", [1]]]}
    with pytest.raises(DecodeError, match="expected a unique tensor name, got 'a'"):
        decode(Encoded("raw@1", meta, [bytes(8)]))


@pytest.mark.parametrize("meta", [{}, {"tensors": None}, {"tensors": {}}, {"tensors": "ab"}])
def test_a_message_without_a_table_is_rejected(meta):
    with pytest.raises(DecodeError, match=r"meta\.tensors"):
        decode(Encoded("raw@1", meta, []))


def test_a_very_long_table_is_rejected():
    with pytest.raises(DecodeError, match=r"meta\.tensors"):
        decode(Encoded("raw@1", {"tensors": [None] * 100_001}, []))


def test_buffers_too_few_or_too_many_are_rejected():
    meta = {"tensors": [["a", "float32", [1]], ["n", "int64", [1]]]}
    with pytest.raises(DecodeError, match="has 0 bytes, its tensors need 8"):
        decode(Encoded("raw@1", meta, [bytes(4)]))
    with pytest.raises(DecodeError, match="expected no more buffers"):
        decode(Encoded("raw@1", meta, [bytes(4), bytes(8), b""]))


def test_a_huge_shape_is_rejected_before_memory_is_allocated():
    """Allocating two terabytes would raise another error or kill the process."""
    meta = {"tensors": [["a", "float32", [1 << 39]]], "dtypes": ["float32"]}
    for wire_name in WIRE_NAMES:
        with pytest.raises(DecodeError):
            decode(Encoded(wire_name, meta, [bytes(8)]))


@pytest.mark.parametrize("shape", [[0, 1 << 39, 1 << 39], [1 << 39, 1 << 39, 0, 1 << 39]])
def test_an_empty_tensor_of_an_impossible_shape_is_rejected(shape):
    """The product of the sizes is 0, but torch cannot compute the strides."""
    with pytest.raises(DecodeError):
        decode(Encoded("raw@1", {"tensors": [["a", "float32", shape]]}, [b""]))


@pytest.mark.parametrize("dtypes", [None, "float32", [], ["float32"] * 2, ["int64"], [["float32"]]])
def test_cast_requires_a_float_dtype_for_each_tensor(dtypes):
    meta = {"tensors": [["a", "float16", [1]]], "dtypes": dtypes}
    with pytest.raises(DecodeError):
        decode(Encoded("cast@1(float16)", meta, [bytes(2)]))


def test_cast_checks_the_widened_size_against_the_limit():
    meta = {"tensors": [["a", "float16", [4]]], "dtypes": ["float64"]}
    encoded = Encoded("cast@1(float16)", meta, [bytes(8)])
    assert decode(encoded, 32)["a"].nbytes == 32
    with pytest.raises(DecodeError, match="at most"):
        decode(encoded, 31)
