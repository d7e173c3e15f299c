"""Base classes of pipeline stages: stages that transform values, and stages that write bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedmq.codecs.base import Buffer
from fedmq.codecs.errors import DecodeError, SpecError

Values = NDArray[np.float32]
"""float32 [n], contiguous."""
Shapes = tuple[tuple[int, ...], ...]
"""Shapes of the tensors that the first stage gets, concatenated in this order."""


class StageOrder(IntEnum):
    """Position of a stage in a pipeline; at most one stage per position."""

    SELECTION = 0
    STRUCTURE = 1
    BASIS = 2
    SUBSET = 3
    NUMBER = 4
    ENTROPY = 5


@dataclass(frozen=True)
class Context:
    """What sender and receiver both know.

    seed: of this stage.
    shapes: of the tensors in the pipeline's vector.
    n: number of values that the stage encodes.
    """

    seed: int
    shapes: Shapes
    n: int


class Stage(ABC):
    """One step of a pipeline, with its inverse.

    A stage is made from its call in the spec. A change to its bytes is a new ``version``.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    place: ClassVar[StageOrder]
    side_buffers: ClassVar[int] = 0
    """Number of buffers sent besides the values."""
    error_feedback: ClassVar[bool] = False
    """Whether the sender adds what the stage left out to its next update."""

    @abstractmethod
    def parameters(self) -> str:
        """Return the parameters as in the wire name, without parentheses."""


class ValueStage(Stage):
    """A stage that turns values into values."""

    @abstractmethod
    def size(self, n: int, shapes: Shapes) -> int:
        """Return the number of values that ``n`` values become, at most a small multiple."""

    @abstractmethod
    def encode(self, values: Values, context: Context) -> tuple[Values, list[Buffer]]:
        """Return the values for the next stage, and ``side_buffers`` buffers."""

    @abstractmethod
    def decode(self, values: Values, context: Context, side: Sequence[Buffer]) -> Values:
        """Return ``context.n`` values.

        Raises:
            DecodeError: the side buffers are damaged.
        """


class NumberStage(Stage):
    """A stage that turns values into bytes."""

    @abstractmethod
    def encode(self, values: Values, context: Context) -> list[Buffer]:
        """Return ``side_buffers + 1`` buffers, the values' last."""

    @abstractmethod
    def decode(self, context: Context, buffers: Sequence[Buffer]) -> Values:
        """Return ``context.n`` values.

        Raises:
            DecodeError: the buffers are damaged or have wrong sizes.
        """


def array_of(buffer: Buffer, dtype: np.dtype[np.generic] | type, count: int) -> NDArray[np.generic]:
    """Return the ``count`` numbers in a buffer, without a copy.

    Raises:
        DecodeError: the buffer has another size.
    """
    wanted = np.dtype(dtype)
    view = memoryview(buffer).cast("B")
    if view.nbytes != count * wanted.itemsize:
        raise DecodeError(
            f"expected a buffer of {count * wanted.itemsize} bytes, got {view.nbytes}"
        )
    return np.frombuffer(view, wanted) if count else np.empty(0, wanted)


def fraction(codec: str, parameter: str, value: object) -> float:
    """Return a parameter's value, checked to be a fraction.

    Raises:
        SpecError: it is not a number above 0 and at most 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise SpecError(f"codec {codec}: {parameter} must be above 0 and at most 1, got {value!r}")
    return float(value)
