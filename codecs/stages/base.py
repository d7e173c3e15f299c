"""What a stage of a pipeline is: values to fewer or other values, and at last to bytes."""

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
"""Of the tensors that the first stage's values are, end to end, in order."""


class StageOrder(IntEnum):
    """Where in a pipeline a stage may stand; at most one stage in each place."""

    SELECTION = 0
    STRUCTURE = 1
    BASIS = 2
    SUBSET = 3
    NUMBER = 4
    ENTROPY = 5


@dataclass(frozen=True)
class Context:
    """What both ends know. seed: of this stage; n: values that it was given."""

    seed: int
    shapes: Shapes
    n: int


class Stage(ABC):
    """One step, and its way back.

    A stage is made from its call in the spec. ``version`` changes with its bytes.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    place: ClassVar[StageOrder]
    sides: ClassVar[int] = 0
    """How many buffers travel beside the values."""

    @abstractmethod
    def parameters(self) -> str:
        """Return the parameters as they stand in the wire name, without parentheses."""


class ValueStage(Stage):
    """A stage that turns values into values."""

    @abstractmethod
    def size(self, n: int, shapes: Shapes) -> int:
        """Return how many values become of ``n``; bounded by a small multiple of ``n``."""

    @abstractmethod
    def encode(self, values: Values, context: Context) -> tuple[Values, list[Buffer]]:
        """Return the values that travel on, and what travels beside them."""

    @abstractmethod
    def decode(self, values: Values, context: Context, sides: Sequence[Buffer]) -> Values:
        """Return ``context.n`` values.

        Raises:
            DecodeError: what travelled beside them is damaged.
        """


class NumberStage(Stage):
    """The stage that turns values into bytes."""

    @abstractmethod
    def encode(self, values: Values, context: Context) -> list[Buffer]:
        """Return ``sides + 1`` buffers, the last of them the values'."""

    @abstractmethod
    def decode(self, context: Context, buffers: Sequence[Buffer]) -> Values:
        """Return ``context.n`` values.

        Raises:
            DecodeError: the buffers are damaged, or not of the sizes that they must have.
        """


def array_of(buffer: Buffer, dtype: np.dtype[np.generic] | type, count: int) -> NDArray[np.generic]:
    """Return the numbers in a buffer, without a copy.

    Raises:
        DecodeError: it holds another number of them.
    """
    wanted = np.dtype(dtype)
    view = memoryview(buffer).cast("B")
    if view.nbytes != count * wanted.itemsize:
        raise DecodeError(
            f"expected a buffer of {count * wanted.itemsize} bytes, got {view.nbytes}"
        )
    return np.frombuffer(view, wanted) if count else np.empty(0, wanted)


def fraction(codec: str, parameter: str, value: object) -> float:
    """Return a fraction.

    Raises:
        SpecError: it is none above 0 and at most 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise SpecError(f"codec {codec}: {parameter} must be above 0 and at most 1, got {value!r}")
    return float(value)
