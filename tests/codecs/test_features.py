"""Feature maps by sample: decoded values, errors, and invalid tensors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.algorithms.problems.datasets import load_dataset
from fedmq.algorithms.problems.models import cnn_mnist
from fedmq.codecs.errors import CodecError, SpecError
from fedmq.codecs.features import Features
from fedmq.codecs.spec import build
from tests.codecs.decoding import received
from tests.codecs.feature_messages import DTYPES, HONEST, LIMIT, PACKS, group

ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative, at most
LEVELS = {"int8": 255, "int4": 15}
TINY = torch.finfo(torch.float32).tiny


def through(codec, tensors, limit=LIMIT):
    return codec.decode(received(codec.encode(tensors, 0)), limit)


def check_bounds(dtype, given_features, arrived):
    """Assert the errors of the codec's docstring, and that zeros are exact."""
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert received(codec.encode(group(x), 1)) == received(codec.encode(group(x), 0))


def test_int4_packs_two_codes_per_byte_and_samples_start_at_a_byte():
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
def test_a_gpu_and_a_cpu_write_the_same_bytes(dtype):
    x = torch.randn((64, 3, 9, 9), generator=torch.Generator().manual_seed(2)).relu()
    tensors = group(x, labels=torch.arange(64) % 10)
    there = {name: each.cuda() for name, each in tensors.items()}
    codec = Features(dtype)
    assert received(codec.encode(there, 0)) == received(codec.encode(tensors, 0))


# Ids, labels and zstd


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
    assert torch.equal(Features().decode(received(encoded), LIMIT)["ids"], ids)


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


def test_feature_maps_of_digits_compress_well():
    """The weights are untrained; docs/codecs.md has figures of trained ones."""
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


def test_parameters_are_optional_and_can_be_named():
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
def test_the_error_for_invalid_parameters_lists_the_choices(arguments, message):
    with pytest.raises(SpecError, match=message):
        build("features" + arguments, {"features": Features}, "codec")


# Invalid tensors


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
def test_the_error_names_a_value_beyond_the_dtype(dtype, value, message):
    x = torch.ones(3, 2, 2, 2)
    x[1, 1, 0, 1] = value
    with pytest.raises(CodecError, match=message):
        Features(dtype).encode(group(x, torch.tensor([5, 12, 7])), 0)


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 65519.0), ("bfloat16", 3.39e38), ("int8", 2.0**126)]
)
def test_the_largest_values_of_a_dtype_encode(dtype, value):
    x = torch.tensor([[value], [-value]])
    assert bool(through(Features(dtype), group(x))["features"].isfinite().all())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "expected features, ids, optional labels, got"),
        ({"features": torch.zeros(1, 1)}, "expected features, ids, optional labels"),
        ({**group(torch.zeros(1, 1)), "x": torch.zeros(1)}, "got .'features', 'ids', 'x'"),
        (group(torch.zeros(2, 1).double()), "features as float32 .* got torch.float64 .2, 1."),
        (group(torch.zeros(2)), "with 2 to 4 sizes"),
        (group(torch.zeros(2, 1, 1, 1, 1)), "with 2 to 4 sizes"),
        (group(torch.zeros(2, 0)), "only n may be 0"),
        (group(torch.zeros(2, 1), torch.zeros(2)), "ids as int64 .2., got torch.float32 .2."),
        (group(torch.zeros(2, 1), torch.arange(3)), "ids as int64 .2., got torch.int64 .3."),
        (group(torch.zeros(2, 1), labels=torch.arange(3)), "labels as int64 .2."),
        (group(torch.zeros(3, 1), torch.tensor([4, 1, 4])), "expected each id once, got 4 twice"),
    ],
)
def test_invalid_tensors_are_rejected(tensors, message):
    with pytest.raises(CodecError, match=message):
        Features().encode(tensors, 0)
