"""Golden bytes: messages of version 1 of each codec stay readable.

These constants are not edited. Other bytes mean another version, beside this one.
"""

import pytest
import torch

from fedmq.codecs.base import Encoded
from fedmq.codecs.registry import decode, make_codec

TENSORS = {
    "w": torch.tensor([[1.0, -2.5]]),
    "b": torch.tensor(0.5),
    "n": torch.tensor([1, -2]),
}
INTEGERS = "0100000000000000feffffffffffffff"
GOLDEN = {
    "raw": Encoded(
        "raw@1",
        {"tensors": [["w", "float32", [1, 2]], ["b", "float32", []], ["n", "int64", [2]]]},
        ["0000803f000020c00000003f", INTEGERS],
    ),
    "cast(float16)": Encoded(
        "cast@1(float16)",
        {
            "tensors": [["w", "float16", [1, 2]], ["b", "float16", []], ["n", "int64", [2]]],
            "dtypes": ["float32", "float32", "int64"],
        },
        ["003c00c10038", INTEGERS],
    ),
    "cast(bfloat16)": Encoded(
        "cast@1(bfloat16)",
        {
            "tensors": [["w", "bfloat16", [1, 2]], ["b", "bfloat16", []], ["n", "int64", [2]]],
            "dtypes": ["float32", "float32", "int64"],
        },
        ["803f20c0003f", INTEGERS],
    ),
}
RAW_BITS = {
    "float64": (1.5, "000000000000f83f"),
    "float32": (1.5, "0000c03f"),
    "float16": (1.5, "003e"),
    "bfloat16": (1.5, "c03f"),
    "int64": (-2, "feffffffffffffff"),
    "int32": (-2, "feffffff"),
    "int16": (258, "0201"),
    "int8": (-2, "fe"),
    "uint8": (254, "fe"),
    "bool": (True, "01"),
}


@pytest.mark.parametrize("spec", sorted(GOLDEN))
def test_version_1_writes_these_bytes(spec):
    encoded = make_codec(spec).encode(TENSORS, 0)
    golden = GOLDEN[spec]
    assert encoded.codec == golden.codec
    assert encoded.meta == golden.meta
    assert [bytes(each).hex() for each in encoded.buffers] == golden.buffers


@pytest.mark.parametrize("spec", sorted(GOLDEN))
def test_version_1_is_read_from_these_bytes(spec):
    golden = GOLDEN[spec]
    buffers = [bytes.fromhex(each) for each in golden.buffers]
    decoded = decode(Encoded(golden.codec, golden.meta, buffers))
    assert list(decoded) == ["w", "b", "n"]
    for name, tensor in TENSORS.items():
        assert decoded[name].dtype == tensor.dtype
        assert torch.equal(decoded[name], tensor)


@pytest.mark.parametrize("dtype", sorted(RAW_BITS))
def test_each_dtype_has_these_little_endian_bytes(dtype):
    value, bits = RAW_BITS[dtype]
    encoded = make_codec("raw").encode({"x": torch.tensor(value, dtype=getattr(torch, dtype))}, 0)
    assert encoded.meta == {"tensors": [["x", dtype, []]]}
    assert bytes(encoded.buffers[0]).hex() == bits
