"""Sending a part of the values: a random subset, or the largest.

Konecny et al. 2016, section 4 (subsampling).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmq.codecs import kernels
from fedmq.codecs.base import Buffer
from fedmq.codecs.errors import CodecError, DecodeError
from fedmq.codecs.stages.base import (
    Context,
    Shapes,
    StageOrder,
    Values,
    ValueStage,
    array_of,
    fraction,
)


class SparseStage(ValueStage):
    """A stage that sends a fixed fraction of the values.

    keep: fraction of the values that are sent.
    """

    def __init__(self, keep: float) -> None:
        self.keep = fraction(self.name, "keep", keep)

    def parameters(self) -> str:
        """Return the fraction."""
        return repr(self.keep)

    def size(self, n: int, shapes: Shapes) -> int:  # noqa: ARG002
        """Return how many of ``n`` values are sent: at least one, if there are any."""
        return max(1, round(self.keep * n)) if n else 0


class Subsample(SparseStage):
    """A random subset of the values, scaled by 1/keep so that their mean is unbiased.

    keep: fraction of the values that are sent. The seed determines the subset; the receiver
    treats the omitted values as zero.
    """

    name = "subsample"
    place = StageOrder.SUBSET

    def encode(self, values: Values, context: Context) -> tuple[Values, list[Buffer]]:
        """Return the scaled values of the subset."""
        k = self.size(context.n, context.shapes)
        indices = kernels.mask(context.n, k, context.seed)
        # n/k and not 1/keep: the subset has a whole number of values.
        return kernels.gather(values, indices) * np.float32(context.n / max(k, 1)), []

    def decode(self, values: Values, context: Context, side: Sequence[Buffer]) -> Values:  # noqa: ARG002
        """Return the values at their positions, and zeros elsewhere."""
        indices = kernels.mask(context.n, len(values), context.seed)
        return kernels.scatter(values, indices, context.n)


class TopK(SparseStage):
    """The values of largest magnitude, with their positions.

    keep: fraction of the values that are sent. The sender adds the omitted values to its next
    update (error feedback); without that, the sum would stay biased.
    """

    name = "topk"
    place = StageOrder.SUBSET
    error_feedback = True
    side_buffers = 1

    def encode(self, values: Values, context: Context) -> tuple[Values, list[Buffer]]:
        """Return the largest values, and the differences of their positions as uint32."""
        try:
            indices, largest = kernels.top(values, self.size(context.n, context.shapes))
        except ValueError as error:
            raise CodecError(f"topk: {error}") from None
        steps = np.diff(indices, prepend=np.int64(0)).astype(np.uint32)
        return largest, [steps.data.cast("B")]

    def decode(self, values: Values, context: Context, side: Sequence[Buffer]) -> Values:
        """Return the values at their positions, and zeros elsewhere."""
        steps = array_of(side[0], np.uint32, len(values))
        indices = np.cumsum(steps, dtype=np.int64)
        if len(indices) and (indices[-1] >= context.n or not steps[1:].all()):
            raise DecodeError("expected ascending positions, each below the number of values")
        return kernels.scatter(values, indices, context.n)
