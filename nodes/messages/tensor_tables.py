"""Tensor tables that are too long for a message's header: they are sent as blobs.

A group's ``meta`` (names, dtypes and shapes of all tensors, and other lists as long) grows with
the model, but a header is bounded. If a message would not fit, the long values of each group's
meta become a blob: the first of the group's blobs, not counted in its ``buffers``. The group then
has ``table: true``. A message that fits has no such blob.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from fedmq.broker.wire.encoding import is_deeper
from fedmq.broker.wire.schema import MAX_DEPTH, MAX_MESSAGE_BYTES, Blob, Buffer, Message
from fedmq.codecs.errors import DecodeError

MAX_TABLE_BYTES = 8 << 20
"""Limit of an encoded table: 100,000 tensors with names of 60 characters need 7 MB."""
MAX_TABLE_MEMORY = 256 << 20
"""Limit of the memory that a decoded table can need."""
_CONTAINER_BYTES = 72
"""Memory of an empty list or map and the reference to it; it is one byte in msgpack."""
_BYTE_BYTES = 32
"""Upper bound of the memory of other values, per byte in msgpack."""
_LONG = 8
"""Length from which a list or map in a meta goes into the table."""


def fitted(message: Message, data: Sequence[Buffer]) -> tuple[Message, tuple[Buffer, ...]]:
    """Return a message and its blobs' bytes; if it would not fit, move long tables to blobs."""
    groups = message.body.get("groups", ())
    if not any(_long(group["meta"]) for group in groups):
        return message, tuple(data)
    if len(msgspec.msgpack.encode(message)) <= MAX_MESSAGE_BYTES:
        return message, tuple(data)
    slim, blobs, buffers, first = [], list[Blob](), list[Buffer](), 0
    for group in groups:
        count = group["buffers"]
        table = {} if "table" in group else _long(group["meta"])
        if table:
            encoded = msgspec.msgpack.encode(table)
            meta = {key: each for key, each in group["meta"].items() if key not in table}
            slim.append({**group, "meta": meta, "table": True})
            blobs.append(Blob.of(encoded))
            buffers.append(encoded)
        else:
            slim.append(group)
            count += "table" in group
        blobs += message.blobs[first : first + count]
        buffers += data[first : first + count]
        first += count
    blobs += message.blobs[first:]
    buffers += data[first:]
    body = {**message.body, "groups": slim}
    return msgspec.structs.replace(message, body=body, blobs=tuple(blobs)), tuple(buffers)


def has_table(group: Mapping[str, Any]) -> bool:
    """Return whether the first of a group's blobs is its table."""
    return group.get("table") is True


def group_blobs(message: Message) -> Iterator[tuple[str, str, tuple[Blob, ...]]]:
    """Yield name, codec and blobs, with its table, of each group of a message.

    Invalid groups are left out.
    """
    first = 0
    groups = message.body.get("groups")
    for group in groups if isinstance(groups, list) else ():
        if isinstance(group, dict):  # a mapping pattern takes four times as long
            name, codec, buffers = group.get("name"), group.get("codec"), group.get("buffers")
            if not (isinstance(name, str) and isinstance(codec, str) and isinstance(buffers, int)):
                continue
            end = first + max(0, buffers) + has_table(group)
            yield name, codec, message.blobs[first:end]
            first = end


def read_meta(
    meta: Mapping[str, Any], blob: Blob | None, read: Callable[[], Buffer]
) -> Mapping[str, Any]:
    """Return a group's complete meta.

    Args:
        meta: the part in the header.
        blob: the table, if the group has one.
        read: reads the blob; not called if the blob is too large.

    Raises:
        DecodeError: the blob is no valid table, or would need too much memory.
    """
    if blob is None:
        return meta
    if blob.size > MAX_TABLE_BYTES:
        raise DecodeError(
            f"expected a table of tensors of at most {MAX_TABLE_BYTES} bytes, got {blob.size}"
        )
    data = memoryview(read()).cast("B")
    needed = _memory_of(data)
    if needed > MAX_TABLE_MEMORY:
        raise DecodeError(
            f"expected a table of tensors that takes at most {MAX_TABLE_MEMORY} bytes of memory, "
            f"it may take {needed}"
        )
    try:
        table = msgspec.msgpack.decode(data)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise DecodeError(f"expected a table of tensors: {error}") from None
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise DecodeError(f"expected a table of tensors as a map, got {reprlib.repr(table)}")
    if is_deeper(table, MAX_DEPTH):
        raise DecodeError(f"expected a table nested at most {MAX_DEPTH} deep")
    return {**meta, **table}


def _long(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the long lists and maps of a meta."""
    return {
        key: each
        for key, each in meta.items()
        if isinstance(each, list | tuple | dict) and len(each) >= _LONG
    }


def _memory_of(data: memoryview) -> int:
    """Return an upper bound of the memory that decoded msgpack needs, in bytes.

    It counts each byte that can begin a list or a map, including equal bytes of other values.
    """
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    containers = int(counts[0x80:0xA0].sum() + counts[0xDC:0xE0].sum())
    return _BYTE_BYTES * data.nbytes + _CONTAINER_BYTES * containers
