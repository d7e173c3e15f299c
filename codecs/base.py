"""What a codec is: tensors to bytes and back, where decoding needs only the message."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

Buffer = bytes | bytearray | memoryview
Tensors = Mapping[str, Tensor]

MAX_DECODED_BYTES = 1 << 40


@dataclass(frozen=True)
class Encoded:
    """Tensors as they travel.

    codec: wire name with version and parameters, for example ``cast@1(float16)``.
    meta: what decoding needs besides the bytes; plain numbers, strings, lists and maps.
    buffers: the bytes.
    """

    codec: str
    meta: Mapping[str, Any]
    buffers: Sequence[Buffer]

    @property
    def nbytes(self) -> int:
        """Return the number of payload bytes."""
        return sum(memoryview(buffer).nbytes for buffer in self.buffers)


class Codec(ABC):
    """One way to write a group of named tensors.

    A codec is made from a spec (``cast(float16)``) by the registry. What it writes is
    named on the wire by name, version and parameters; a change to the bytes is a new
    version, and old versions stay readable.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1

    @property
    def wire_name(self) -> str:
        """Return the name that stands beside every group that this codec has encoded."""
        return f"{self.name}@{self.version}{self.parameters()}"

    def parameters(self) -> str:
        """Return the parameters as they stand in the wire name, parentheses included."""
        return ""

    @property
    def deltas_only(self) -> bool:
        """Tell whether what is not sent is taken for zero: it may be an update, but no model."""
        return False

    @property
    def error_feedback(self) -> bool:
        """Tell whether a sender must add to its next update what this codec has left out."""
        return False

    @property
    def structured(self) -> bool:
        """Tell whether `project` does anything."""
        return False

    def project(self, update: Tensors, seed: int) -> None:  # noqa: B027 - most do nothing here
        """Project an update, in place, onto those that `encode` of this seed writes as a whole.

        Of a structured update (Konecny et al. 2016, section 3) that is done with every
        gradient while a client trains; other codecs leave the update as it is.
        """

    @abstractmethod
    def encode(self, tensors: Tensors, seed: int) -> Encoded:
        """Write tensors; all that is random follows from ``seed``.

        The buffers may share memory with the tensors, which must then stay as they are.
        """

    @abstractmethod
    def decode(self, encoded: Encoded, max_bytes: int) -> dict[str, Tensor]:
        """Read what `encode` of this version wrote; the tensors may share the buffers' memory.

        Raises:
            DecodeError: the message is damaged or hostile; at most ``max_bytes`` are taken.
        """
