"""The identity codec: nothing changes, and nothing is copied."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.codecs.base import Encoded
from fedmq.codecs.errors import CodecError, DecodeError
from fedmq.codecs.formats.flat import as_flat
from fedmq.codecs.raw import DTYPES, Raw
from fedmq.codecs.registry import decode
from tests.codecs.decoding import received

LIMIT = 1 << 20


def same_bits(one, other):
    """Return whether two tensors are equal in dtype, shape and every bit."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bytes(one.reshape(-1).view(torch.uint8).numpy())
        == bytes(other.reshape(-1).view(torch.uint8).numpy())
    )


@st.composite
def tensors(draw):
    """Return up to six tensors of any dtype with shapes such as [], [0], [3, 1]."""
    found = {}
    for name in draw(st.lists(st.text(max_size=8), max_size=6, unique=True)):
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        count = math.prod(shape)
        data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
        if dtype == torch.bool:
            data = bytes(byte & 1 for byte in data)
        found[name] = torch.tensor(list(data), dtype=torch.uint8).view(dtype).view(shape)
    return found


@given(tensors())
@settings(deadline=None)
def test_every_tensor_comes_back_bit_for_bit(given_tensors):
    decoded = decode(received(Raw().encode(given_tensors, 0)), LIMIT)
    assert list(decoded) == list(given_tensors)
    for name, tensor in given_tensors.items():
        assert same_bits(decoded[name], tensor)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_scalar_an_empty_and_a_full_tensor_of_each_dtype_come_back(dtype):
    values = torch.tensor([[0, 1], [1, 0]]).to(DTYPES[dtype])
    sent = {"scalar": values[0, 1], "empty": values[:, :0], "none": values[:0], "full": values}
    decoded = decode(received(Raw().encode(sent, 0)), LIMIT)
    for name, tensor in sent.items():
        assert decoded[name].dtype == DTYPES[dtype]
        assert decoded[name].shape == tensor.shape
        assert torch.equal(decoded[name], tensor)


def test_infinities_and_nans_do_not_change():
    sent = {"w": torch.tensor([math.inf, -math.inf, math.nan, -0.0])}
    assert same_bits(decode(received(Raw().encode(sent, 0)))["w"], sent["w"])


def test_an_empty_group_decodes_to_an_empty_group():
    encoded = Raw().encode({}, 0)
    assert encoded.nbytes == 0
    assert decode(encoded) == {}


def test_consecutive_tensors_of_one_dtype_share_a_buffer():
    sent = {
        "a": torch.zeros(2),
        "b": torch.zeros(3),
        "n": torch.zeros(1, dtype=torch.int64),
        "c": torch.zeros(1),
    }
    encoded = Raw().encode(sent, 0)
    assert [len(each) for each in encoded.buffers] == [20, 8, 4]
    assert encoded.nbytes == 32


def test_views_of_one_vector_are_encoded_without_a_copy():
    vector = torch.arange(6.0)
    encoded = Raw().encode({"a": vector[:2], "b": vector[2:].view(2, 2)}, 0)
    (buffer,) = encoded.buffers
    assert torch.frombuffer(buffer, dtype=torch.float32).data_ptr() == vector.data_ptr()
    vector[5] = 7.0
    assert decode(received(encoded))["b"].tolist() == [[2.0, 3.0], [4.0, 7.0]]


def test_a_writable_buffer_is_decoded_without_a_copy():
    sent = Raw().encode({"a": torch.zeros(2), "b": torch.ones(3)}, 0)
    memory = bytearray(bytes(sent.buffers[0]))
    decoded = decode(Encoded(sent.codec, sent.meta, [memory]))
    start = torch.frombuffer(memory, dtype=torch.float32).data_ptr()
    assert (decoded["a"].data_ptr(), decoded["b"].data_ptr()) == (start, start + 8)


def test_decoded_tensors_are_adjacent_and_flatten_without_a_copy():
    sent = Raw().encode({"a": torch.zeros(2), "b": torch.ones(3)}, 0)
    decoded = decode(received(sent))
    flat = as_flat(list(decoded.values()))
    assert flat.tolist() == [0, 0, 1, 1, 1]
    assert flat.data_ptr() == decoded["a"].data_ptr()


def test_a_read_only_buffer_is_copied_once_and_the_result_is_writable():
    sent = bytes(Raw().encode({"a": torch.zeros(2)}, 0).buffers[0])
    decoded = decode(Encoded("raw@1", {"tensors": [["a", "float32", [2]]]}, [sent]))
    decoded["a"].fill_(1.0)
    assert sent == bytes(8)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).view(2, 3).t(),
        torch.arange(6.0)[::2],
        torch.ones(1).expand(3),
        torch.ones(3, requires_grad=True),
    ],
    ids=["transposed", "strided", "expanded", "with gradient"],
)
def test_non_contiguous_tensors_are_copied(tensor):
    decoded = decode(received(Raw().encode({"w": tensor}, 0)))
    assert torch.equal(decoded["w"], tensor.detach())


@pytest.mark.parametrize(
    "pieces",
    [
        lambda v: [v[2:], v[:2]],
        lambda v: [v[:2], v[3:]],
        lambda v: [v[:2], v[:2]],
        lambda v: [v[:2], torch.ones(2)],
    ],
    ids=["swapped", "with a gap", "twice the same", "of two storages"],
)
def test_tensors_that_are_not_adjacent_are_copied(pieces):
    chosen = pieces(torch.arange(4.0))
    assert torch.equal(as_flat(chosen), torch.cat(chosen))


def test_a_dtype_without_a_wire_name_is_rejected():
    with pytest.raises(CodecError, match=r"cannot encode a tensor of dtype torch\.complex64"):
        Raw().encode({"z": torch.zeros(1, dtype=torch.complex64)}, 0)


def test_tensors_above_the_memory_limit_are_rejected():
    encoded = Raw().encode({"a": torch.zeros(4), "b": torch.zeros(1)}, 0)
    assert len(decode(encoded, 20)) == 2
    with pytest.raises(DecodeError, match="at most 19 bytes of tensors, got 20"):
        decode(encoded, 19)
