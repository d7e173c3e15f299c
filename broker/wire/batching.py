"""Queue frames for a connection, and join small ones into one ZeroMQ message."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from fedmq.broker.wire.encoding import join_headers
from fedmq.broker.wire.schema import (
    INLINE_BYTES,
    MAX_BUFFERS,
    MAX_HEADER_BYTES,
    Buffer,
)

_SMALL_BYTES = 16 * 1024
_JOINED_HEADER_BYTES = MAX_HEADER_BYTES - 1024
_PER_FRAME_BYTES = 16


class Outbox:
    """Frames to send, in order, as ZeroMQ messages.

    Consecutive small frames are joined into one message, within the limits of a header.
    """

    def __init__(self) -> None:
        self._messages: deque[tuple[list[Buffer], int]] = deque()
        """The parts of each, and their total size in bytes."""
        self._headers: list[tuple[bytes, int]] = []
        self._buffers: list[Buffer] = []
        self._bytes = self._buffer_bytes = 0
        self._complete_bytes = 0

    @property
    def nbytes(self) -> int:
        """Return the size of all frames in bytes."""
        return self._complete_bytes + self._bytes + self._buffer_bytes

    def __bool__(self) -> bool:
        return bool(self._messages or self._headers)

    def add(self, header: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """Append a frame."""
        size = len(header) + _PER_FRAME_BYTES
        buffer_bytes = 0
        for each in buffers:
            buffer_bytes += len(each) if isinstance(each, bytes) else each.nbytes
        if buffer_bytes > INLINE_BYTES:
            self._complete()
            self._append([header, *buffers], len(header) + buffer_bytes)
            return
        if (
            self._bytes + size > _JOINED_HEADER_BYTES
            or len(self._buffers) + len(buffers) > MAX_BUFFERS
        ):
            self._complete()
        self._headers.append((header, len(buffers)))
        self._buffers += buffers
        self._bytes += size
        self._buffer_bytes += buffer_bytes
        if size + buffer_bytes > _SMALL_BYTES:
            self._complete()

    def next(self) -> list[Buffer]:
        """Return the parts of the next message; the outbox must not be empty."""
        if not self._messages:
            self._complete()
        return self._messages[0][0]

    @property
    def next_bytes(self) -> int:
        """Return the size in bytes of the message that `next` has returned."""
        return self._messages[0][1]

    def sent(self) -> int:
        """Remove the message that `next` returned; return its size in bytes."""
        _, nbytes = self._messages.popleft()
        self._complete_bytes -= nbytes
        return nbytes

    def _append(self, parts: list[Buffer], nbytes: int) -> None:
        self._messages.append((parts, nbytes))
        self._complete_bytes += nbytes

    def _complete(self) -> None:
        """Complete the message of the frames joined so far."""
        if not self._headers:
            return
        single = len(self._headers) == 1
        header = self._headers[0][0] if single else join_headers(self._headers)
        self._append([header, *self._buffers], len(header) + self._buffer_bytes)
        self._headers, self._buffers = [], []
        self._bytes = self._buffer_bytes = 0
