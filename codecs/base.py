"""The codec interface: tensors to bytes and back, where decoding needs only the message."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedmq.codecs.errors import CodecError

Buffer = bytes | bytearray | memoryview
Tensors = Mapping[str, Tensor]

MAX_DECODED_BYTES = 1 << 40
_RENAMED = {"updates_only": "deltas_only", "remembers": "error_feedback", "restrict": "project"}
"""Names of 0.1.0: a user's codec that still has one would silently do without it."""


@dataclass(frozen=True)
class Encoded:
    """Encoded tensors.

    codec: wire name with version and parameters, for example ``cast@1(float16)``.
    meta: other data for decoding; plain numbers, strings, lists and maps.
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
    """An encoding of a group of named tensors.

    The registry makes a codec from a spec (``cast(float16)``). Its name, version and
    parameters are sent with the bytes; a change to the bytes is a new version, and old
    versions stay readable.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check a subclass.

        Raises:
            CodecError: it defines something under its name of 0.1.0.
        """
        super().__init_subclass__(**kwargs)
        for old, new in _RENAMED.items():
            if old in vars(cls):
                raise CodecError(f"{cls.__name__}.{old} is now called {new}: rename it")

    @property
    def wire_name(self) -> str:
        """Return the name that is sent with every encoded group."""
        return f"{self.name}@{self.version}{self.parameters()}"

    def parameters(self) -> str:
        """Return the parameters as in the wire name, with parentheses."""
        return ""

    @property
    def deltas_only(self) -> bool:
        """Whether decoding treats omitted values as zero: for updates only, not for models."""
        return False

    @property
    def error_feedback(self) -> bool:
        """Whether a sender must add the values omitted by this codec to its next update."""
        return False

    @property
    def structured(self) -> bool:
        """Whether `project` changes an update."""
        return False

    def project(self, update: Tensors, seed: int) -> None:  # noqa: B027 - most do nothing here
        """Project an update, in place, onto the updates that `encode` of this seed keeps whole.

        For structured updates (Konecny et al. 2016, section 3), a client projects every gradient
        during training; other codecs do not change the update.
        """

    @abstractmethod
    def encode(self, tensors: Tensors, seed: int) -> Encoded:
        """Encode tensors; ``seed`` determines all random choices.

        The buffers can share memory with the tensors: do not change these while the buffers
        are in use.

        Raises:
            CodecError: the codec cannot encode a tensor or a value.
        """

    @abstractmethod
    def decode(self, encoded: Encoded, max_bytes: int) -> dict[str, Tensor]:
        """Decode the result of `encode`; the tensors can share the buffers' memory.

        Raises:
            DecodeError: the message is damaged or hostile, or needs more than ``max_bytes``.
        """
