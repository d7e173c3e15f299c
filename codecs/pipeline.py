"""Codecs made of stages: ``kashin(4096) | subsample(0.5) | quantize(2) | entropy``.

The large float32 tensors of a group are concatenated to one vector; the stages transform it
one after the other, and the last one writes it. Tensors below the size limit (biases, norms)
and those of other dtypes are sent unchanged: they are small, and errors in them cost most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from fedmq.codecs import kernels
from fedmq.codecs.base import Buffer, Codec, Encoded, Tensors
from fedmq.codecs.errors import CodecError, DecodeError, SpecError
from fedmq.codecs.formats.flat import as_flat
from fedmq.codecs.raw import Raw, read_table
from fedmq.codecs.stages.base import (
    Context,
    NumberStage,
    Shapes,
    Stage,
    StageOrder,
    Values,
    ValueStage,
)
from fedmq.codecs.stages.entropy import Entropy
from fedmq.codecs.stages.quantizers import Float32, Half, Quantize
from fedmq.codecs.stages.sparsifiers import Subsample, TopK
from fedmq.codecs.stages.structured_updates import LowRank, RandomMask
from fedmq.codecs.stages.transforms import BasisStage, Hadamard, Identity, Kashin
from fedmq.codecs.text import shorten

LIMIT = 1000
"""Smallest number of values in a large matrix or kernel, without a `Limit` stage."""
_MAX_VALUES = 1 << 38


class Limit(Stage):
    """The smallest float32 tensor that the pipeline encodes, vectors included.

    values: the limit, in values; 0 includes all float32 tensors. They include the running
    variances of BatchNorm, and an error can make one negative.
    """

    name = "limit"
    place = StageOrder.SELECTION

    def __init__(self, values: int) -> None:
        if type(values) is not int or not 0 <= values <= 1 << 40:
            raise SpecError(f"codec limit: expected a number of values, got {values!r}")
        self.values = values

    def parameters(self) -> str:
        """Return the limit."""
        return str(self.values)


STAGES: Mapping[str, type[Stage]] = {
    each.name: each
    for each in (
        Limit,
        LowRank,
        RandomMask,
        Identity,
        Hadamard,
        Kashin,
        Subsample,
        TopK,
        Half,
        Quantize,
        Entropy,
    )
}
"""The stages by their name in a spec."""


class Pipeline(Codec):
    """A codec of several stages.

    ``meta``: ``tensors`` as in raw; ``large``, the indices of the tensors that the stages
    encode; ``seed``; ``sizes`` of compressed buffers. The buffers are the stages' side
    buffers in order, the values, and the small tensors.

    Args:
        stages: in `StageOrder`, at most one per position.

    Raises:
        SpecError: the stages are in another order.
    """

    name = "pipeline"

    def __init__(self, stages: Sequence[Stage]) -> None:
        places = [stage.place for stage in stages]
        if sorted(set(places)) != places:
            order = ", ".join(
                f"{place.name.lower()} ({', '.join(_at(place))})" for place in StageOrder
            )
            names = " | ".join(stage.name for stage in stages)
            raise SpecError(f"codec {names}: expected stages in this order, one of each: {order}")
        self.stages = list(stages)
        self._limit = next((s.values for s in stages if isinstance(s, Limit)), None)
        self._values = [stage for stage in stages if isinstance(stage, ValueStage)]
        self._number = next((s for s in stages if isinstance(s, NumberStage)), Float32())
        self._entropy = next((s for s in stages if isinstance(s, Entropy)), None)
        self._raw = Raw()

    @property
    def wire_name(self) -> str:
        """Return the stages with their versions."""
        return " | ".join(
            f"{stage.name}@{stage.version}" + (f"({text})" if (text := stage.parameters()) else "")
            for stage in self.stages
        )

    @property
    def deltas_only(self) -> bool:
        """Return whether a stage sends only some values."""
        return any(
            stage.place in (StageOrder.STRUCTURE, StageOrder.SUBSET) for stage in self.stages
        )

    @property
    def error_feedback(self) -> bool:
        """Return whether a stage leaves out values that the sender adds to its next update."""
        return any(stage.error_feedback for stage in self.stages)

    @property
    def structured(self) -> bool:
        """Return whether the pipeline has ``lowrank`` or ``randommask``."""
        return any(stage.place == StageOrder.STRUCTURE for stage in self.stages)

    def project(self, update: Tensors, seed: int) -> None:
        """Project the large tensors, in place, onto those that `encode` keeps whole."""
        large = [each for each in update.values() if self._is_large(each)]
        if not large or not self.structured:
            return
        shapes = tuple(tuple(each.shape) for each in large)
        values = as_flat([each.detach().cpu() for each in large]).contiguous().numpy()
        context = Context(_seed(seed, 0), shapes, len(values))
        stage = self._values[0]
        encoded, side = stage.encode(values, context)
        flat = torch.from_numpy(stage.decode(encoded, context, side))
        for tensor, part in zip(large, torch.split(flat, [t.numel() for t in large]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def encode(self, tensors: Tensors, seed: int) -> Encoded:
        """Encode tensors.

        Raises:
            CodecError: a value cannot be encoded, for example NaN by ``quantize``.
        """
        table = [
            [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            for name, tensor in tensors.items()
        ]
        large = [i for i, each in enumerate(tensors.values()) if self._is_large(each)]
        names = list(tensors)
        if not self._can_count(sum(tensors[names[i]].numel() for i in large)):
            raise CodecError(f"expected at most {kernels.MAX_VALUES} values to choose from")
        on_cpu = [tensors[names[i]].detach().cpu() for i in large]
        small = {name: t for name, t in tensors.items() if not self._is_large(t)}
        buffers = self._write(on_cpu, seed) if on_cpu else []
        buffers += self._raw.encode(small, 0).buffers
        meta: dict[str, Any] = {"tensors": table, "large": large, "seed": seed}
        if self._entropy is not None:
            buffers, meta["sizes"] = self._entropy.compress(buffers)
        return Encoded(self.wire_name, meta, buffers)

    def decode(self, encoded: Encoded, max_bytes: int) -> dict[str, Tensor]:
        """Decode tensors; the large ones are adjacent views of one vector."""
        table = read_table(encoded.meta)
        large = _indices(encoded.meta.get("large"), len(table))
        seed = encoded.meta.get("seed")
        if type(seed) is not int or not 0 <= seed < 1 << 64:
            raise DecodeError(f"expected meta.seed as an unsigned 64-bit seed, got {shorten(seed)}")
        if any(table[i][1] != torch.float32 for i in large):
            raise DecodeError("expected the large tensors to be float32")
        total = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in table)
        # A stage may need several times the memory of its result.
        if total > max_bytes // 8 or total > _MAX_VALUES:
            raise DecodeError(f"expected at most {max_bytes // 8} bytes of tensors, got {total}")
        if not self._can_count(sum(math.prod(table[i][2]) for i in large)):
            raise DecodeError(f"expected at most {kernels.MAX_VALUES} values to choose from")
        buffers: Sequence[Buffer] = encoded.buffers
        if self._entropy is not None:
            buffers = self._entropy.decompress(buffers, encoded.meta.get("sizes"), 8 * total + 4096)
        shapes = tuple(table[i][2] for i in large)
        count = self._buffers() if large else 0
        if len(buffers) < count:
            raise DecodeError(f"expected at least {count} buffers, got {len(buffers)}")
        decoded: dict[str, Tensor] = {}
        if large:
            flat = torch.from_numpy(self._read(shapes, seed, buffers[:count]))
            views = torch.split(flat, [math.prod(shape) for shape in shapes])
            for i, view in zip(large, views, strict=True):
                decoded[table[i][0]] = view.view(table[i][2])
        rest = [
            [name, str(dtype).removeprefix("torch."), list(shape)]
            for name, dtype, shape in table
            if name not in decoded
        ]
        small = Encoded(self._raw.wire_name, {"tensors": rest}, buffers[count:])
        decoded |= self._raw.decode(small, max_bytes)
        return {name: decoded[name] for name, _, _ in table}

    def _is_large(self, tensor: Tensor) -> bool:
        if self._limit is None:
            # A vector may hold BatchNorm's variances, which must not become negative.
            return tensor.dtype == torch.float32 and tensor.dim() > 1 and tensor.numel() >= LIMIT
        return tensor.dtype == torch.float32 and tensor.numel() >= max(1, self._limit)

    def _can_count(self, values: int) -> bool:
        """Return whether a stage that selects values can index this many."""
        return values <= kernels.MAX_VALUES or not self.deltas_only

    def _buffers(self) -> int:
        return sum(stage.side_buffers for stage in [*self._values, self._number]) + 1

    def _write(self, tensors: Sequence[Tensor], seed: int) -> list[Buffer]:
        shapes: Shapes = tuple(tuple(each.shape) for each in tensors)
        values: Values = as_flat(tensors).contiguous().numpy()
        buffers: list[Buffer] = []
        for index, stage in enumerate(self._own_passes):
            context = Context(_seed(seed, index), shapes, len(values))
            values, side = stage.encode(values, context)
            buffers += side
        context = Context(_seed(seed, len(self._values)), shapes, len(values))
        values = np.ascontiguousarray(values)
        if isinstance(self._number, Quantize):
            return buffers + self._number.encode(values, context, self._basis(seed))
        return buffers + self._number.encode(values, context)

    def _read(self, shapes: Shapes, seed: int, buffers: Sequence[Buffer]) -> Values:
        n = sum(math.prod(shape) for shape in shapes)
        contexts = []
        for index, stage in enumerate(self._own_passes):
            contexts.append(Context(_seed(seed, index), shapes, n))
            n = stage.size(n, shapes)
        end = len(buffers) - self._number.side_buffers - 1
        last = Context(_seed(seed, len(self._values)), shapes, n)
        if isinstance(self._number, Quantize):
            values = self._number.decode(last, buffers[end:], self._basis(seed))
        else:
            values = self._number.decode(last, buffers[end:])
        for stage, context in zip(reversed(self._own_passes), reversed(contexts), strict=True):
            side = buffers[end - stage.side_buffers : end]
            end -= stage.side_buffers
            values = stage.decode(values, context, side)
        return values

    @property
    def _own_passes(self) -> list[ValueStage]:
        """Return the stages that run as a pass of their own.

        A basis directly before a quantization of the same blocks does not: the quantization
        transforms each block while it is in cache. The bytes are the same.
        """
        last = self._values[-1] if self._values else None
        number = self._number
        if (
            isinstance(last, BasisStage)
            and isinstance(number, Quantize)
            and number.block == last.block
        ):
            return self._values[:-1]
        return self._values

    def _basis(self, seed: int) -> kernels.Basis:
        if len(self._own_passes) == len(self._values):
            return None
        stage = self._values[-1]
        assert isinstance(stage, BasisStage)  # noqa: S101 - see `_own_passes`
        return stage.basis(_seed(seed, len(self._values) - 1))


def _at(place: StageOrder) -> list[str]:
    return [name for name, stage in STAGES.items() if stage.place == place]


def _seed(seed: int, index: int) -> int:
    """Return a stage's own seed, 63 bits."""
    return int(xxhash.xxh3_64_intdigest(f"{seed}/{index}".encode())) >> 1


def _indices(value: object, count: int) -> list[int]:
    """Return ascending indices of tensors.

    Raises:
        DecodeError: ``value`` is not a list of them.
    """
    if (
        not isinstance(value, list | tuple)
        or len(value) > count
        or any(type(i) is not int or not 0 <= i < count for i in value)
        or list(value) != sorted(set(value))
    ):
        raise DecodeError(f"expected meta.large as indices of tensors, got {shorten(value)}")
    return list(value)
