"""Structured updates: what is trained, not only what is sent, is of a small form.

Konecny et al. 2016, section 3. With such a stage in its uplink a client's gradient is
projected at every step (`project`), so that what it sends is all that has changed. A
random mask is in `subsets`, beside the subsample that it resembles.
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
from fedmq.codecs.stages.base import Context, Shapes, StageOrder, Values, ValueStage, fraction
from fedmq.codecs.stages.sparsifiers import kept

_LARGEST_FRAME = 16
"""A frame takes at most so many times the memory of its matrix, whatever a message asks for."""


class RandomMask(ValueStage):
    """Only a random subset of the values is trained, and travels; the others do not change.

    keep: fraction of the values. Which they are follows from the seed.
    """

    name = "randommask"
    place = StageOrder.STRUCTURE

    def __init__(self, keep: float) -> None:
        self.keep = fraction("randommask", "keep", keep)

    def parameters(self) -> str:
        """Return the fraction."""
        return repr(self.keep)

    def size(self, n: int, shapes: Shapes) -> int:  # noqa: ARG002
        """Return how many of n values are trained."""
        return kept(n, self.keep)

    def encode(self, values: Values, context: Context) -> tuple[Values, list[Buffer]]:
        """Take the values of the subset."""
        return kernels.gather(values, self._chosen(context)), []

    def decode(self, values: Values, context: Context, sides: Sequence[Buffer]) -> Values:  # noqa: ARG002
        """Put the values where they were, and zeros elsewhere."""
        return kernels.scatter(values, self._chosen(context), context.n)

    def _chosen(self, context: Context) -> NDArray[np.int64]:
        return _mask(context.n, kept(context.n, self.keep), context.seed)


@functools.lru_cache(maxsize=2)
def _mask(n: int, k: int, seed: int) -> NDArray[np.int64]:
    """Return the mask of one task, which every step of its training asks for."""
    return kernels.mask(n, k, seed)


class LowRank(ValueStage):
    """Each matrix W [out, in] is C A^T, where A [in, rank] follows from the seed.

    A kernel [out, in, h, w] is the matrix [out, in * h * w]. A has random signs / sqrt(in), so
    that both ends have the same one to the bit; C = W A (A^T A)^-1 is the nearest there is. What
    is no matrix, or not larger than its C, or has few rows (less than rank / 16), travels whole.

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
        """Return the values of all C, and of what travels whole."""
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
            # The columns of a small A may depend on each other; a pseudo-inverse bears that.
            gram = frame.T.astype(np.float64) @ frame.astype(np.float64)
            c = (matrix @ frame).astype(np.float64) @ np.linalg.pinv(gram, 1e-6, hermitian=True)
            parts.append(np.ascontiguousarray(c, np.float32).reshape(-1))
        return np.concatenate(parts) if parts else values, []

    def decode(self, values: Values, context: Context, sides: Sequence[Buffer]) -> Values:  # noqa: ARG002
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
        """Yield each tensor as a view [out, in], with its A if it has one."""
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
    """Return a tensor's sizes as a matrix, [first, all the others]."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])
