"""What waits to be sent over a connection: small frames go together."""

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
    """Frames in the order in which they are to be sent, as ZeroMQ messages.

    A frame that follows another small one is joined to it, within the limits of a header.
    """

    def __init__(self) -> None:
        self._messages: deque[tuple[list[Buffer], int]] = deque()
        """Their parts, and how many bytes these have together."""
        self._headers: list[tuple[bytes, int]] = []
        self._buffers: list[Buffer] = []
        self._bytes = self._extra = 0

    @property
    def large(self) -> int:
        """Return how many messages wait that are too large to be joined."""
        return len(self._messages)

    def __bool__(self) -> bool:
        return bool(self._messages or self._headers)

    def add(self, header: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """Put a frame behind the others."""
        size = len(header) + _PER_FRAME_BYTES
        extra = 0
        for each in buffers:
            extra += memoryview(each).nbytes
        if extra > INLINE_BYTES:
            self._close()
            self._messages.append(([header, *buffers], len(header) + extra))
            return
        if (
            self._bytes + size > _JOINED_HEADER_BYTES
            or len(self._buffers) + len(buffers) > MAX_BUFFERS
        ):
            self._close()
        self._headers.append((header, len(buffers)))
        self._buffers += buffers
        self._bytes += size
        self._extra += extra
        if size + extra > _SMALL_BYTES:
            self._close()

    def next(self) -> list[Buffer]:
        """Return the parts of the message that is to be sent next; there must be one."""
        if not self._messages:
            self._close()
        return self._messages[0][0]

    def sent(self) -> int:
        """Forget the message that `next` returned; return how many bytes it had."""
        _, nbytes = self._messages.popleft()
        return nbytes

    def _close(self) -> None:
        """Let nothing more be joined to the frames so far."""
        if not self._headers:
            return
        alone = len(self._headers) == 1
        header = self._headers[0][0] if alone else join_headers(self._headers)
        self._messages.append(([header, *self._buffers], len(header) + self._extra))
        self._headers, self._buffers = [], []
        self._bytes = self._extra = 0
