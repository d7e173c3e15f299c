"""Activations by sample id with their labels: ``features(float16)``, ``features(int4, none)``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import zstandard
from torch import Tensor

from fedmq.codecs.base import Buffer, Codec, Encoded, Tensors
from fedmq.codecs.errors import CodecError, DecodeError, SpecError
from fedmq.codecs.formats import affine
from fedmq.codecs.formats.affine import LEVELS, REACH, Grid
from fedmq.codecs.formats.integers import (
    MAX_COUNT,
    Integers,
    pack_integers,
    packed_size,
    repeated,
    unpack_integers,
)
from fedmq.codecs.raw import DTYPES
from fedmq.codecs.text import shorten

_PACKS = ("zstd", "none")
_MAX_ELEMENTS = 1 << 40
# On feature maps after a ReLU, level 3 is half as fast and no smaller; a bitmap of the zeros
# before zstd saves a tenth at best. docs/codecs.md has the measurements.
_LEVEL = 1
# A zstd block turns 4 bytes into at most 128 KiB, so no valid frame grows more than this.
_MAX_GROWTH = 1 << 15
_MAX_WINDOW = 1 << 22
# Elements per conversion: few enough for a CPU's caches, and enough to fill a GPU.
_BLOCK, _DEVICE_BLOCK = 1 << 17, 1 << 26


class Features(Codec):
    """Feature maps or vectors by sample, with labels.

    Tensors: ``features``, float32 [n, c, ...] with one to three sizes after n; ``ids``,
    int64 [n], all different; optionally ``labels``, int64 [n]. Decoding returns these names,
    shapes and dtypes, with the samples in the same order.

    dtype: float32; float16 (11 significant bits); bfloat16 (8 bits, float32's range); int8
    or int4: each channel has its own grid ``low + step * code`` of 256 or 16 values, where
    step is (max - min) / 255 or 15 of the channel, and the error at most half a step. Values
    round to nearest, ties to even; zero decodes to exactly zero if it is within the range.
    pack: zstd compresses the values if that saves bytes; none does not try.

    ``meta``: ``shape`` of the features; ``ids`` and ``labels`` (None without labels) as in
    `formats.integers`; ``zstd``, whether the values are compressed. The first buffer holds
    ids, labels, and for int8 and int4 the float32 minima and then the float32 steps of the c
    channels. The second holds the values in the tensor's order; for int4 two per byte, the
    first in the low half, and each sample starts at a byte.

    FedGKT (He et al., NeurIPS 2020) sends feature maps of 16 x 32 x 32 and labels.
    """

    name = "features"

    def __init__(self, dtype: str = "float16", pack: str = "zstd") -> None:
        if dtype not in REACH:
            raise SpecError(f"codec features: dtype must be {_or(REACH)}, got {dtype!r}")
        if pack not in _PACKS:
            raise SpecError(f"codec features: pack must be {_or(_PACKS)}, got {pack!r}")
        self.dtype = dtype
        self.pack = pack

    def parameters(self) -> str:
        """Return dtype and pack."""
        return f"({self.dtype}, {self.pack})"

    def encode(self, tensors: Tensors, seed: int) -> Encoded:  # noqa: ARG002 - nothing is random
        """Encode features, ids and labels; only zstd does not run on the tensors' device.

        Raises:
            CodecError: the tensors are not as the class describes, an id is repeated, or a value
                is not finite or beyond the dtype.
        """
        features, ids, labels = _checked(tensors)
        id_meta, head = pack_integers(ids)
        label_meta = None
        if labels is not None:
            label_meta, more = pack_integers(labels)
            head += more
        x = _channels(features.detach().contiguous())
        values: Buffer = b""
        grid = Grid(torch.zeros(x.shape[1]), torch.ones(x.shape[1]))
        if x.numel():
            least, most = x.amin(dim=(0, 2)), x.amax(dim=(0, 2))
            affine.check_reach(x, least, most, self.dtype, "features of sample", ids)
            if self.dtype in LEVELS:
                grid = affine.fit(least, most, LEVELS[self.dtype])
            values = self._narrow(x, grid)
        if self.dtype in LEVELS:
            head += bytes(affine.as_buffer(grid.low)) + bytes(affine.as_buffer(grid.step))
        packed = None
        if self.pack == "zstd":
            packed = zstandard.ZstdCompressor(level=_LEVEL).compress(values)
            packed = packed if len(packed) < memoryview(values).nbytes else None
        meta = {
            "shape": list(features.shape),
            "ids": id_meta,
            "labels": label_meta,
            "zstd": packed is not None,
        }
        return Encoded(self.wire_name, meta, [head, values if packed is None else packed])

    def decode(self, encoded: Encoded, max_bytes: int) -> dict[str, Tensor]:
        """Decode features, ids and labels into new memory on the CPU.

        Decoding needs memory for the tensors, the decompressed values, the ids twice, and the
        conversion of a sample; the sum is checked against ``max_bytes`` first. Samples are
        converted in groups of up to 512 KiB.

        Raises:
            DecodeError: the message is damaged or hostile, or needs more than ``max_bytes``.
        """
        meta = encoded.meta
        shape, packed = _shape(meta.get("shape")), meta.get("zstd")
        if type(packed) is not bool:
            raise DecodeError(f"expected meta.zstd as true or false, got {shorten(packed)}")
        n, channels, size = shape[0], shape[1], math.prod(shape[1:])
        row = self._row_bytes(size)
        need = n * (4 * size + row + 4 * 8) + 8 * size
        if need > max_bytes:
            raise DecodeError(f"expected at most {max_bytes} bytes to decode, got {need}")
        id_bytes = packed_size(meta.get("ids"), n, "ids")
        labelled = meta.get("labels") is not None
        label_bytes = packed_size(meta["labels"], n, "labels") if labelled else 0
        grid_bytes = 4 * channels if self.dtype in LEVELS else 0
        head, body = affine.head_and_values(encoded, id_bytes + label_bytes + 2 * grid_bytes)
        values = _unzstd(body, n * row) if packed else body
        if values.nbytes != n * row:
            raise DecodeError(f"values have {values.nbytes} bytes, their shape needs {n * row}")
        ids = unpack_integers(meta["ids"], head[:id_bytes], n, "ids")
        if (twice := repeated(ids)) is not None:
            raise DecodeError(f"expected each id once, got {twice} twice")
        head = head[id_bytes:]
        labels: Integers | None = None
        if labelled:
            labels = unpack_integers(meta["labels"], head[:label_bytes], n, "labels")
            head = head[label_bytes:]
        low = affine.vector(head[:grid_bytes], torch.float32)
        step = affine.vector(head[grid_bytes:], torch.float32)
        x = self._widen(values, Grid(low, step), n, channels, size)
        tensors = {"features": x.view(shape), "ids": torch.from_numpy(ids)}
        if labels is not None:
            tensors["labels"] = torch.from_numpy(labels)
        return tensors

    def _row_bytes(self, size: int) -> int:
        if self.dtype == "int4":
            return (size + 1) // 2
        return size * (1 if self.dtype == "int8" else DTYPES[self.dtype].itemsize)

    def _narrow(self, x: Tensor, grid: Grid) -> Buffer:
        """Return the encoded values of x, float32 [n, c, size], before zstd."""
        if self.dtype not in LEVELS:
            return affine.as_buffer(x.to(DTYPES[self.dtype]))
        levels = LEVELS[self.dtype]
        low, step = (each.to(x.device).view(1, -1, 1) for each in grid)
        codes = torch.empty(
            (x.shape[0], self._row_bytes(x[0].numel())), dtype=torch.uint8, device=x.device
        )
        for rows in _blocks(x.shape[0], x[0].numel(), x.is_cuda):
            block = affine.quantize(x[rows], low, step, levels).flatten(1)
            codes[rows] = affine.pack_nibbles(block) if self.dtype == "int4" else block
        return affine.as_buffer(codes)

    def _widen(self, values: memoryview, grid: Grid, n: int, channels: int, size: int) -> Tensor:
        """Return float32 [n, channels, size // channels] from the values of `_narrow`."""
        if self.dtype in LEVELS:
            grid = affine.check_grid(grid.low, grid.step, LEVELS[self.dtype])
        low, step = (each.view(1, -1, 1) for each in grid)
        x = torch.empty((n, channels, size // channels))
        row = self._row_bytes(size)
        for rows in _blocks(n, size, cuda=False):
            bits = affine.vector(values[rows.start * row : rows.stop * row], torch.uint8)
            if self.dtype not in LEVELS:
                x[rows] = bits.view(DTYPES[self.dtype]).view(x[rows].shape)
                affine.check_finite(x[rows], "features")
                continue
            bits = bits.view(-1, row)
            codes = affine.unpack_nibbles(bits, size) if self.dtype == "int4" else bits
            x[rows] = affine.dequantize(codes.view(x[rows].shape), low, step)
        return x


def _checked(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return features, ids and labels, checked against each other."""
    if not {"features", "ids"} <= set(tensors) <= {"features", "ids", "labels"}:
        names = shorten(sorted(tensors))
        raise CodecError(f"codec features: expected features, ids, optional labels, got {names}")
    features, ids, labels = tensors["features"], tensors["ids"], tensors.get("labels")
    shape = tuple(features.shape)
    if features.dtype != torch.float32 or not 2 <= len(shape) <= 4 or 0 in shape[1:]:
        raise CodecError(
            "codec features: expected features as float32 [n, channels, ...] with 2 to 4 sizes, "
            f"only n may be 0, got {features.dtype} {list(shape)}"
        )
    for name, each in (("ids", ids), ("labels", labels)):
        if each is not None and (each.dtype != torch.int64 or each.shape != shape[:1]):
            raise CodecError(
                f"codec features: expected {name} as int64 [{shape[0]}], "
                f"got {each.dtype} {list(each.shape)}"
            )
    if (twice := repeated(ids.detach().cpu().numpy())) is not None:
        raise CodecError(f"codec features: expected each id once, got {twice} twice")
    return features, ids, labels


def _shape(shape: object) -> tuple[int, ...]:
    if (
        not isinstance(shape, list | tuple)
        or not 2 <= len(shape) <= 4
        or any(type(size) is not int for size in shape)
        or not 0 <= shape[0] < MAX_COUNT
        or any(not 0 < size < _MAX_ELEMENTS for size in shape[1:])
        or max(shape[0], 1) * math.prod(shape[1:]) >= _MAX_ELEMENTS
    ):
        raise DecodeError(f"expected meta.shape as [n, channels, ...], got {shorten(shape)}")
    return tuple(shape)


def _unzstd(body: memoryview, size: int) -> memoryview:
    """Return the ``size`` bytes in a zstd frame; never allocate more.

    Raises:
        DecodeError: the frame is damaged or states another size.
    """
    if size > _MAX_GROWTH * body.nbytes:
        raise DecodeError(f"{body.nbytes} bytes cannot be the zstd frame of {size} bytes")
    try:
        # zstd allocates the size in the frame's header, and never writes more.
        stated = zstandard.frame_content_size(body)
        if stated != size:
            raise DecodeError(f"a zstd frame states {stated} bytes, its shape needs {size}")
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        values = decompressor.decompress(body, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DecodeError(f"cannot read the zstd frame: {error}") from None
    return memoryview(values)


def _channels(x: Tensor) -> Tensor:
    """Return x [n, c, ...] as [n, c, size]."""
    return x.reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:]))


def _blocks(rows: int, size: int, cuda: bool) -> Iterator[slice]:  # noqa: FBT001 - x.is_cuda
    """Yield slices of rows, each of about one block of elements."""
    count = max(1, (_DEVICE_BLOCK if cuda else _BLOCK) // size)
    for start in range(0, rows, count):
        yield slice(start, min(start + count, rows))


def _or(choices: Mapping[str, Any] | tuple[str, ...]) -> str:
    *others, last = choices
    return f"{', '.join(others)} or {last}"
