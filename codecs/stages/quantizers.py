"""Stages that write values as float32, half-precision floats or packed codes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedmq.codecs import kernels
from fedmq.codecs.base import Buffer
from fedmq.codecs.errors import CodecError, DecodeError, SpecError
from fedmq.codecs.stages.base import Context, NumberStage, StageOrder, Values, array_of

_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_BLOCK = kernels.MAX_BLOCK


class Float32(NumberStage):
    """float32 values; the default if a pipeline names no other number stage."""

    name = "float32"
    place = StageOrder.NUMBER

    def parameters(self) -> str:
        """Return an empty string."""
        return ""

    def encode(self, values: Values, context: Context) -> list[Buffer]:  # noqa: ARG002
        """Return the bytes of the values."""
        return [np.ascontiguousarray(values).data.cast("B")]

    def decode(self, context: Context, buffers: Sequence[Buffer]) -> Values:
        """Return the values."""
        return array_of(buffers[0], np.float32, context.n).astype(np.float32)


class Half(NumberStage):
    """Values rounded to float16 or bfloat16, as the codec ``cast`` does."""

    name = "cast"
    place = StageOrder.NUMBER

    def __init__(self, dtype: str) -> None:
        if dtype not in _HALVES:
            raise SpecError(f"codec cast: dtype must be float16 or bfloat16, got {dtype!r}")
        self.dtype = dtype

    def parameters(self) -> str:
        """Return the dtype."""
        return self.dtype

    def encode(self, values: Values, context: Context) -> list[Buffer]:  # noqa: ARG002
        """Return the rounded values."""
        narrow = torch.from_numpy(values).to(_HALVES[self.dtype])
        return [narrow.view(torch.uint8).numpy().data]

    def decode(self, context: Context, buffers: Sequence[Buffer]) -> Values:
        """Return the values as float32."""
        narrow = array_of(buffers[0], np.int16, context.n).copy()
        wide: Values = torch.from_numpy(narrow).view(_HALVES[self.dtype]).float().numpy()
        return wide


class Quantize(NumberStage):
    """Probabilistic quantization to 2^bits levels between a block's minimum and maximum.

    Konecny et al. 2016, section 4; Caldas et al. 2018, section 3. A value is rounded up or
    down at random, without bias. 2^bits levels are 2^bits - 1 intervals; one bit gives the
    minimum or the maximum. Both are sent with each block as float32.

    bits: per code, 1 to 8. block: values that share a minimum and a maximum.
    """

    name = "quantize"
    place = StageOrder.NUMBER
    side_buffers = 1

    def __init__(self, bits: int, block: int = 4096) -> None:
        if type(bits) is not int or not 1 <= bits <= 8:
            raise SpecError(f"codec quantize: bits must be from 1 to 8, got {bits!r}")
        if type(block) is not int or not 1 <= block <= MAX_BLOCK:
            raise SpecError(f"codec quantize: block must be from 1 to {MAX_BLOCK}, got {block!r}")
        self.bits, self.block = bits, block

    def parameters(self) -> str:
        """Return bits and block."""
        return f"{self.bits}, {self.block}"

    def encode(self, values: Values, context: Context, basis: kernels.Basis = None) -> list[Buffer]:
        """Return the blocks' ranges and the packed codes of the values in ``basis``.

        Raises:
            CodecError: a value is not finite.
        """
        try:
            codes, ranges = kernels.quantize(values, self.bits, self.block, context.seed, basis)
        except ValueError as error:
            raise CodecError(f"quantize: {error}") from None
        return [ranges.data.cast("B"), codes.data.cast("B")]

    def decode(
        self, context: Context, buffers: Sequence[Buffer], basis: kernels.Basis = None
    ) -> Values:
        """Return the values of the codes."""
        flat = np.frombuffer(memoryview(buffers[0]).cast("B"), np.uint8)
        codes = np.frombuffer(memoryview(buffers[1]).cast("B"), np.uint8)
        if flat.size % 8:
            raise DecodeError(f"expected pairs of float32, got {flat.size} bytes")
        ranges = flat.view(np.float32).reshape(-1, 2)
        try:
            return kernels.dequantize(codes, ranges, context.n, self.bits, self.block, basis)
        except ValueError as error:
            raise DecodeError(f"quantize: {error}") from None
