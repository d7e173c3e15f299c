"""A model's outputs by sample or by label: ``logits(float16)``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedmq.codecs.base import Buffer, Codec, Encoded, Tensors
from fedmq.codecs.errors import CodecError, DecodeError, SpecError
from fedmq.codecs.formats import affine
from fedmq.codecs.formats.affine import LEVELS
from fedmq.codecs.formats.integers import (
    MAX_COUNT,
    pack_integers,
    packed_size,
    repeated,
    unpack_integers,
)
from fedmq.codecs.raw import DTYPES
from fedmq.codecs.text import shorten

_CHOICES = ("float32", "float16", "int8")
_MAX_CLASSES = 1 << 20
# A table by label is [classes, classes], and empty rows take no bytes: this limits it to 4 GiB.
_MAX_LABELS = 1 << 15


class Logits(Codec):
    """Logits, or probabilities, by sample id or by label.

    By sample: ``logits``, float32 [n, classes], and ``ids``, int64 [n], all different. By
    label: ``logits``, float32 [classes, classes], where row k is the mean over the samples of
    label k, and ``counts``, int64 [classes], the number of these samples. For a label without
    samples, the count is 0, and the row is 0 and not sent. Decoding returns the same names,
    shapes and dtypes.

    dtype: float32; float16 (11 significant bits, up to 65504); or int8, where each row has
    its own grid ``low + step * code`` of 256 values, both bfloat16: the error is at most half
    a step, and a step at most 1.01 * (max - min + |min| / 128) / 255 of the row. Values round
    to nearest, ties to even.

    ``meta``: ``shape`` of the logits, and ``ids`` or ``counts`` as in `formats.integers`. The
    first buffer holds ids or counts and, for int8, the minima and then the steps of the sent
    rows; the second holds these rows.

    FedGKT (He et al., NeurIPS 2020) sends logits by sample, federated distillation (Jeong et
    al., 2018) by label: 10 x 10 float32 values are the paper's 3,200 bits.
    """

    name = "logits"

    def __init__(self, dtype: str = "float16") -> None:
        if dtype not in _CHOICES:
            raise SpecError(f"codec logits: dtype must be float32, float16 or int8, got {dtype!r}")
        self.dtype = dtype

    def parameters(self) -> str:
        """Return the dtype."""
        return f"({self.dtype})"

    def encode(self, tensors: Tensors, seed: int) -> Encoded:  # noqa: ARG002 - nothing is random
        """Encode logits with ids or with counts.

        Raises:
            CodecError: the tensors are not as the class describes, an id is repeated, a label
                with count 0 has a row other than 0, or a value is not finite or beyond the
                dtype.
        """
        key, logits, keys = _checked(tensors)
        meta, head = pack_integers(keys)
        what, names, x = "logits of sample", keys, logits.detach()
        if key == "counts":
            present = (keys > 0).to(x.device)
            absent = ~present & (x != 0).any(dim=1)  # nan is not 0 either
            if bool(absent.any()):
                label = int(absent.nonzero()[0])
                raise CodecError(f"codec logits: label {label} has count 0, but its row is not 0")
            what, names, x = "logits of label", present.nonzero()[:, 0], x[present]
        values: Buffer = b""
        if x.numel():
            least, most = x.amin(dim=1), x.amax(dim=1)
            affine.check_reach(x, least, most, self.dtype, what, names)
            if self.dtype in LEVELS:
                grid = affine.fit_bfloat16(least, most, LEVELS[self.dtype])
                low, step = (each.to(x.device).view(-1, 1) for each in grid)
                values = affine.as_buffer(affine.quantize(x, low, step, LEVELS[self.dtype]))
                for each in grid:
                    head += bytes(affine.as_buffer(each.to(torch.bfloat16)))
            else:
                values = affine.as_buffer(x.to(DTYPES[self.dtype]))
        return Encoded(self.wire_name, {"shape": list(logits.shape), key: meta}, [head, values])

    def decode(self, encoded: Encoded, max_bytes: int) -> dict[str, Tensor]:
        """Decode logits with ids or counts; float32 ones by sample can share a buffer's memory.

        Decoding needs twice the tensors' memory; this is checked against ``max_bytes`` first.

        Raises:
            DecodeError: the message is damaged or hostile, or needs more than ``max_bytes``.
        """
        meta = encoded.meta
        if ("ids" in meta) == ("counts" in meta):
            raise DecodeError("expected either meta.ids or meta.counts")
        key = "ids" if "ids" in meta else "counts"
        n, classes = _shape(meta.get("shape"), key)
        need = 2 * n * (4 * classes + 2 * 8)
        if need > max_bytes:
            raise DecodeError(f"expected at most {max_bytes} bytes to decode, got {need}")
        key_bytes = packed_size(meta[key], n, key)
        # The number of rows follows from the received bytes, before any memory is allocated.
        row = classes * (1 if self.dtype in LEVELS else DTYPES[self.dtype].itemsize)
        rows = memoryview(encoded.buffers[-1]).nbytes // row if encoded.buffers else 0
        grid_bytes = 2 * rows if self.dtype in LEVELS else 0
        head, values = affine.head_and_values(encoded, key_bytes + 2 * grid_bytes)
        if values.nbytes != rows * row or rows > n or (key == "ids" and rows < n):
            raise DecodeError(f"expected {n} rows of {row} bytes, got {values.nbytes} bytes")
        keys = unpack_integers(meta[key], head[:key_bytes], n, key)
        if key == "ids" and (twice := repeated(keys)) is not None:
            raise DecodeError(f"expected each id once, got {twice} twice")
        if key == "counts" and n and int(keys.min()) < 0:
            raise DecodeError(f"expected counts of 0 or more, got {int(keys.min())}")
        if key == "counts" and rows != np.count_nonzero(keys):
            raise DecodeError(f"expected a row for each count above 0, got {rows} rows")
        x = self._rows(values, head[key_bytes:], rows, classes)
        if key == "counts":
            logits = torch.zeros((n, classes))
            logits[torch.from_numpy(keys) > 0] = x
            x = logits
        return {"logits": x, key: torch.from_numpy(keys)}

    def _rows(self, values: memoryview, grids: memoryview, rows: int, classes: int) -> Tensor:
        """Return float32 [rows, classes] from the second buffer and the grids in the first."""
        if self.dtype not in LEVELS:
            x = affine.vector(values, DTYPES[self.dtype]).view(rows, classes).float()
            affine.check_finite(x, "logits")
            return x
        both = affine.vector(grids, torch.bfloat16).view(2, rows, 1)
        low, step = affine.check_grid(both[0], both[1], LEVELS[self.dtype])
        return affine.dequantize(affine.vector(values, torch.uint8).view(rows, classes), low, step)


def _checked(tensors: Tensors) -> tuple[str, Tensor, Tensor]:
    """Return the key ("ids" or "counts"), the logits, and the tensor of that key, checked."""
    if set(tensors) not in ({"logits", "ids"}, {"logits", "counts"}):
        names = shorten(sorted(tensors))
        raise CodecError(f"codec logits: expected logits and either ids or counts, got {names}")
    key = "ids" if "ids" in tensors else "counts"
    logits, keys = tensors["logits"], tensors[key]
    shape = tuple(logits.shape)
    sound = logits.dtype == torch.float32 and len(shape) == 2
    if key == "ids":
        wanted, sound = "[n, classes]", sound and 0 < shape[1] <= _MAX_CLASSES
    else:
        wanted, sound = "[classes, classes]", sound and 0 < shape[0] == shape[1] <= _MAX_LABELS
    if not sound:
        raise CodecError(
            f"codec logits: expected logits as float32 {wanted} beside {key}, "
            f"got {logits.dtype} {list(shape)}"
        )
    if keys.dtype != torch.int64 or keys.shape != shape[:1]:
        raise CodecError(
            f"codec logits: expected {key} as int64 [{shape[0]}], "
            f"got {keys.dtype} {list(keys.shape)}"
        )
    if key == "ids" and (twice := repeated(keys.detach().cpu().numpy())) is not None:
        raise CodecError(f"codec logits: expected each id once, got {twice} twice")
    if key == "counts" and bool((keys < 0).any()):
        label = int((keys < 0).nonzero()[0])
        raise CodecError(f"codec logits: label {label} has a negative count {int(keys[label])}")
    return key, logits, keys


def _shape(shape: object, key: str) -> tuple[int, int]:
    if (
        not isinstance(shape, list | tuple)
        or len(shape) != 2
        or any(type(size) is not int for size in shape)
        or not 0 <= shape[0] < MAX_COUNT
        or not 0 < shape[1] <= _MAX_CLASSES
        or (key == "counts" and not shape[0] == shape[1] <= _MAX_LABELS)
    ):
        wanted = "[n, classes]" if key == "ids" else "[classes, classes]"
        raise DecodeError(f"expected meta.shape as {wanted}, got {shorten(shape)}")
    return shape[0], shape[1]
