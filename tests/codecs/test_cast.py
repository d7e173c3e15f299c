"""Half-precision floats."""

import pytest
import torch

from fedmq.codecs.cast import Cast
from fedmq.codecs.errors import SpecError
from fedmq.codecs.formats.flat import as_flat
from fedmq.codecs.registry import decode, make_codec
from tests.codecs.decoding import received


def through(codec, tensors):
    """Encode tensors and decode a copy of the message."""
    return decode(received(codec.encode(tensors, 0)))


@pytest.mark.parametrize(
    ("dtype", "sent", "arrives"),
    [
        ("float16", 1.0, 1.0),
        ("float16", 2049.0, 2048.0),  # 11 bits
        ("float16", 65504.0, 65504.0),
        ("float16", 1e5, float("inf")),
        ("float16", 1e-9, 0.0),
        ("bfloat16", 257.0, 256.0),  # 8 bits
        ("bfloat16", 259.0, 260.0),
        ("bfloat16", 2.0**100, 2.0**100),
        ("bfloat16", -0.5, -0.5),
    ],
)
def test_floats_are_rounded_to_the_narrower_type(dtype, sent, arrives):
    assert through(Cast(dtype), {"w": torch.tensor([sent])})["w"].tolist() == [arrives]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("before", ["float64", "float32", "float16", "bfloat16"])
def test_tensors_return_to_the_dtype_that_they_had(dtype, before):
    sent = torch.tensor([[1.5, -2.0]], dtype=getattr(torch, before))
    arrived = through(Cast(dtype), {"w": sent})["w"]
    assert arrived.dtype == sent.dtype
    assert torch.equal(arrived, sent)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_integers_and_booleans_do_not_change(dtype):
    sent = {
        "count": torch.tensor([2**53 + 1, -(2**63)]),
        "small": torch.tensor([-128, 127], dtype=torch.int8),
        "mask": torch.tensor([True, False]),
        "w": torch.ones(1),
    }
    arrived = through(Cast(dtype), sent)
    assert list(arrived) == list(sent)
    for name, tensor in sent.items():
        assert torch.equal(arrived[name], tensor)


def test_half_the_bytes_are_sent():
    sent = {"w": torch.zeros(100), "b": torch.zeros(())}
    assert Cast("float16").encode(sent, 0).nbytes == 202


def test_scalars_and_empty_tensors_keep_their_shapes():
    sent = {"s": torch.tensor(2.0), "e": torch.empty(0, 3), "w": torch.ones(2, 2)}
    arrived = through(Cast("bfloat16"), sent)
    assert [each.shape for each in arrived.values()] == [(), (0, 3), (2, 2)]
    assert arrived["s"].item() == 2.0


def test_decoded_tensors_are_adjacent():
    arrived = through(Cast("float16"), {"a": torch.zeros(2), "b": torch.ones(2, 1)})
    flat = as_flat(list(arrived.values()))
    assert flat.tolist() == [0, 0, 1, 1]
    assert flat.data_ptr() == arrived["a"].data_ptr()


def test_encoding_does_not_change_the_tensors():
    sent = torch.tensor([0.1])
    through(Cast("float16"), {"w": sent})
    assert torch.equal(sent, torch.tensor([0.1]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_wire_name_holds_the_type(dtype):
    codec = make_codec(f"cast({dtype})")
    assert codec.wire_name == f"cast@1({dtype})"
    assert codec.encode({}, 0).codec == f"cast@1({dtype})"


def test_the_error_for_another_dtype_lists_the_choices():
    with pytest.raises(SpecError, match="dtype must be float16 or bfloat16, got 'float8'"):
        make_codec("cast(float8)")
