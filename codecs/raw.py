"""The identity codec: the tensors' own bytes, little-endian and concatenated."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedmq.codecs.base import Buffer, Codec, Encoded, Tensors
from fedmq.codecs.errors import CodecError, DecodeError
from fedmq.codecs.formats.flat import as_flat
from fedmq.codecs.text import shorten

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_TENSORS = 100_000
_MAX_DIMENSIONS = 16
_MAX_ELEMENTS = 1 << 40

if sys.byteorder != "little":
    raise ImportError("fedmq writes tensors in little-endian order; this machine is big-endian")


class Raw(Codec):
    """All tensors unchanged.

    ``meta``: ``tensors``, a list of [name, dtype, shape]. Adjacent views of one vector are not
    copied, neither in `encode` nor in `decode`.
    """

    name = "raw"

    def encode(self, tensors: Tensors, seed: int) -> Encoded:  # noqa: ARG002
        """Encode tensors; consecutive tensors of one dtype share a buffer."""
        meta = {"tensors": [[name, _name(t.dtype), list(t.shape)] for name, t in tensors.items()]}
        buffers: list[Buffer] = []
        run: list[Tensor] = []
        for tensor in tensors.values():
            if run and tensor.dtype != run[0].dtype:
                buffers.append(_bytes(run))
                run = []
            run.append(tensor)
        if run:
            buffers.append(_bytes(run))
        return Encoded(self.wire_name, meta, buffers)

    def decode(self, encoded: Encoded, max_bytes: int) -> dict[str, Tensor]:
        """Decode tensors; they share the memory of writable buffers."""
        table = read_table(encoded.meta)
        total = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in table)
        if total > max_bytes:
            raise DecodeError(f"expected at most {max_bytes} bytes of tensors, got {total}")
        tensors: dict[str, Tensor] = {}
        buffers = iter(encoded.buffers)
        for dtype, rows in itertools.groupby(table, key=lambda row: row[1]):
            # One vector for consecutive tensors: adjacent views can be added in one operation.
            shapes = {name: shape for name, _, shape in rows}
            count = sum(math.prod(shape) for shape in shapes.values())
            flat = _vector(next(buffers, b""), dtype, count)
            start = 0
            for name, shape in shapes.items():
                size = math.prod(shape)
                tensors[name] = flat[start : start + size].view(shape)
                start += size
        if next(buffers, None) is not None:
            raise DecodeError("expected no more buffers than meta.tensors describes")
        return tensors


def read_table(meta: Mapping[str, Any]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Return the checked rows (name, dtype, shape) of ``meta["tensors"]``.

    Raises:
        DecodeError: ``meta`` has no valid list of [name, dtype, shape].
    """
    table = meta.get("tensors")
    if not isinstance(table, list | tuple) or len(table) > _MAX_TENSORS:
        raise DecodeError("expected meta.tensors as a list of [name, dtype, shape]")
    rows = []
    seen = set()
    for row in table:
        if not (isinstance(row, list | tuple) and len(row) == 3):
            raise DecodeError(f"expected [name, dtype, shape], got {shorten(row)}")
        name, dtype, shape = row
        if not isinstance(name, str) or name in seen:
            raise DecodeError(f"expected a unique tensor name, got {shorten(name)}")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise DecodeError(f"unknown dtype {shorten(dtype)} of tensor {shorten(name)}")
        if (
            not isinstance(shape, list | tuple)
            or len(shape) > _MAX_DIMENSIONS
            or any(type(size) is not int or not 0 <= size < _MAX_ELEMENTS for size in shape)
            # An empty tensor takes no bytes, but torch still multiplies its other sizes.
            or (0 in shape and math.prod(max(size, 1) for size in shape) >= _MAX_ELEMENTS)
        ):
            raise DecodeError(f"expected a shape for tensor {shorten(name)}, got {shorten(shape)}")
        seen.add(name)
        rows.append((name, DTYPES[dtype], tuple(shape)))
    return rows


def _name(dtype: torch.dtype) -> str:
    if dtype not in _NAMES:
        raise CodecError(f"cannot encode a tensor of dtype {dtype}")
    return _NAMES[dtype]


def _bytes(run: list[Tensor]) -> memoryview:
    flat = as_flat([tensor.detach().cpu() for tensor in run])
    return flat.contiguous().view(torch.uint8).numpy().data


def _vector(buffer: Buffer, dtype: torch.dtype, count: int) -> Tensor:
    view = memoryview(buffer).cast("B")
    if view.nbytes != count * dtype.itemsize:
        raise DecodeError(
            f"a buffer has {view.nbytes} bytes, its tensors need {count * dtype.itemsize}"
        )
    if not count:
        return torch.empty(0, dtype=dtype)
    # torch needs writable memory; only small, inline buffers are read-only.
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=dtype)
