"""The groups of tensors in a message; each can be decoded although another one is damaged."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedmq.broker.wire.schema import Blob, Buffer, Message
from fedmq.codecs.base import Encoded
from fedmq.codecs.errors import DecodeError
from fedmq.codecs.raw import read_table
from fedmq.codecs.registry import decode
from fedmq.codecs.text import shorten
from fedmq.nodes.messages.tensor_tables import has_table, read_meta

Read = Callable[[int], Buffer]


@dataclass(frozen=True)
class Group:
    """One group of a message: its codec and its blobs.

    meta: the part in the header; the rest is in the ``table``, if there is one.
    first: index of the first of the ``blobs``; the table is the blob before it.
    """

    name: str
    codec: str
    meta: Mapping[str, Any]
    first: int
    blobs: tuple[Blob, ...]
    table: Blob | None = None

    @property
    def nbytes(self) -> int:
        """Return its bytes on the wire."""
        return sum(blob.size for blob in self.blobs)

    def decode(self, read: Read) -> dict[str, Tensor]:
        """Return its tensors by name.

        Raises:
            CodecError: the codec cannot decode the bytes.
            LedgerError: the bytes are damaged or missing.
        """
        buffers = [read(self.first + index) for index in range(len(self.blobs))]
        return decode(Encoded(self.codec, self._whole_meta(read), buffers))

    def _whole_meta(self, read: Read) -> Mapping[str, Any]:
        return read_meta(self.meta, self.table, functools.partial(read, self.first - 1))

    def sizes(self, read: Read) -> dict[str, int]:
        """Return each tensor's bytes on the wire, by name.

        Empty unless the codec writes one tensor after the other.

        Raises:
            LedgerError: the table is damaged or missing.
        """
        try:
            table = read_table(self._whole_meta(read))
            found = {name: math.prod(s) * d.itemsize for name, d, s in table}
        except DecodeError:
            return {}
        return found if sum(found.values()) == self.nbytes else {}


def groups_of(message: Message) -> tuple[list[Group], int]:
    """Return the groups of a message, and the number of blobs that belong to them.

    Raises:
        DecodeError: the body's ``groups`` are invalid.
    """
    listed = message.body.get("groups", [])
    if not isinstance(listed, list):
        raise DecodeError("expected a list of groups in the message's body")
    found: list[Group] = []
    first = 0
    for each in listed:
        match each:
            case {
                "name": str(name),
                "codec": str(codec),
                "meta": dict(meta),
                "buffers": int(buffers),
            } if 0 <= buffers <= len(message.blobs) - first - has_table(each):
                table = message.blobs[first] if has_table(each) else None
                first += has_table(each)
                blobs = message.blobs[first : first + buffers]
                found.append(Group(name, codec, meta, first, blobs, table))
                first += buffers
            case _:
                raise DecodeError(f"expected a group of tensors, got {shorten(each)}")
    return found, first
