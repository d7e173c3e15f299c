"""The groups of tensors in a message, one by one: a damaged one does not hide the others."""

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
    """One group of a message: which codec wrote it, and which blobs are its bytes.

    meta: as far as it stands in the header; the rest is in the ``table``, if there is one.
    first: index of the first of the ``blobs``; the table is the one before it.
    """

    name: str
    codec: str
    meta: Mapping[str, Any]
    first: int
    blobs: tuple[Blob, ...]
    table: Blob | None = None

    @property
    def nbytes(self) -> int:
        """Return the size of its bytes on the wire."""
        return sum(blob.size for blob in self.blobs)

    def decode(self, read: Read) -> dict[str, Tensor]:
        """Return its tensors.

        Raises:
            CodecError: the bytes are not what the codec wrote.
            LedgerError: the bytes are damaged, or were not kept.
        """
        buffers = [read(self.first + index) for index in range(len(self.blobs))]
        return decode(Encoded(self.codec, self._whole_meta(read), buffers))

    def _whole_meta(self, read: Read) -> Mapping[str, Any]:
        return read_meta(self.meta, self.table, functools.partial(read, self.first - 1))

    def sizes(self, read: Read) -> dict[str, int]:
        """Return the bytes of each tensor on the wire, where the group's table tells them.

        It does for codecs that write tensors end to end; for others the map is empty.

        Raises:
            LedgerError: the table is damaged, or was not kept.
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
        DecodeError: the body's ``groups`` are no groups.
    """
    listed = message.body.get("groups", [])
    if not isinstance(listed, list):
        raise DecodeError("expected groups as a list in the message's body")
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
