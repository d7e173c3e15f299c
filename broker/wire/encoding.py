"""Encode, decode and join headers and messages, and check every input.

`fedmq.broker.wire.schema` defines their fields and limits.
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
    Address,
    AnyFrame,
    Blob,
    Buffer,
    Frame,
    Id,
    Message,
    Name,
    Natural,
    digest,
    kind_of,
)

_MAX_FOREIGN_ITEMS = 1024
"""Longest list or map that is read in a header of another major version."""


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a `Message` that says from whom and to whom it is: quick to decode."""

    kind: Name
    id: Id
    run: Name
    sender: Name
    to: Address


_encoder = msgspec.msgpack.Encoder()
_frame_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnyFrame)
_joined_decoder = msgspec.msgpack.Decoder(list[tuple[bytes, Natural]])
_LISTS = frozenset(bytes([each]) for each in (*range(0x90, 0xA0), 0xDC, 0xDD))
"""First bytes of a list in msgpack; a frame's header is a map."""
_NESTING = (dict, list)
_NESTING_TYPES = frozenset(_NESTING)
_message_decoder = msgspec.msgpack.Decoder(Message)
_envelope_decoder = msgspec.msgpack.Decoder(Envelope)


def encode_frame(frame: Frame) -> bytes:
    """Return the header bytes of a frame.

    Raises:
        WireError: the header would be larger than the limit.
    """
    return _encode(frame, MAX_HEADER_BYTES)


def decode_frame(header: Buffer) -> AnyFrame:
    """Decode a header.

    Raises:
        VersionError: the header has another major version.
        WireError: the bytes are not a header of this protocol.
    """
    try:
        frame: AnyFrame = _decode(_frame_decoder, header, "frame", MAX_HEADER_BYTES)
    except WireError:
        # Only the version can be relied on in a header of another major version.
        theirs = _version_of(header)
        if theirs is not None and theirs[0] != PROTOCOL[0]:
            raise VersionError(theirs, PROTOCOL) from None
        raise
    if frame.v[0] != PROTOCOL[0]:
        raise VersionError(frame.v, PROTOCOL)
    return frame


def join_headers(headers: Sequence[tuple[bytes, int]]) -> bytes:
    """Return one header for several frames, given as (header, number of buffers)."""
    return _encoder.encode(headers)


def split_header(header: Buffer) -> list[tuple[bytes, int]]:
    """Return (header, number of buffers) of each frame in a message.

    The number is -1 for a single frame: all buffers of the message are its own.

    Raises:
        WireError: the header is too large, or an invalid list.
    """
    data = header if isinstance(header, bytes) else bytes(header)
    first = data[:1]
    if first not in _LISTS:
        return [(data, -1)]
    headers: list[tuple[bytes, int]] = _decode(_joined_decoder, data, "header", MAX_HEADER_BYTES)
    if not headers:
        raise WireError("expected at least one frame in a list of frames, got none")
    return headers


def encode_message(message: Message) -> bytes:
    """Return the bytes of a message, as the ledger records them.

    Raises:
        WireError: the message would be larger than the limit.
    """
    return _encode(message, MAX_MESSAGE_BYTES)


def decode_message(data: Buffer) -> Message:
    """Decode a message.

    Raises:
        WireError: the bytes are not a message.
    """
    message: Message = _decode(_message_decoder, data, "message", MAX_MESSAGE_BYTES)
    if len(message.blobs) > MAX_BUFFERS:
        raise WireError(f"expected at most {MAX_BUFFERS} blobs, got {len(message.blobs)}")
    return message


def decode_envelope(data: Buffer) -> Envelope:
    """Decode the part of a message that says from whom and to whom it is, and skip its body.

    A body of 48 KiB can hold 48,000 lists: decoding it takes a thousand times as long.

    Raises:
        WireError: the bytes are not a message.
    """
    envelope: Envelope = _decode(_envelope_decoder, data, "message", MAX_MESSAGE_BYTES)
    return envelope


def is_deeper(body: dict[str, Any], depth: int) -> bool:
    """Return whether a message's body is nested deeper than ``depth``."""
    level: list[Any] = [body]
    for _ in range(depth):
        inner = []
        for holder in level:
            values = holder.values() if isinstance(holder, dict) else holder
            if _NESTING_TYPES.isdisjoint(map(type, values)):  # a third of the time of the loop
                continue
            for each in values:
                if isinstance(each, _NESTING):
                    inner.append(each)  # noqa: PERF401 - runs for each message: takes a third less time
        if not inner:
            return False
        level = inner
    return True


def check_inline(
    blobs: Sequence[Blob], inline: Sequence[int], buffers: Sequence[Buffer], limit: int
) -> None:
    """Check that the buffers of a frame are the blobs that it lists as inline.

    Args:
        blobs: the blobs of the message.
        inline: indices of the blobs that the buffers hold.
        buffers: as received.
        limit: most bytes of all buffers.

    Raises:
        WireError: wrong count, index, size or digest.
    """
    if len(inline) != len(buffers):
        raise WireError(
            f"expected {len(inline)} buffers with the message, got {len(buffers)}", Code.BAD_BLOB
        )
    room = limit
    for index, data in zip(inline, buffers, strict=True):
        if index >= len(blobs):
            text = f"expected an inline blob from 0 to {len(blobs) - 1}, got {index}"
            raise WireError(text, Code.BAD_BLOB)
        size = memoryview(data).nbytes
        room -= size
        if room < 0:
            text = f"expected at most {limit} bytes of blobs with a message"
            raise WireError(text, Code.BAD_BLOB)
        if size != blobs[index].size or digest(data) != blobs[index].digest:
            text = f"the bytes of inline blob {index} do not match its size and digest"
            raise WireError(text, Code.BAD_BLOB)


def inline_choice(blobs: Sequence[Blob], limit: int) -> tuple[int, ...]:
    """Return the indices of the blobs that fit beside their message, within ``limit`` bytes."""
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
        raise WireError(f"cannot encode {value!r:.200}: {error}") from None
    if len(data) > limit:
        kind = value.kind if isinstance(value, Message) else kind_of(value)
        raise WireError(f"expected a {kind} of at most {limit} bytes, got {len(data)}")
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
    """Return the version in an unreadable header, or None."""
    try:
        # Bounded: the decoder allocates the claimed length of a list before it reads it.
        fields = msgpack.unpackb(
            header,
            strict_map_key=False,
            max_array_len=_MAX_FOREIGN_ITEMS,
            max_map_len=_MAX_FOREIGN_ITEMS,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        return None
    match fields:
        case {"v": [int(major), int(minor)]}:
            return major, minor
    return None
