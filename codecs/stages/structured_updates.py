"""Structured updates: a client trains within a small subspace, and sends all that changed.

Konecny et al. 2016, section 3. With such a stage in its uplink, a client projects its
gradient at every step (`Pipeline.project`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedmq.codecs import kernels
from fedmq.codecs.base import Buffer
from fedmq.codecs.errors import SpecError
from fedmq.codecs.stages.base import Context, Shapes, StageOrder, Values, ValueStage
from fedmq.codecs.stages.sparsifiers import SparseStage

_LARGEST_FRAME = 16
"""Limit on a frame's memory, as a multiple of its matrix's: a message could ask for more."""


class RandomMask(SparseStage):
    """Training and sending of a random subset of the values; the others do not change.

    keep: fraction of the values. The seed determines the subset.
    """

    name = "randommask"
    place = StageOrder.STRUCTURE

    def encode(self, values: Values, context: Context) -> tuple[Values, list[Buffer]]:
        """Return the values of the subset."""
        return kernels.gather(values, self._indices(context)), []

    def decode(self, values: Values, context: Context, side: Sequence[Buffer]) -> Values:  # noqa: ARG002
        """Return the values at their positions, and zeros elsewhere."""
        return kernels.scatter(values, self._indices(context), context.n)

    def _indices(self, context: Context) -> NDArray[np.int64]:
        return _mask(context.n, self.size(context.n, context.shapes), context.seed)


# Every training step of a task needs the same mask.
_mask = functools.lru_cache(maxsize=2)(kernels.mask)


class LowRank(ValueStage):
    """Low-rank matrices: W [out, in] is C A^T, and the seed determines A [in, rank].

    A kernel [out, in, h, w] is the matrix [out, in * h * w]. A has random signs / sqrt(in), the
    same to the bit at both ends; C = W A (A^T A)^-1 gives the nearest such matrix. A tensor is
    sent whole if it is not a matrix, not larger than its C, or has fewer than rank / 16 rows.

    rank: k, of every matrix.
    """

    name = "lowrank"
    place = StageOrder.STRUCTURE

    def __init__(self, rank: int) -> None:
        if type(rank) is not int or not 1 <= rank <= 1 << 16:
            raise SpecError(f"codec lowrank: rank must be a number from 1 to 65536, got {rank!r}")
        self.rank = rank

    def parameters(self) -> str:
        """Return the rank."""
        return str(self.rank)

    def size(self, n: int, shapes: Shapes) -> int:  # noqa: ARG002
        """Return the number of values in all C and in the tensors sent whole."""
        return sum(
            out * (self.rank if self._is_cut(out, width) else width)
            for out, width in map(_matrix, shapes)
        )

    def encode(self, values: Values, context: Context) -> tuple[Values, list[Buffer]]:
        """Return C of each matrix."""
        parts = []
        for matrix, frame in self._matrices(values, context):
            if frame is None:
                parts.append(matrix.reshape(-1))
                continue
            # The columns of a small A can be linearly dependent: hence the pseudo-inverse.
            gram = frame.T.astype(np.float64) @ frame.astype(np.float64)
            c = (matrix @ frame).astype(np.float64) @ np.linalg.pinv(gram, 1e-6, hermitian=True)
            parts.append(np.ascontiguousarray(c, np.float32).reshape(-1))
        return np.concatenate(parts) if parts else values, []

    def decode(self, values: Values, context: Context, side: Sequence[Buffer]) -> Values:  # noqa: ARG002
        """Return C A^T of each matrix."""
        full = np.empty(context.n, np.float32)
        start = 0
        for matrix, frame in self._matrices(full, context):
            out, width = matrix.shape
            size = out * (width if frame is None else self.rank)
            c = values[start : start + size].reshape(out, width if frame is None else self.rank)
            matrix[:] = c if frame is None else kernels.multiply(c, frame.T)
            start += size
        return full

    def _is_cut(self, out: int, width: int) -> bool:
        return out > 1 and self.rank < width and self.rank <= _LARGEST_FRAME * out

    def _matrices(
        self, values: Values, context: Context
    ) -> Iterator[tuple[Values, NDArray[np.float32] | None]]:
        """Yield each tensor as a view [out, in], and its A; None for tensors sent whole."""
        start = 0
        for index, shape in enumerate(context.shapes):
            out, width = _matrix(shape)
            frame = None
            if self._is_cut(out, width):
                signs = kernels.signs(width * self.rank, context.seed + index)
                frame = signs.reshape(width, self.rank) / np.float32(math.sqrt(width))
            yield values[start : start + out * width].reshape(out, width), frame
            start += out * width


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the sizes of a tensor as a matrix: the first, and the product of the others."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])
