"""Tables of a message that are too long for its header: they travel as blobs.

What a codec says beside a group's bytes (``meta``: the names, dtypes and shapes of all
tensors, and other lists as long) grows with the model, and a header is bounded. Where a
message would not fit, the long values of each group's meta are a blob of their own, the first
of the group's blobs and not counted in its ``buffers``; the group then says ``table: true``. A
message that fits is written as it always was.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from fedmq.broker.wire.encoding import is_deeper
from fedmq.broker.wire.schema import MAX_DEPTH, MAX_MESSAGE_BYTES, Blob, Buffer, Message
from fedmq.codecs.errors import DecodeError

MAX_TABLE_BYTES = 8 << 20
"""Of a table as it travels: 100,000 tensors with names of 60 characters have one of 7 MB."""
MAX_TABLE_MEMORY = 256 << 20
"""Of a table that has been read, in the worst case."""
_CONTAINER_BYTES = 72
"""Of an empty list or map in memory, with the place that refers to it; one byte in msgpack."""
_BYTE_BYTES = 32
"""Of other values in memory, at most, for each of their bytes in msgpack."""
_LONG = 8
"""Entries of a list or map in a meta that may be worth a blob."""


def fitted(message: Message, data: Sequence[Buffer]) -> tuple[Message, tuple[Buffer, ...]]:
    """Return a message and its blobs' bytes, with long tables as blobs if it would not fit."""
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
    """Tell whether the first of a group's blobs is its table."""
    return group.get("table") is True


def read_meta(
    meta: Mapping[str, Any], blob: Blob | None, read: Callable[[], Buffer]
) -> Mapping[str, Any]:
    """Return a group's whole meta.

    Args:
        meta: what of it stands in the header.
        blob: its table, if it has one.
        read: reads that blob; not called if the blob is too large.

    Raises:
        DecodeError: the blob is no table, or would take too much memory.
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
    """Return how much memory the values of some msgpack take, at most.

    Every list and map begins with a byte that is counted here; some other bytes look the same.
    """
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    containers = int(counts[0x80:0xA0].sum() + counts[0xDC:0xE0].sum())
    return _BYTE_BYTES * data.nbytes + _CONTAINER_BYTES * containers
