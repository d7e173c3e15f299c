"""Payloads one after the other in a list of buffers, unencoded: in files, and between processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from fedmq.algorithms.base import Payload
from fedmq.broker.wire.schema import Blob, Buffer, Message
from fedmq.nodes.messages.payloads import RAW, pack, unpack


class PayloadPart(Struct):
    """A payload: a message's body, and the number of its buffers."""

    body: dict[str, Any]
    buffers: int


def append_payload(payload: Payload, buffers: list[Buffer]) -> PayloadPart:
    """Append a payload's buffers to a list, and return the rest of it.

    Raises:
        CodecError: a tensor's dtype is not supported.
    """
    packed = pack(payload, RAW, 0)
    buffers += packed.data
    return PayloadPart(dict(packed.body), len(packed.data))


def take_payload(part: PayloadPart, buffers: Sequence[Buffer]) -> tuple[Payload, Sequence[Buffer]]:
    """Decode a payload from the first buffers; also return the other buffers.

    Raises:
        DecodeError: they are no valid payload.
    """
    own = buffers[: part.buffers]
    blobs = tuple(Blob.of(each) for each in own)
    holder = Message(kind="task", id="", run="", sender="", to="", body=part.body, blobs=blobs)
    return unpack(holder, own.__getitem__), buffers[part.buffers :]
