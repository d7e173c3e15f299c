"""Feature maps by sample: what comes back, how far off, and what a decoder refuses."""

import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.algorithms.problems.datasets import load_dataset
from fedmq.algorithms.problems.models import cnn_mnist
from fedmq.codecs.base import Encoded
from fedmq.codecs.errors import CodecError, DecodeError, SpecError
from fedmq.codecs.features import Features
from fedmq.codecs.spec import build

DTYPES = ["float32", "float16", "bfloat16", "int8", "int4"]
PACKS = ["none", "zstd"]
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative, at most
HONEST = [(dtype, pack) for dtype in DTYPES for pack in PACKS]
LEVELS = {"int8": 255, "int4": 15}
LIMIT = 1 << 20
TINY = torch.finfo(torch.float32).tiny


def sent(encoded):
    """Return what the other end of a wire holds: the same bytes in memory of its own."""
    return Encoded(encoded.codec, encoded.meta, [bytes(each) for each in encoded.buffers])


def through(codec, tensors, limit=LIMIT):
    return codec.decode(sent(codec.encode(tensors, 0)), limit)


def group(features, ids=None, labels=None):
    """Return the tensors of one message, with ids 0, 1, ... unless others are given."""
    n = features.shape[0]
    found = {"features": features, "ids": torch.arange(n) if ids is None else ids}
    return found if labels is None else {**found, "labels": labels}


def check_bounds(dtype, given_features, arrived):
    """Assert that each value is as near as the codec's docstring says, and zeros are zeros."""
    if not given_features.numel():
        return
    x, y = given_features.double(), arrived.double()
    assert bool((arrived[given_features == 0] == 0).all())
    if dtype in ROUNDING:
        smallest = 2.0**-24 if dtype == "float16" else 2.0**-133  # a step of its subnormals
        assert bool(((x - y).abs() <= ROUNDING[dtype] * x.abs() + smallest).all())
        return
    dims = (0, *range(2, x.ndim))
    least, most = x.amin(dim=dims, keepdim=True), x.amax(dim=dims, keepdim=True)
    step = ((most - least) / LEVELS[dtype]).clamp_min(TINY)
    slack = 2e-5 * step + 2.0**-22 * torch.maximum(least.abs(), most.abs())
    assert bool(((x - y).abs() <= step / 2 + slack).all())


floats = st.one_of(
    st.floats(-8, 8, width=32),
    st.sampled_from([0.0, 0.0, 1e-40, -1e-40, 1e-30, 6e4, -6e4]),
)
int64s = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 300)


@st.composite
def messages(draw, values=floats):
    n = draw(st.integers(0, 5))
    shape = [n, *draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))]
    count = int(np.prod(shape))
    flat = draw(st.lists(values, min_size=count, max_size=count))
    ids = draw(
        st.lists(int64s, min_size=n, max_size=n, unique=True)
        | st.integers(0, 1000).map(lambda first: list(range(first, first + n)))
        | st.lists(st.integers(0, 70000), min_size=n, max_size=n, unique=True).map(sorted)
    )
    labels = draw(st.none() | st.lists(int64s, min_size=n, max_size=n))
    return group(
        torch.tensor(flat, dtype=torch.float32).view(shape),
        torch.tensor(ids, dtype=torch.int64),
        None if labels is None else torch.tensor(labels, dtype=torch.int64),
    )


@given(messages(), st.sampled_from(DTYPES), st.sampled_from(PACKS))
@settings(deadline=None, max_examples=150)
def test_names_shapes_dtypes_ids_and_labels_come_back_and_values_nearly(tensors, dtype, pack):
    arrived = through(Features(dtype, pack), tensors)
    assert list(arrived) == list(tensors)
    for name, tensor in tensors.items():
        assert (arrived[name].shape, arrived[name].dtype) == (tensor.shape, tensor.dtype)
    for name in arrived.keys() - {"features"}:
        assert torch.equal(arrived[name], tensors[name])
    check_bounds(dtype, tensors["features"], arrived["features"])


@given(messages(st.floats(-(2.0**126), 2.0**126, width=32)), st.sampled_from(["int8", "int4"]))
@settings(deadline=None)
def test_grids_hold_from_the_smallest_to_the_largest_values(tensors, dtype):
    check_bounds(dtype, tensors["features"], through(Features(dtype), tensors)["features"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3), (0, 1, 2, 2), (1, 1), (3, 1, 1, 1), (2, 3, 5, 7)])
@pytest.mark.parametrize("pack", PACKS)
def test_empty_single_and_odd_shapes_come_back(dtype, shape, pack):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()
    arrived = through(Features(dtype, pack), group(x))["features"]
    assert arrived.shape == shape
    check_bounds(dtype, x, arrived)


def test_a_batch_of_many_blocks_comes_back():
    x = torch.randn((30, 1, 77, 91), generator=torch.Generator().manual_seed(1))
    for dtype in DTYPES:
        arrived = through(Features(dtype), group(x), 1 << 22)["features"]
        check_bounds(dtype, x, arrived)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_each_channel_has_its_own_grid(dtype):
    x = torch.stack([torch.linspace(0, 1e-3, 50), torch.linspace(-1e3, 1e3, 50)], dim=1)
    error = (through(Features(dtype), group(x))["features"] - x).abs().amax(dim=0)
    assert error[0] <= 0.51e-3 / LEVELS[dtype]
    assert error[1] <= 1.01e3 / LEVELS[dtype]


def test_a_channel_far_from_zero_uses_all_its_codes():
    x = torch.linspace(10, 11, 256).view(-1, 1)
    assert through(Features("int8"), group(x))["features"].unique().numel() == 256


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("value", [0.0, 0.3, -7.0, 1e-40])
def test_a_constant_channel_comes_back_exactly(dtype, value):
    x = torch.full((4, 2, 3), value)
    arrived = through(Features(dtype), group(x))["features"]
    assert torch.equal(arrived, x) or value == 1e-40  # within half the smallest step
    assert bool(((arrived - x).abs() <= TINY).all())


def test_ties_go_to_the_even_code_and_the_bytes_do_not_depend_on_the_seed():
    x = torch.tensor([[0.0], [255.0], [0.5], [1.5], [2.5]])
    codec = Features("int8", "none")
    assert bytes(codec.encode(group(x), 0).buffers[1]) == bytes([0, 255, 0, 2, 2])
    assert sent(codec.encode(group(x), 1)) == sent(codec.encode(group(x), 0))


def test_four_bits_stand_two_to_a_byte_and_each_sample_starts_one():
    x = torch.tensor([[[1.0, 2, 3]], [[15, 0, 4]]])
    encoded = Features("int4", "none").encode(group(x), 0)
    assert bytes(encoded.buffers[1]).hex() == "2103" + "0f04"


def test_channels_last_memory_and_gradients_do_not_matter():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    codec = Features("float32")
    arrived = through(codec, group(x.to(memory_format=torch.channels_last)))
    assert torch.equal(arrived["features"], x.detach())
    assert not arrived["features"].requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_writes_the_bytes_that_a_cpu_writes(dtype):
    x = torch.randn((64, 3, 9, 9), generator=torch.Generator().manual_seed(2)).relu()
    tensors = group(x, labels=torch.arange(64) % 10)
    there = {name: each.cuda() for name, each in tensors.items()}
    codec = Features(dtype)
    assert sent(codec.encode(there, 0)) == sent(codec.encode(tensors, 0))


# What travels beside the values


@pytest.mark.parametrize(
    ("ids", "width", "rising"),
    [
        ([], 0, False),
        ([7], 0, False),
        ([7, 8, 9], 0, True),
        ([9, 7, 8], 1, False),
        ([0, 255, 300], 1, True),
        ([0, 300, 5], 2, False),
        ([-5, 70000, 1 << 31], 4, False),
        ([5, 1 << 31, 70000], 4, False),
        ([0, 1 << 40, 1], 8, False),
        ([-(2**63), 2**63 - 1], 8, False),
        ([0, 1 << 33, 1 << 34], 8, False),
        ([0, 1 << 31, (1 << 32) + 5], 4, True),
        ([2**63 - 3, 2**63 - 1], 1, False),
        ([-(2**63), -(2**63) + 1], 0, True),
    ],
)
def test_ids_take_the_fewest_bytes(ids, width, rising):
    ids = torch.tensor(ids, dtype=torch.int64)
    encoded = Features("float16", "none").encode(group(torch.zeros(len(ids), 1), ids), 0)
    assert (encoded.meta["ids"]["width"], encoded.meta["ids"]["rising"]) == (width, rising)
    assert memoryview(encoded.buffers[0]).nbytes == width * len(ids)
    assert torch.equal(Features().decode(sent(encoded), LIMIT)["ids"], ids)


def test_a_label_takes_a_byte():
    x = torch.zeros(200, 1)
    labels = torch.arange(200) % 10
    encoded = Features("float16", "none").encode(group(x, labels=labels), 0)
    assert memoryview(encoded.buffers[0]).nbytes == 200
    assert "labels" not in through(Features(), group(x))


def test_zstd_is_kept_only_where_it_saves_bytes():
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand((8, 4, 8, 8), generator=generator)
    dense = Features("int8").encode(group(noise), 0)
    sparse = Features("int8").encode(group((noise - 0.6).relu()), 0)
    assert dense.meta["zstd"] is False
    assert dense.nbytes == Features("int8", "none").encode(group(noise), 0).nbytes
    assert sparse.meta["zstd"] is True
    assert sparse.nbytes < 0.7 * dense.nbytes


def test_the_first_block_of_a_cnn_over_digits_travels_in_a_fraction_of_its_bytes():
    """Untrained weights; docs/codecs.md has the figures of trained ones."""
    torch.manual_seed(0)
    data = load_dataset("mnist-mini")
    images = data.normalise(data.x_test[:128])
    with torch.no_grad():
        maps = cnn_mnist((1, 28, 28), 10)[:3](images)  # conv1, pool1, relu1: [128, 10, 12, 12]
    assert 0.2 < (maps == 0).float().mean() < 0.8
    plain = maps.nbytes
    smaller = {dtype: plain / Features(dtype).encode(group(maps), 0).nbytes for dtype in DTYPES}
    assert smaller["float16"] > 3
    assert smaller["int8"] > 6
    assert smaller["int4"] > 11


# Names


@pytest.mark.parametrize(("dtype", "pack"), HONEST)
def test_the_wire_name_is_a_spec_again(dtype, pack):
    codec = Features(dtype, pack)
    assert codec.wire_name == f"features@1({dtype}, {pack})"
    again = build("features" + codec.parameters(), {"features": Features}, "codec")
    assert (again.dtype, again.pack) == (dtype, pack)
    assert again.wire_name == codec.wire_name


def test_the_spec_may_name_its_parameters_or_none():
    assert build("features", {"features": Features}, "codec").wire_name == (
        "features@1(float16, zstd)"
    )
    spec = "features(dtype=int4, pack=none)"
    assert build(spec, {"features": Features}, "codec").wire_name == "features@1(int4, none)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("(float8)", "dtype must be float32, float16, bfloat16, int8 or int4, got 'float8'"),
        ("(8)", "dtype must be .* got 8"),
        ("(int8, gzip)", "pack must be zstd or none, got 'gzip'"),
        ("(int8, none, 3)", "too many positional"),
    ],
)
def test_other_parameters_are_refused_with_the_choices(arguments, message):
    with pytest.raises(SpecError, match=message):
        build("features" + arguments, {"features": Features}, "codec")


# What cannot be sent


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("float32", float("nan"), "features of sample 12 hold nan; float32 takes finite values"),
        ("int8", float("nan"), "features of sample 12 hold nan"),
        ("bfloat16", float("-inf"), "features of sample 12 hold -inf"),
        ("int4", float("inf"), "features of sample 12 hold inf"),
        ("float16", 65520.0, "12 hold 65520; float16 takes finite values up to 65519.996"),
        ("float16", -1e5, "features of sample 12 hold -100000"),
        ("bfloat16", 3.4e38, "features of sample 12 hold 3.4e\\+38"),
        ("int8", 1e38, "features of sample 12 hold 1e\\+38; int8 takes finite values up to 8.5"),
    ],
)
def test_values_that_a_dtype_does_not_take_are_named(dtype, value, message):
    x = torch.ones(3, 2, 2, 2)
    x[1, 1, 0, 1] = value
    with pytest.raises(CodecError, match=message):
        Features(dtype).encode(group(x, torch.tensor([5, 12, 7])), 0)


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 65519.0), ("bfloat16", 3.39e38), ("int8", 2.0**126)]
)
def test_the_largest_values_are_still_taken(dtype, value):
    x = torch.tensor([[value], [-value]])
    assert bool(through(Features(dtype), group(x))["features"].isfinite().all())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "expected features, ids and perhaps labels, got"),
        ({"features": torch.zeros(1, 1)}, "expected features, ids and perhaps labels"),
        ({**group(torch.zeros(1, 1)), "x": torch.zeros(1)}, "got .'features', 'ids', 'x'"),
        (group(torch.zeros(2, 1).double()), "features as float32 .* got torch.float64 .2, 1."),
        (group(torch.zeros(2)), "of 2 to 4 sizes"),
        (group(torch.zeros(2, 1, 1, 1, 1)), "of 2 to 4 sizes"),
        (group(torch.zeros(2, 0)), "none but n 0"),
        (group(torch.zeros(2, 1), torch.zeros(2)), "ids as int64 .2., got torch.float32 .2."),
        (group(torch.zeros(2, 1), torch.arange(3)), "ids as int64 .2., got torch.int64 .3."),
        (group(torch.zeros(2, 1), labels=torch.arange(3)), "labels as int64 .2."),
        (group(torch.zeros(3, 1), torch.tensor([4, 1, 4])), "id 4 stands twice"),
    ],
)
def test_other_tensors_are_refused(tensors, message):
    with pytest.raises(CodecError, match=message):
        Features().encode(tensors, 0)


# What a decoder refuses


def honest(dtype, pack):
    x = torch.zeros(3, 2, 3, 5)
    x[1, 0, 1] = torch.tensor([1.0, -2, 3, 0, 7])
    ids, labels = torch.tensor([9, 2, 400]), torch.tensor([1, 0, 1])
    return sent(Features(dtype, pack).encode(group(x, ids, labels), 0))


@pytest.mark.parametrize(("dtype", "pack"), HONEST)
def test_each_truncated_or_longer_buffer_is_refused(dtype, pack):
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
def test_each_mutated_field_is_refused_or_read_within_bounds(dtype, pack, path):
    codec, encoded = Features(dtype, pack), honest(dtype, pack)
    for value in [*WRONG, [3, 2**31, 2**31], [3, 0, 5], [2**31, 1]]:
        meta = replaced(encoded.meta, path, value)
        try:
            arrived = codec.decode(Encoded(encoded.codec, meta, encoded.buffers), LIMIT)
        except DecodeError:
            continue
        # Only what is sound in itself passes: another base, or the flag as it was.
        assert path[-1] in {"base", "zstd", "rising"}, (path, value)
        assert arrived["features"].shape == (3, 2, 3, 5)


@pytest.mark.parametrize("path", [path for path in PATHS if isinstance(path[-1], str)])
def test_each_missing_field_is_refused(path):
    encoded = honest("int8", "zstd")
    meta = dict(encoded.meta)
    inner = meta
    for key in path[:-1]:
        inner[key] = dict(inner[key])
        inner = inner[key]
    del inner[path[-1]]
    with pytest.raises(DecodeError):
        Features("int8", "zstd").decode(Encoded(encoded.codec, meta, encoded.buffers), LIMIT)


@given(st.sampled_from(HONEST), st.integers(0, 1), st.data())
@settings(deadline=None, max_examples=300)
def test_whatever_bit_turns_only_a_decode_error_comes_of_it(kind, which, data):
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_shapes_are_refused_before_memory_is_taken(dtype):
    codec = Features(dtype)
    for shape in ([1 << 30, 1 << 9], [1, 1 << 39], [(1 << 31) - 1, 1, 8, 8]):
        refused(codec, meta_of(shape), [b"", bytes(64)], "bytes|as .n", limit=1 << 50)
        refused(codec, meta_of(shape, packed=True), [b"", bytes(64)], "zstd|bytes", limit=1 << 50)
    refused(codec, meta_of([1 << 10, 1 << 10]), [b"", b""], "at most 4096 bytes", limit=4096)


def test_what_is_taken_is_counted_before():
    codec = Features("float16", "none")
    encoded = sent(codec.encode(group(torch.zeros(10, 100)), 0))
    need = 10 * (100 * (4 + 2) + 4 * 8) + 8 * 100
    assert codec.decode(encoded, need)["features"].shape == (10, 100)
    with pytest.raises(DecodeError, match=f"at most {need - 1} bytes to decode, got {need}"):
        codec.decode(encoded, need - 1)


def test_zstd_bombs_are_refused_in_no_memory():
    codec = Features("int8", "zstd")
    head = bytes(4) + np.float32(1).tobytes()
    bomb = zstandard.ZstdCompressor(level=3).compress(bytes(1 << 26))
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 26))
    meta = meta_of([1, 1, 1, 16], packed=True)
    refused(codec, meta, [head, bomb], "states 67108864 bytes, its shape needs 16")
    refused(codec, meta, [head, silent], "states -1 bytes")
    # A header that lies: 16 bytes are stated, and 64 MiB follow.
    size = zstandard.frame_header_size(silent)
    single = bytes([*b"\x28\xb5\x2f\xfd", 0x20, 16])
    refused(codec, meta, [head, single + silent[size:]], "cannot read the zstd frame")
    big = meta_of([1, 1, 1, 1 << 30], packed=True)
    refused(codec, big, [head, bomb[:20]], "20 bytes cannot be the zstd frame of 1073741824")


@pytest.mark.parametrize(
    ("low", "step"),
    [
        (float("nan"), 1.0),
        (0.0, float("nan")),
        (float("-inf"), 1.0),
        (0.0, float("inf")),
        (0.0, 0.0),
        (0.0, -1.0),
        (3e38, 1e36),
        (0.0, 1e38),
    ],
)
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_grids_that_give_no_finite_values_are_refused(dtype, low, step):
    head = np.array([low, step], "<f4").tobytes()
    refused(Features(dtype), meta_of([1, 1]), [head, b"\1"], "finite scales and minima")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(dtype, value):
    data = torch.tensor([1.0, value], dtype=getattr(torch, dtype)).view(torch.uint8).numpy()
    refused(Features(dtype), meta_of([2, 1]), [b"", data.tobytes()], "expected finite features")


def test_repeated_ids_are_refused():
    ids = {"width": 1, "base": 4, "rising": False}
    meta = meta_of([3, 1], ids=ids)
    refused(Features(), meta, [b"\3\0\3", bytes(6)], "expected ids of samples, got 7 twice")


@pytest.mark.parametrize("rising", [True, False])
def test_ids_beyond_int64_are_refused(rising):
    meta = meta_of([2, 1], ids={"width": 1, "base": 2**63 - 2, "rising": rising})
    refused(Features(), meta, [b"\0\7", bytes(4)], "ids do not fit int64")


def test_a_bit_behind_the_last_code_is_refused():
    head = np.array([0, 1], "<f4").tobytes()
    refused(Features("int4"), meta_of([1, 1]), [head, b"\x10"], "expected 0 in the half byte")


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
def test_whatever_stands_in_a_message_only_a_decode_error_comes_of_it(kind, meta, buffers):
    codec = Features(*kind)
    whole = {**meta_of([1, 1]), **meta}
    try:
        arrived = codec.decode(Encoded(codec.wire_name, whole, buffers), LIMIT)
    except DecodeError:
        return
    assert sum(each.nbytes for each in arrived.values()) <= LIMIT
