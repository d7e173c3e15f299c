"""Bytes that never change: what version 1 of ``features`` and ``logits`` wrote stays readable.

These constants are not edited. Other bytes mean another version, beside this one.
"""

import pytest
import torch
import zstandard

from fedmq.codecs.base import Encoded
from fedmq.codecs.features import Features
from fedmq.codecs.logits import Logits
from fedmq.codecs.spec import build

CHOICES = {"features": Features, "logits": Logits}
LIMIT = 1 << 20

# Three samples of three channels: an odd number of values each, with zeros among them.
FEATURES = {
    "features": torch.tensor([[0.0, 1.0, 7.5], [-1.0, 0.0, 0.0], [2.5, 0.0, 14.0]])[..., None],
    "ids": torch.tensor([4, 5, 300]),
    "labels": torch.tensor([9, 0, 9]),
}
HEAD = "000001002801" + "090009"
META = {
    "shape": [3, 3, 1],
    "ids": {"width": 2, "base": 4, "rising": False},
    "labels": {"width": 1, "base": 0, "rising": False},
    "zstd": False,
}
SAMPLES = {"logits": torch.tensor([[1.0, -2.0, 0.5], [3.0, 3.0, 3.0]]), "ids": torch.tensor([7, 6])}
SAMPLE_META = {"shape": [2, 3], "ids": {"width": 1, "base": 6, "rising": False}}
LABELS = {"logits": torch.tensor([[1.5, -1.0], [0.0, 0.0]]), "counts": torch.tensor([513, 0])}
LABEL_META = {"shape": [2, 2], "counts": {"width": 2, "base": 0, "rising": False}}

# What is sent; wire name, meta and buffers; the values that arrive, if they are others.
GOLDEN = [
    (
        FEATURES,
        Encoded(
            "features@1(float32, none)",
            META,
            [HEAD, "000000000000803f0000f040000080bf0000000000000000000020400000000000006041"],
        ),
        None,
    ),
    (
        FEATURES,
        Encoded("features@1(float16, none)", META, [HEAD, "0000003c804700bc0000000000410000004b"]),
        None,
    ),
    (
        FEATURES,
        Encoded("features@1(bfloat16, none)", META, [HEAD, "0000803ff04080bf00000000204000006041"]),
        None,
    ),
    (
        FEATURES,
        Encoded(
            "features@1(int8, none)",
            META,
            [
                HEAD + "404080bf0000000000000000" + "e1e0603c8180803be1e0603d",
                "49ff89000000ff00ff",
            ],
        ),
        [0.0, 1.0, 7.521568775177002, -1.0019607543945312, 0.0, 0.0, 2.4980392456054688, 0.0, 14.0],
    ),
    (
        FEATURES,
        Encoded(
            "features@1(int4, none)",
            META,
            [HEAD + "efee6ebf0000000000000000" + "efee6e3e8988883defee6e3f", "f40800000f0f"],
        ),
        [0.0, 1.0, 7.4666666984558105, -0.9333333373069763, 0.0, 0.0, 2.566666603088379, 0.0, 14.0],
    ),
    (
        SAMPLES,
        Encoded(
            "logits@1(float32)",
            SAMPLE_META,
            ["0100", "0000803f000000c00000003f000040400000404000004040"],
        ),
        None,
    ),
    (
        SAMPLES,
        Encoded("logits@1(float16)", SAMPLE_META, ["0100", "003c00c00038004200420042"]),
        None,
    ),
    (
        SAMPLES,
        Encoded("logits@1(int8)", SAMPLE_META, ["0100" + "00c04040" + "413c8000", "ff00d4000000"]),
        [1.00384521484375, -2.0, 0.497314453125, 3.0, 3.0, 3.0],
    ),
    (LABELS, Encoded("logits@1(float32)", LABEL_META, ["01020000", "0000c03f000080bf"]), None),
    (LABELS, Encoded("logits@1(float16)", LABEL_META, ["01020000", "003e00bc"]), None),
    (
        LABELS,
        Encoded("logits@1(int8)", LABEL_META, ["01020000" + "80bf" + "213c", "fe00"]),
        [1.4959716796875, -1.0, 0.0, 0.0],
    ),
]
NAMES = [f"{golden.codec} {'counts' if 'counts' in sent else 'ids'}" for sent, golden, _ in GOLDEN]


def codec_of(wire_name):
    return build(wire_name.replace("@1", ""), CHOICES, "codec")


@pytest.mark.parametrize(("tensors", "golden", "arrive"), GOLDEN, ids=NAMES)
def test_version_1_writes_these_bytes(tensors, golden, arrive):
    encoded = codec_of(golden.codec).encode(tensors, 0)
    assert encoded.codec == golden.codec
    assert encoded.meta == golden.meta
    assert [bytes(each).hex() for each in encoded.buffers] == golden.buffers


@pytest.mark.parametrize(("tensors", "golden", "arrive"), GOLDEN, ids=NAMES)
def test_version_1_is_read_from_these_bytes(tensors, golden, arrive):
    buffers = [bytes.fromhex(each) for each in golden.buffers]
    codec = codec_of(golden.codec)
    decoded = codec.decode(Encoded(golden.codec, golden.meta, buffers), LIMIT)
    assert list(decoded) == list(tensors)
    for name, tensor in tensors.items():
        assert (decoded[name].dtype, decoded[name].shape) == (tensor.dtype, tensor.shape)
        if name in {"features", "logits"} and arrive is not None:
            assert decoded[name].flatten().tolist() == arrive
        else:
            assert torch.equal(decoded[name], tensor)


# Another release of zstd may choose other bytes for the same values, so what is written is held
# to what the frame holds. 79 times 15 and a 0, 40 zeros, 20 times 1 and 2; no labels.
ZSTD_META = {
    "shape": [2, 1, 80],
    "ids": {"width": 0, "base": 0, "rising": True},
    "labels": None,
    "zstd": True,
}
ZSTD_VALUES = [[15.0] * 79 + [0.0], [0.0] * 40 + [1.0, 2.0] * 20]
ZSTD = {"features": torch.tensor(ZSTD_VALUES).view(2, 1, 80), "ids": torch.arange(2)}
HEAD_ZSTD = "00000000" + "0000803f"
FRAME = "28b52ffd205075000028ffff0f00210310008948b0070b"


def test_version_1_is_read_from_this_zstd_frame():
    buffers = [bytes.fromhex(HEAD_ZSTD), bytes.fromhex(FRAME)]
    encoded = Encoded("features@1(int4, zstd)", ZSTD_META, buffers)
    decoded = Features("int4", "zstd").decode(encoded, LIMIT)
    assert list(decoded) == list(ZSTD)
    assert torch.equal(decoded["features"], ZSTD["features"])
    assert torch.equal(decoded["ids"], ZSTD["ids"])


def test_version_1_writes_a_zstd_frame_of_the_values():
    encoded = Features("int4", "zstd").encode(ZSTD, 0)
    assert encoded.codec == "features@1(int4, zstd)"
    assert encoded.meta == ZSTD_META
    assert bytes(encoded.buffers[0]).hex() == HEAD_ZSTD
    values = zstandard.ZstdDecompressor().decompress(encoded.buffers[1])
    assert values.hex() == "ff" * 39 + "0f" + "00" * 20 + "21" * 20
