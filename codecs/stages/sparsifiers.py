"""Sending some of the values: a random subset, or the largest.

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


class Subsample(ValueStage):
    """A random subset of the values, scaled by 1/keep so that their mean is right.

    keep: fraction of the values that travel. Which they are follows from the seed; the
    others are zero to the receiver.
    """

    name = "subsample"
    place = StageOrder.SUBSET

    def __init__(self, keep: float) -> None:
        self.keep = fraction("subsample", "keep", keep)

    def parameters(self) -> str:
        """Return the fraction."""
        return repr(self.keep)

    def size(self, n: int, shapes: Shapes) -> int:  # noqa: ARG002
        """Return how many of n values travel."""
        return kept(n, self.keep)

    def encode(self, values: Values, context: Context) -> tuple[Values, list[Buffer]]:
        """Take the values of the subset."""
        k = self.size(context.n, context.shapes)
        chosen = kernels.mask(context.n, k, context.seed)
        # n/k and not 1/keep: the subset has a whole number of values.
        return kernels.gather(values, chosen) * np.float32(self._scale(context.n, k)), []

    def decode(self, values: Values, context: Context, sides: Sequence[Buffer]) -> Values:  # noqa: ARG002
        """Put the values where they were, and zeros elsewhere."""
        chosen = kernels.mask(context.n, len(values), context.seed)
        return kernels.scatter(values, chosen, context.n)

    def _scale(self, n: int, k: int) -> float:
        return n / k if k else 1.0


class TopK(ValueStage):
    """The values of largest magnitude, with their places.

    keep: fraction of the values that travel. What does not is remembered by the sender and
    added to what it sends next (error feedback), or the sum would be biased for ever.
    """

    name = "topk"
    place = StageOrder.SUBSET
    sides = 1

    def __init__(self, keep: float) -> None:
        self.keep = fraction("topk", "keep", keep)

    def parameters(self) -> str:
        """Return the fraction."""
        return repr(self.keep)

    def size(self, n: int, shapes: Shapes) -> int:  # noqa: ARG002
        """Return how many of n values travel."""
        return kept(n, self.keep)

    def encode(self, values: Values, context: Context) -> tuple[Values, list[Buffer]]:
        """Take the largest values; their places travel as differences, one after the other."""
        k = self.size(context.n, context.shapes)
        try:
            places, largest = kernels.top(values, k)
        except ValueError as error:
            raise CodecError(f"topk: {error}") from None
        steps = np.diff(places, prepend=np.int64(0)).astype(np.uint32)
        return largest, [steps.data.cast("B")]

    def decode(self, values: Values, context: Context, sides: Sequence[Buffer]) -> Values:
        """Put the values where they were, and zeros elsewhere."""
        steps = array_of(sides[0], np.uint32, len(values))
        places = np.cumsum(steps, dtype=np.int64)
        if len(places) and (places[-1] >= context.n or not steps[1:].all()):
            raise DecodeError("expected places in order, each below the number of values")
        return kernels.scatter(values, places, context.n)


def kept(n: int, keep: float) -> int:
    """Return how many of n values a fraction is: at least one, if there are any."""
    return max(1, round(keep * n)) if n else 0
