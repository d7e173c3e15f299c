"""Headers and messages as bytes: written, read, joined, and never trusted.

What they say is `fedmq.broker.wire.schema`'s; here are the limits kept that it states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack
import msgspec

from fedmq.broker.errors import VersionError, WireError
from fedmq.broker.rejections import Code
from fedmq.broker.wire.schema import (
    MAX_BUFFERS,
    MAX_HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    PROTOCOL,
    AnyFrame,
    Blob,
    Buffer,
    Frame,
    Message,
    Natural,
    digest,
    kind_of,
)

_FOREIGN = 1024
"""Longest list or map in a header of another major that its version is read from."""

_encoder = msgspec.msgpack.Encoder()
_frame_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnyFrame)
_joined_decoder = msgspec.msgpack.Decoder(list[tuple[bytes, Natural]])
_SHORT_LIST, _LONG_LISTS = 0x90, (0xDC, 0xDD)
"""First bytes of a list in msgpack; a frame's header is a map."""
_NESTING = (dict, list)
_message_decoder = msgspec.msgpack.Decoder(Message)


def encode_frame(frame: Frame) -> bytes:
    """Return the header bytes of a frame.

    Raises:
        WireError: the header would be larger than the limit.
    """
    return _encode(frame, MAX_HEADER_BYTES)


def decode_frame(header: Buffer) -> AnyFrame:
    """Read a header.

    Raises:
        VersionError: of another protocol major.
        WireError: anything else that is not a header of this protocol.
    """
    try:
        frame: AnyFrame = _decode(_frame_decoder, header, "frame", MAX_HEADER_BYTES)
    except WireError:
        # Another major may look quite different; of it, only the version can be relied on.
        theirs = _version_of(header)
        if theirs is not None and theirs[0] != PROTOCOL[0]:
            raise VersionError(theirs, PROTOCOL) from None
        raise
    if frame.v[0] != PROTOCOL[0]:
        raise VersionError(frame.v, PROTOCOL)
    return frame


def join_headers(headers: Sequence[tuple[bytes, int]]) -> bytes:
    """Return one header for several frames, each with the number of its buffers."""
    return _encoder.encode(headers)


def split_header(header: Buffer) -> list[tuple[bytes, int]]:
    """Return the headers of all frames that travel together, and the number of their buffers.

    A frame that travels alone has its number of buffers not told: -1.

    Raises:
        WireError: the header is too large, or no such list.
    """
    view = memoryview(header)
    if not view.nbytes or (view[0] & 0xF0 != _SHORT_LIST and view[0] not in _LONG_LISTS):
        return [(bytes(view), -1)]
    headers: list[tuple[bytes, int]] = _decode(_joined_decoder, view, "header", MAX_HEADER_BYTES)
    if not headers:
        raise WireError("expected frames in a list of them")
    return headers


def encode_message(message: Message) -> bytes:
    """Return the bytes of a message, which go into the ledger as they are.

    Raises:
        WireError: the message would be larger than a header may be.
    """
    return _encode(message, MAX_MESSAGE_BYTES)


def decode_message(data: Buffer) -> Message:
    """Read a message.

    Raises:
        WireError: the bytes are not a message.
    """
    message: Message = _decode(_message_decoder, data, "message", MAX_MESSAGE_BYTES)
    if len(message.blobs) > MAX_BUFFERS:
        raise WireError(f"expected at most {MAX_BUFFERS} blobs, got {len(message.blobs)}")
    return message


def is_deeper(body: dict[str, Any], depth: int) -> bool:
    """Tell whether a message's body is nested deeper than this."""
    level: list[Any] = [body]
    for _ in range(depth):
        inner = []
        for holder in level:
            for each in holder.values() if isinstance(holder, dict) else holder:
                if isinstance(each, _NESTING):
                    inner.append(each)  # noqa: PERF401 - at each message: a third less time so
        if not inner:
            return False
        level = inner
    return True


def check_inline(
    blobs: Sequence[Blob], inline: Sequence[int], buffers: Sequence[Buffer], limit: int
) -> None:
    """Check that the buffers beside a message are the blobs that it says they are.

    ``limit``: bytes that all of them together may have.

    Raises:
        WireError: wrong count, index, size or digest.
    """
    if not (inline or buffers):
        return
    if len(inline) != len(buffers):
        raise WireError(
            f"expected {len(inline)} buffers beside the message, got {len(buffers)}", Code.BAD_BLOB
        )
    room = limit
    for index, data in zip(inline, buffers, strict=True):
        if index >= len(blobs):
            text = f"inline blob {index} of a message that has {len(blobs)}"
            raise WireError(text, Code.BAD_BLOB)
        size = memoryview(data).nbytes
        room -= size
        if room < 0:
            text = f"expected at most {limit} bytes beside a message"
            raise WireError(text, Code.BAD_BLOB)
        if size != blobs[index].size or digest(data) != blobs[index].digest:
            text = f"inline blob {index} is not the bytes that its name says"
            raise WireError(text, Code.BAD_BLOB)


def inline_choice(blobs: Sequence[Blob], limit: int) -> tuple[int, ...]:
    """Return the indices of the blobs that travel beside their message, within a limit."""
    if not blobs:
        return ()
    chosen = []
    room = limit
    for index, blob in enumerate(blobs):
        if blob.size <= room:
            chosen.append(index)
            room -= blob.size
    return tuple(chosen)


def _encode(value: Frame | Message, limit: int) -> bytes:
    try:
        data = _encoder.encode(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"cannot write {value!r:.200}: {error}") from None
    if len(data) > limit:
        kind = value.kind if isinstance(value, Message) else kind_of(value)
        raise WireError(f"expected at most {limit} bytes of header, a {kind} needs {len(data)}")
    return data


def _decode(decoder: msgspec.msgpack.Decoder[Any], data: Buffer, what: str, limit: int) -> Any:
    size = len(data) if isinstance(data, bytes) else data.nbytes
    if size > limit:
        raise WireError(f"expected a {what} of at most {limit} bytes, got {size}")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"not a {what}: {error}") from None


def _version_of(header: Buffer) -> tuple[int, int] | None:
    """Return the version in a header of which nothing else can be relied on."""
    try:
        # Within bounds: it makes room for what a list claims to hold before it reads it.
        fields = msgpack.unpackb(
            header, strict_map_key=False, max_array_len=_FOREIGN, max_map_len=_FOREIGN
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        return None
    match fields:
        case {"v": [int(major), int(minor)]}:
            return major, minor
    return None
