"""Feature maps by sample: decoders reject invalid messages."""

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.codecs.base import Encoded
from fedmq.codecs.errors import DecodeError
from fedmq.codecs.features import Features
from tests.codecs.decoding import INVALID_GRIDS, received, rejected
from tests.codecs.feature_messages import DTYPES, HONEST, LIMIT, group


def honest(dtype, pack):
    x = torch.zeros(3, 2, 3, 5)
    x[1, 0, 1] = torch.tensor([1.0, -2, 3, 0, 7])
    ids, labels = torch.tensor([9, 2, 400]), torch.tensor([1, 0, 1])
    return received(Features(dtype, pack).encode(group(x, ids, labels), 0))


@pytest.mark.parametrize(("dtype", "pack"), HONEST)
def test_each_truncated_or_longer_buffer_is_rejected(dtype, pack):
    codec, encoded = Features(dtype, pack), honest(dtype, pack)
    for which, whole in enumerate(encoded.buffers):
        lengths = {*range(min(len(whole), 40)), *range(max(0, len(whole) - 40), len(whole))}
        others = [whole[:length] for length in sorted(lengths)]
        for other in [*others, whole + b"\0", whole + whole]:
            buffers = [other if i == which else each for i, each in enumerate(encoded.buffers)]
            with pytest.raises(DecodeError):
                codec.decode(Encoded(encoded.codec, encoded.meta, buffers), LIMIT)
    for buffers in ([], encoded.buffers[:1], [*encoded.buffers, b""]):
        with pytest.raises(DecodeError, match="expected 2 buffers"):
            codec.decode(Encoded(encoded.codec, encoded.meta, buffers), LIMIT)


WRONG = [None, True, -1, 0, 1.5, "x", b"x", [], {}, [-1], 2**63, 2**64, [2**39] * 4, {"width": 1}]
PATHS = [
    ("shape",), ("ids",), ("labels",), ("zstd",),
    *((name, key) for name in ("ids", "labels") for key in ("width", "base", "rising")),
    *(("shape", i) for i in range(4)),
]  # fmt: skip


def replaced(meta, path, value):
    """Return a copy of meta with another value at a path."""
    if not path:
        return value
    copy = list(meta) if isinstance(meta, list) else dict(meta)
    copy[path[0]] = replaced(meta[path[0]], path[1:], value)
    return copy


@pytest.mark.parametrize(("dtype", "pack"), HONEST)
@pytest.mark.parametrize("path", PATHS)
def test_each_mutated_field_is_rejected_or_read_within_bounds(dtype, pack, path):
    codec, encoded = Features(dtype, pack), honest(dtype, pack)
    for value in [*WRONG, [3, 2**31, 2**31], [3, 0, 5], [2**31, 1]]:
        meta = replaced(encoded.meta, path, value)
        try:
            arrived = codec.decode(Encoded(encoded.codec, meta, encoded.buffers), LIMIT)
        except DecodeError:
            continue
        # Only a consistent change passes: another base, or the same flag.
        assert path[-1] in {"base", "zstd", "rising"}, (path, value)
        assert arrived["features"].shape == (3, 2, 3, 5)


@pytest.mark.parametrize("path", [path for path in PATHS if isinstance(path[-1], str)])
def test_each_missing_field_is_rejected(path):
    encoded = honest("int8", "zstd")
    meta = dict(encoded.meta)
    inner = meta
    for key in path[:-1]:
        inner[key] = dict(inner[key])
        inner = inner[key]
    del inner[path[-1]]
    with pytest.raises(DecodeError):
        Features("int8", "zstd").decode(Encoded(encoded.codec, meta, encoded.buffers), LIMIT)


@pytest.mark.slow
@given(st.sampled_from(HONEST), st.integers(0, 1), st.data())
@settings(deadline=None, max_examples=300)
def test_a_flipped_bit_raises_nothing_but_a_decode_error(kind, which, data):
    codec, encoded = Features(*kind), honest(*kind)
    buffers = [bytearray(each) for each in encoded.buffers]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(buffers[which]) - 1))
        buffers[which][place] ^= data.draw(st.integers(1, 255))
    try:
        arrived = codec.decode(Encoded(encoded.codec, encoded.meta, buffers), LIMIT)
    except DecodeError:
        return
    assert bool(arrived["features"].isfinite().all())
    assert arrived["ids"].unique().numel() == 3


def meta_of(shape, *, packed=False, **more):
    ids = {"width": 0, "base": 0, "rising": True}
    return {"shape": shape, "ids": ids, "labels": None, "zstd": packed, **more}


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_shapes_are_rejected_before_memory_is_allocated(dtype):
    codec = Features(dtype)
    for shape in ([1 << 30, 1 << 9], [1, 1 << 39], [(1 << 31) - 1, 1, 8, 8]):
        rejected(codec, meta_of(shape), [b"", bytes(64)], "bytes|as .n", limit=1 << 50)
        rejected(codec, meta_of(shape, packed=True), [b"", bytes(64)], "zstd|bytes", limit=1 << 50)
    rejected(codec, meta_of([1 << 10, 1 << 10]), [b"", b""], "at most 4096 bytes", limit=4096)


def test_the_memory_limit_is_checked_first():
    codec = Features("float16", "none")
    encoded = received(codec.encode(group(torch.zeros(10, 100)), 0))
    need = 10 * (100 * (4 + 2) + 4 * 8) + 8 * 100
    assert codec.decode(encoded, need)["features"].shape == (10, 100)
    with pytest.raises(DecodeError, match=f"at most {need - 1} bytes to decode, got {need}"):
        codec.decode(encoded, need - 1)


def test_zstd_bombs_are_rejected_without_allocating_their_size():
    codec = Features("int8", "zstd")
    head = bytes(4) + np.float32(1).tobytes()
    bomb = zstandard.ZstdCompressor(level=3).compress(bytes(1 << 26))
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 26))
    meta = meta_of([1, 1, 1, 16], packed=True)
    rejected(codec, meta, [head, bomb], "states 67108864 bytes, its shape needs 16")
    rejected(codec, meta, [head, silent], "states -1 bytes")
    # A wrong header: it states 16 bytes, and 64 MiB follow.
    size = zstandard.frame_header_size(silent)
    single = bytes([*b"\x28\xb5\x2f\xfd", 0x20, 16])
    rejected(codec, meta, [head, single + silent[size:]], "cannot read the zstd frame")
    big = meta_of([1, 1, 1, 1 << 30], packed=True)
    rejected(codec, big, [head, bomb[:20]], "20 bytes cannot be the zstd frame of 1073741824")


@pytest.mark.parametrize(
    ("low", "step"),
    INVALID_GRIDS,
)
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_grids_that_give_no_finite_values_are_rejected(dtype, low, step):
    head = np.array([low, step], "<f4").tobytes()
    rejected(Features(dtype), meta_of([1, 1]), [head, b"\1"], "finite scales and minima")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_rejected(dtype, value):
    data = torch.tensor([1.0, value], dtype=getattr(torch, dtype)).view(torch.uint8).numpy()
    rejected(Features(dtype), meta_of([2, 1]), [b"", data.tobytes()], "expected finite features")


def test_repeated_ids_are_rejected():
    ids = {"width": 1, "base": 4, "rising": False}
    meta = meta_of([3, 1], ids=ids)
    rejected(Features(), meta, [b"\3\0\3", bytes(6)], "expected each id once, got 7 twice")


@pytest.mark.parametrize("rising", [True, False])
def test_ids_beyond_int64_are_rejected(rising):
    meta = meta_of([2, 1], ids={"width": 1, "base": 2**63 - 2, "rising": rising})
    rejected(Features(), meta, [b"\0\7", bytes(4)], "ids do not fit int64")


def test_a_bit_after_the_last_code_is_rejected():
    head = np.array([0, 1], "<f4").tobytes()
    rejected(Features("int4"), meta_of([1, 1]), [head, b"\x10"], "expected 0 in the half byte")


@pytest.mark.slow
@given(
    st.sampled_from(HONEST),
    st.dictionaries(
        st.sampled_from(["shape", "ids", "labels", "zstd"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.dictionaries(st.sampled_from(["width", "base", "rising"]), inner, max_size=3)
            ),
            max_leaves=8,
        ),
    ),
    st.lists(st.binary(max_size=24), max_size=3),
)
@settings(deadline=None, max_examples=200)
def test_any_message_raises_nothing_but_a_decode_error(kind, meta, buffers):
    codec = Features(*kind)
    whole = {**meta_of([1, 1]), **meta}
    try:
        arrived = codec.decode(Encoded(codec.wire_name, whole, buffers), LIMIT)
    except DecodeError:
        return
    assert sum(each.nbytes for each in arrived.values()) <= LIMIT
