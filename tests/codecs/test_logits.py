"""Logits by sample and by label: decoded values, errors, and invalid messages."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.codecs.base import Encoded
from fedmq.codecs.errors import CodecError, DecodeError, SpecError
from fedmq.codecs.logits import Logits
from fedmq.codecs.spec import build
from tests.codecs.decoding import INVALID_GRIDS, received, rejected

DTYPES = ["float32", "float16", "int8"]
LIMIT = 1 << 20


def through(codec, tensors, limit=LIMIT):
    return codec.decode(received(codec.encode(tensors, 0)), limit)


def by_sample(logits, ids=None):
    return {"logits": logits, "ids": torch.arange(len(logits)) if ids is None else ids}


def by_label(logits, counts):
    return {"logits": logits, "counts": torch.tensor(counts)}


def check_bounds(dtype, given_logits, arrived):
    """Assert the errors of the codec's docstring."""
    if not given_logits.numel():
        return
    x, y = given_logits.double(), arrived.double()
    if dtype == "int8":
        least, most = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
        step = (1.01 * (most - least + least.abs() / 128) / 255).clamp_min(2.0**-125)
        largest = torch.maximum(least.abs(), most.abs())
        assert bool(((x - y).abs() <= step / 2 + 2.0**-22 * largest).all())
    elif dtype == "float16":
        assert bool(((x - y).abs() <= 2.0**-11 * x.abs() + 2.0**-24).all())
    else:
        assert torch.equal(given_logits, arrived)


floats = st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1e-40, -1e-40, 6e4, -6e4])


def rows_of(draw, n, classes, values=floats):
    flat = draw(st.lists(values, min_size=n * classes, max_size=n * classes))
    return torch.tensor(flat, dtype=torch.float32).view(n, classes)


@st.composite
def messages(draw, values=floats):
    classes = draw(st.integers(1, 6))
    if draw(st.booleans()):
        n = draw(st.integers(0, 5))
        ids = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 300)
        drawn = draw(st.lists(ids, min_size=n, max_size=n, unique=True))
        ids = torch.tensor(drawn, dtype=torch.int64)
        return by_sample(rows_of(draw, n, classes, values), ids)
    many = st.just(0) | st.integers(0, 2**63 - 1)
    counts = draw(st.lists(many, min_size=classes, max_size=classes))
    logits = rows_of(draw, classes, classes, values)
    logits[torch.tensor(counts) == 0] = 0
    return by_label(logits, counts)


@pytest.mark.slow
@given(messages(), st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=200)
def test_names_shapes_dtypes_ids_and_counts_come_back_and_logits_nearly(tensors, dtype):
    arrived = through(Logits(dtype), tensors)
    assert list(arrived) == list(tensors)
    for name, tensor in tensors.items():
        assert (arrived[name].shape, arrived[name].dtype) == (tensor.shape, tensor.dtype)
        assert name == "logits" or torch.equal(arrived[name], tensor)
    check_bounds(dtype, tensors["logits"], arrived["logits"])


@given(messages(st.floats(-(2.0**126), 2.0**126, width=32)))
@settings(deadline=None)
def test_grids_hold_from_the_smallest_to_the_largest_values(tensors):
    check_bounds("int8", tensors["logits"], through(Logits("int8"), tensors)["logits"])


@pytest.mark.parametrize(
    ("dtype", "nbytes"), [("float32", 40), ("float16", 20), ("int8", 10 + 2 + 2)]
)
def test_the_bytes_of_ten_classes_of_consecutive_samples(dtype, nbytes):
    encoded = Logits(dtype).encode(by_sample(torch.randn(100, 10), torch.arange(7, 107)), 0)
    assert encoded.nbytes == 100 * nbytes


def test_a_table_by_label_takes_the_papers_3200_bits_and_a_byte_per_count():
    """Jeong et al. 2018: 10 x 10 logits of 32 bits."""
    tensors = by_label(torch.randn(10, 10), [200] * 9 + [1])
    encoded = Logits("float32").encode(tensors, 0)
    assert memoryview(encoded.buffers[1]).nbytes * 8 == 3200
    assert memoryview(encoded.buffers[0]).nbytes == 10


def test_a_label_without_samples_is_not_sent():
    logits = torch.tensor([[1.0, 2, 3], [0, 0, 0], [4, 5, 6]])
    for dtype, row in (("float32", 12), ("float16", 6), ("int8", 3)):
        encoded = received(Logits(dtype).encode(by_label(logits, [5, 0, 300]), 0))
        assert len(encoded.buffers[1]) == 2 * row
        arrived = Logits(dtype).decode(encoded, LIMIT)
        assert arrived["counts"].tolist() == [5, 0, 300]
        assert arrived["logits"][1].tolist() == [0, 0, 0]
        check_bounds(dtype, logits, arrived["logits"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_table_without_any_label_comes_back_as_zeros(dtype):
    encoded = received(Logits(dtype).encode(by_label(torch.zeros(4, 4), [0] * 4), 0))
    assert sum(len(each) for each in encoded.buffers) == 0
    assert torch.equal(Logits(dtype).decode(encoded, LIMIT)["logits"], torch.zeros(4, 4))


def test_each_row_has_its_own_grid():
    x = torch.stack([torch.linspace(0, 1e-3, 50), torch.linspace(-1e3, 1e3, 50)])
    error = (through(Logits("int8"), by_sample(x))["logits"] - x).abs().amax(dim=1)
    assert error[0] <= 0.51e-3 / 255
    assert error[1] <= 1.03e3 / 255


def test_bytes_do_not_depend_on_gradients_strides_or_the_seed():
    x = torch.randn(6, 4, requires_grad=True)
    tensors = by_sample(x.t(), torch.tensor([3, 1, 2, 0]))
    arrived = through(Logits("float32"), tensors)["logits"]
    assert torch.equal(arrived, x.detach().t())
    codec = Logits("int8")
    assert received(codec.encode(tensors, 0)) == received(codec.encode(tensors, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_and_a_cpu_write_the_same_bytes(dtype):
    codec, x = Logits(dtype), torch.randn(10, 10)
    x[3] = 0
    for tensors in (by_sample(x), by_label(x, [1, 2, 3, 0, 4, 5, 6, 7, 8, 9])):
        there = {name: each.cuda() for name, each in tensors.items()}
        assert received(codec.encode(there, 0)) == received(codec.encode(tensors, 0))


# Names


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_wire_name_is_a_spec_again(dtype):
    codec = Logits(dtype)
    assert codec.wire_name == f"logits@1({dtype})"
    again = build("logits" + codec.parameters(), {"logits": Logits}, "codec")
    assert again.wire_name == codec.wire_name
    named = build(f"logits(dtype={dtype})", {"logits": Logits}, "codec")
    assert named.wire_name == codec.wire_name


def test_float16_is_the_default_and_the_error_lists_the_choices():
    assert build("logits", {"logits": Logits}, "codec").wire_name == "logits@1(float16)"
    with pytest.raises(SpecError, match="dtype must be float32, float16 or int8, got 'int4'"):
        build("logits(int4)", {"logits": Logits}, "codec")


# Invalid tensors


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("float32", float("nan"), "logits of sample 12 hold nan; float32 takes finite values"),
        ("float32", float("inf"), "logits of sample 12 hold inf"),
        ("float16", 65520.0, "logits of sample 12 hold 65520; float16 takes finite values up"),
        ("int8", float("-inf"), "logits of sample 12 hold -inf"),
        ("int8", -1e38, "logits of sample 12 hold -1e\\+38; int8 takes finite values up to 8.5"),
    ],
)
def test_the_error_names_a_value_beyond_the_dtype(dtype, value, message):
    x = torch.ones(3, 4)
    x[1, 2] = value
    with pytest.raises(CodecError, match=message):
        Logits(dtype).encode(by_sample(x, torch.tensor([5, 12, 7])), 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_label_with_a_nan_is_named(dtype):
    x = torch.ones(4, 4)
    x[1] = 0
    x[3, 0] = float("nan")
    with pytest.raises(CodecError, match="logits of label 3 hold nan"):
        Logits(dtype).encode(by_label(x, [1, 0, 2, 3]), 0)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "expected logits and either ids or counts, got"),
        ({"logits": torch.zeros(1, 1)}, "expected logits and either ids or counts"),
        ({**by_sample(torch.zeros(1, 1)), "counts": torch.ones(1)}, "either ids or counts"),
        (by_sample(torch.zeros(2, 3).double()), "float32 .n, classes. beside ids, got torch.fl"),
        (by_sample(torch.zeros(2, 3, 1)), "got torch.float32 .2, 3, 1."),
        (by_sample(torch.zeros(2, 0)), "got torch.float32 .2, 0."),
        (by_sample(torch.zeros(2, 3), torch.zeros(2)), "ids as int64 .2., got torch.float32"),
        (by_sample(torch.zeros(2, 3), torch.arange(3)), "ids as int64 .2., got torch.int64 .3."),
        (
            by_sample(torch.zeros(3, 1), torch.tensor([4, 1, 4])),
            "expected each id once, got 4 twice",
        ),
        (by_label(torch.zeros(2, 3), [1, 1]), "float32 .classes, classes. beside counts, got"),
        (by_label(torch.zeros(0, 0), [1]), "got torch.float32 .0, 0."),
        (by_label(torch.zeros(2, 2), [1, -3]), "label 1 has a negative count -3"),
        (by_label(torch.ones(2, 2), [1, 0]), "label 1 has count 0, but its row is not 0"),
        (by_label(torch.full((2, 2), float("nan")), [0, 1]), "label 0 has count 0, but its row"),
    ],
)
def test_invalid_tensors_are_rejected(tensors, message):
    with pytest.raises(CodecError, match=message):
        Logits().encode(tensors, 0)


# Invalid messages


def honest(dtype, key):
    x = torch.tensor([[1.0, -2, 3], [0, 0, 0], [4, 5, 6]])
    if key == "ids":
        return received(Logits(dtype).encode(by_sample(x, torch.tensor([9, 2, 400])), 0))
    return received(Logits(dtype).encode(by_label(x, [5, 0, 300]), 0))


HONEST = [(dtype, key) for dtype in DTYPES for key in ("ids", "counts")]


@pytest.mark.parametrize(("dtype", "key"), HONEST)
def test_each_truncated_or_longer_buffer_is_rejected(dtype, key):
    codec, encoded = Logits(dtype), honest(dtype, key)
    for which, whole in enumerate(encoded.buffers):
        others = [whole[:length] for length in range(len(whole))]
        for other in [*others, whole + b"\0", whole + whole]:
            buffers = [other if i == which else each for i, each in enumerate(encoded.buffers)]
            with pytest.raises(DecodeError):
                codec.decode(Encoded(encoded.codec, encoded.meta, buffers), LIMIT)
    for buffers in ([], encoded.buffers[:1], [*encoded.buffers, b""]):
        with pytest.raises(DecodeError, match="expected 2 buffers"):
            codec.decode(Encoded(encoded.codec, encoded.meta, buffers), LIMIT)


WRONG = [None, True, -1, 0, 1.5, "x", b"x", [], {}, [-1], 2**63, 2**64, [2**39] * 2, {"width": 1}]


@pytest.mark.parametrize(("dtype", "key"), HONEST)
@pytest.mark.parametrize("path", ["shape", "key", "width", "base", "rising", 0, 1])
def test_each_mutated_field_is_rejected_or_read_within_bounds(dtype, key, path):
    codec, encoded = Logits(dtype), honest(dtype, key)
    for value in [*WRONG, [3, 2**31], [2**31, 3], [3, 0], [2, 2]]:
        meta = {"shape": list(encoded.meta["shape"]), key: dict(encoded.meta[key])}
        if path == "shape":
            meta["shape"] = value
        elif path == "key":
            meta[key] = value
        elif isinstance(path, int):
            meta["shape"][path] = value
        else:
            meta[key][path] = value
        try:
            arrived = codec.decode(Encoded(encoded.codec, meta, encoded.buffers), LIMIT)
        except DecodeError:
            continue
        # Only a consistent change passes: another base, or rising ids.
        assert path in {"base", "rising"}, (path, value)
        assert arrived["logits"].shape == (3, 3)


@pytest.mark.parametrize(("dtype", "key"), HONEST)
def test_missing_or_contradicting_fields_are_rejected(dtype, key):
    encoded = honest(dtype, key)
    for meta in (
        {},
        {"shape": [3, 3]},
        {key: encoded.meta[key]},
        {**encoded.meta, "ids": encoded.meta[key], "counts": encoded.meta[key]},
    ):
        with pytest.raises(DecodeError):
            Logits(dtype).decode(Encoded(encoded.codec, meta, encoded.buffers), LIMIT)


@given(st.sampled_from(HONEST), st.integers(0, 1), st.data())
@settings(deadline=None, max_examples=200)
def test_a_flipped_bit_raises_nothing_but_a_decode_error(kind, which, data):
    codec, encoded = Logits(kind[0]), honest(*kind)
    buffers = [bytearray(each) for each in encoded.buffers]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(buffers[which]) - 1))
        buffers[which][place] ^= data.draw(st.integers(1, 255))
    try:
        arrived = codec.decode(Encoded(encoded.codec, encoded.meta, buffers), LIMIT)
    except DecodeError:
        return
    assert bool(arrived["logits"].isfinite().all())


NONE = {"width": 0, "base": 0, "rising": False}
NEXT = {"width": 0, "base": 0, "rising": True}


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_shapes_are_rejected_before_memory_is_allocated(dtype):
    codec = Logits(dtype)
    rising = {"shape": [(1 << 31) - 1, 1 << 20], "ids": NEXT}
    rejected(codec, rising, [b"", b""], "at most 1099511627776 bytes")
    long = {"shape": [(1 << 31) - 1, 1], "ids": NEXT}
    rejected(codec, long, [b"", bytes(64)], "rows of|the first buffer has", 1 << 50)
    wide = {"width": 4, "base": 0, "rising": True}
    rejected(
        codec, {"shape": [1 << 30, 10], "ids": wide}, [b"", b""], "the first buffer has 0 bytes"
    )
    rejected(codec, {"shape": [1 << 30, 1 << 30], "ids": NEXT}, [b"", b""], "expected meta.shape")
    table = {"shape": [1 << 16, 1 << 16], "counts": NONE}
    rejected(codec, table, [b"", b""], "expected meta.shape as .classes, classes.")
    rejected(codec, {"shape": [500, 500], "counts": NONE}, [b"", b""], "at most 65536", 1 << 16)


@pytest.mark.parametrize(
    ("low", "step"),
    INVALID_GRIDS,
)
def test_grids_that_give_no_finite_values_are_rejected(low, step):
    head = torch.tensor([low, step]).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    meta = {"shape": [1, 1], "ids": NONE}
    rejected(Logits("int8"), meta, [head, b"\1"], "finite scales and minima")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_rejected(dtype, value):
    data = np.array([1.0, value], dtype).tobytes()
    rejected(Logits(dtype), {"shape": [1, 2], "ids": NONE}, [b"", data], "expected finite logits")


def test_a_wrong_number_of_rows_by_label_is_rejected():
    counts = {"width": 1, "base": 0, "rising": False}
    meta = {"shape": [2, 2], "counts": counts}
    for rows in (0, 2):
        message = f"a row for each count above 0, got {rows} rows"
        rejected(Logits("float16"), meta, [b"\0\4", bytes(4 * rows)], message)
    rejected(Logits("float16"), meta, [b"\0\4", bytes(12)], "expected 2 rows of 4 bytes, got 12")


def test_repeated_ids_and_negative_counts_are_rejected():
    ids = {"shape": [2, 1], "ids": NONE}
    rejected(Logits(), ids, [b"", bytes(4)], "expected each id once, got 0 twice")
    counts = {"shape": [1, 1], "counts": {"width": 0, "base": -7, "rising": False}}
    rejected(Logits(), counts, [b"", b""], "expected counts of 0 or more, got -7")


def test_the_memory_limit_is_checked_first():
    encoded = received(Logits().encode(by_sample(torch.zeros(10, 100)), 0))
    need = 2 * 10 * (4 * 100 + 2 * 8)
    assert Logits().decode(encoded, need)["logits"].shape == (10, 100)
    with pytest.raises(DecodeError, match=f"at most {need - 1} bytes to decode, got {need}"):
        Logits().decode(encoded, need - 1)
