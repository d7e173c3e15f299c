"""Half-width floats on the wire: ``cast(float16)`` and ``cast(bfloat16)``."""

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
    """Floating-point tensors rounded to a narrower type, others as they are.

    float16 keeps 11 significant bits up to 65504 and turns larger values into infinities,
    which an aggregator refuses; bfloat16 keeps 8 bits and the whole range of float32.
    ``meta``: ``tensors`` as in raw, and ``dtypes``, the dtype of each before.
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
        """Round the floating-point tensors and write all."""
        target = DTYPES[self.dtype]
        narrow: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            narrow[name] = tensor.to(target) if tensor.is_floating_point() else tensor
        encoded = self._raw.encode(narrow, seed)
        before = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()]
        return Encoded(self.wire_name, {**encoded.meta, "dtypes": before}, encoded.buffers)

    def decode(self, encoded: Encoded, max_bytes: int) -> dict[str, Tensor]:
        """Read all and widen what was rounded."""
        before = encoded.meta.get("dtypes")
        table = read_table(encoded.meta)
        if not isinstance(before, list | tuple) or len(before) != len(table):
            raise DecodeError("expected meta.dtypes to name the dtype of each tensor")
        wide = {}
        decoded = self._raw.decode(encoded, max_bytes // 4)
        for (name, tensor), dtype in zip(decoded.items(), before, strict=True):
            if tensor.dtype == DTYPES[self.dtype]:
                if dtype not in (*_WIDE, *_CHOICES):
                    raise DecodeError(
                        f"tensor {shorten(name)} cannot be widened to {shorten(dtype)}"
                    )
                wide[name] = tensor.to(DTYPES[dtype])
            else:
                wide[name] = tensor
        return _side_by_side(wide)


def _side_by_side(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lay float32 tensors end to end, so that whoever adds them up sees one vector."""
    floats = {name: each for name, each in tensors.items() if each.dtype == torch.float32}
    if not floats:
        return tensors
    flat = torch.cat([each.reshape(-1) for each in floats.values()])
    pieces = torch.split(flat, [each.numel() for each in floats.values()])
    views = {
        name: piece.view(floats[name].shape) for name, piece in zip(floats, pieces, strict=True)
    }
    return {name: views.get(name, each) for name, each in tensors.items()}
