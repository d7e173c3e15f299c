"""Messages of each pipeline, and a decoder that accepts rejections."""

import torch

from fedmq.codecs.base import Encoded
from fedmq.codecs.errors import CodecError
from fedmq.codecs.registry import decode, make_codec
from tests.codecs.test_pipeline import SPECS

LIMIT = 1 << 20
PIPELINES = [f"limit(0) | {spec}" for spec in SPECS]


def message(spec, seed=3):
    """Two large tensors, one of integers, and one without elements."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "a": torch.randn(6, 10, generator=generator),
        "e": torch.empty(0, 5),
        "b": torch.randn(37, generator=generator),
        "n": torch.tensor([1, 2]),
    }
    return make_codec(spec).encode(tensors, seed)


def try_decode(codec, meta, buffers, limit=LIMIT):
    """Decode; return the tensors, or None if the message is rejected."""
    try:
        tensors = decode(Encoded(codec, meta, buffers), limit)
    except CodecError as error:
        text = str(error)
    else:
        assert sum(each.nbytes for each in tensors.values()) <= limit
        return tensors
    assert "\n" not in text
    assert len(text) < 1000
    return None
