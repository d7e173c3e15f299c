"""Half-precision floats on the wire: ``cast(float16)`` and ``cast(bfloat16)``."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmq.codecs.base import Codec, Encoded, Tensors
from fedmq.codecs.errors import DecodeError, SpecError
from fedmq.codecs.raw import DTYPES, Raw, read_table
from fedmq.codecs.text import shorten

_CHOICES = ("float16", "bfloat16")
_WIDE = ("float32", "float64")


class Cast(Codec):
    """Floating-point tensors rounded to a narrower type, others unchanged.

    float16 has 11 significant bits; values above 65504 become infinite, and an aggregator
    rejects them. bfloat16 has 8 significant bits and the range of float32.
    ``meta``: ``tensors`` as in raw, and ``dtypes``, the original dtype of each tensor.
    """

    name = "cast"

    def __init__(self, dtype: str) -> None:
        if dtype not in _CHOICES:
            raise SpecError(f"codec cast: dtype must be {' or '.join(_CHOICES)}, got {dtype!r}")
        self.dtype = dtype
        self._raw = Raw()

    def parameters(self) -> str:
        """Return the target dtype."""
        return f"({self.dtype})"

    def encode(self, tensors: Tensors, seed: int) -> Encoded:
        """Round the floating-point tensors and encode all."""
        target = DTYPES[self.dtype]
        narrow: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            narrow[name] = tensor.to(target) if tensor.is_floating_point() else tensor
        encoded = self._raw.encode(narrow, seed)
        before = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()]
        return Encoded(self.wire_name, {**encoded.meta, "dtypes": before}, encoded.buffers)

    def decode(self, encoded: Encoded, max_bytes: int) -> dict[str, Tensor]:
        """Decode all tensors and widen the rounded ones."""
        before = encoded.meta.get("dtypes")
        table = read_table(encoded.meta)
        if not isinstance(before, list | tuple) or len(before) != len(table):
            raise DecodeError("expected meta.dtypes with the dtype of each tensor")
        wide = {}
        decoded = self._raw.decode(encoded, max_bytes // 4)
        for (name, tensor), dtype in zip(decoded.items(), before, strict=True):
            if tensor.dtype == DTYPES[self.dtype]:
                if dtype not in (*_WIDE, *_CHOICES):
                    raise DecodeError(f"cannot widen tensor {shorten(name)} to {shorten(dtype)}")
                wide[name] = tensor.to(DTYPES[dtype])
            else:
                wide[name] = tensor
        return _adjacent(wide)


def _adjacent(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make float32 tensors adjacent views of one vector, which can be added in one operation."""
    floats = {name: each for name, each in tensors.items() if each.dtype == torch.float32}
    if not floats:
        return tensors
    flat = torch.cat([each.reshape(-1) for each in floats.values()])
    parts = torch.split(flat, [each.numel() for each in floats.values()])
    views = {name: part.view(floats[name].shape) for name, part in zip(floats, parts, strict=True)}
    return {name: views.get(name, each) for name, each in tensors.items()}
