"""What has arrived from each connection, read in turns and within a rate.

A connection that sends faster than it may is slowed down: its messages wait here, undecoded, and
its link waits for acknowledgments. So no frame of a link is lost; what exceeds the window of a link
is dropped. Other connections do not wait: a turn takes a few frames of each. While some send small
messages, one that sends large ones is held back after each.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from fedmq.broker.errors import WireError
from fedmq.broker.wire.encoding import decode_frame, split_header
from fedmq.broker.wire.schema import (
    INLINE_BYTES,
    MAX_BUFFERS,
    AnyFrame,
    Buffer,
    ChunkRequest,
    Hello,
    NumberedFrame,
    Post,
)
from fedmq.broker.wire.window import RESERVED_BYTES

BURST_S = 1.0
"""A connection may send as much at once as it may send in this time."""
TURN_FRAMES = 32
"""Most frames of one connection in one turn."""
_LANE_BYTES = 64 * 1024
"""Bytes of one connection after which the next one has its turn."""
_TURN_BYTES = 512 * 1024
"""A turn ends after one chunk, so that small messages that came before it are answered first."""
SMALL_MESSAGE_RATE, SMALL_MESSAGE_PERIOD_S = 4, 0.2
"""Small messages, in seconds, that count as frequent: then their round trips matter more than the
throughput of large ones."""
SHARED_BYTES_PER_S = 256e6
"""Rate of the large messages of one connection while small messages are frequent. A broker stores
several times as much, and would have little time for the others."""
_READ_BYTES = 512 * 1024
"""No more is read from the socket in one turn; the rest waits at its senders."""
_PART_BYTES = 512
"""Memory of a part beside its bytes."""
_LARGE_BYTES = 1024
"""A header of more bytes also costs what decoding the body in it can take."""
_BYTES_PER_MESSAGE = 256
"""Bytes of a large header that cost as much as one message: each may be an item to decode."""
_NESTED_PER_COSTLY = 4096
"""Lists and maps in a large header that cost as much as one costly message."""
_NESTED = bytes([*range(0x80, 0xA0), *range(0xDC, 0xE0)])
"""First bytes of lists and maps in msgpack."""


MOST_DROPPED, MOST_DROPPED_BYTES = 4096, 64 << 20
"""Messages of one connection, and their bytes, that are dropped before it is closed: no node of
ours sends more than its window, and nothing else keeps libzmq from reading what nobody handles."""


class Part(Protocol):
    """A part of a message, as ZeroMQ hands it over."""

    @property
    def buffer(self) -> memoryview:
        """Return its bytes, not copied."""

    @property
    def bytes(self) -> bytes:
        """Return a copy of its bytes."""

    def __len__(self) -> int:
        """Return its size in bytes."""


Received = tuple[bytes, AnyFrame | WireError, Sequence[Buffer], int, Any]
"""(connection, frame or why it is none, its buffers, size of the message if it is its first frame,
what `Inbox.put` was given as the origin)."""


def headers_of(parts: Sequence[Part]) -> list[tuple[bytes, int]]:
    """Return (header, number of buffers) of each frame of a message; see `split_header`.

    Raises:
        WireError: the message has no header, an invalid list of headers, or too many buffers.
    """
    if not parts:
        raise WireError("expected a header, got an empty message")
    if len(parts) > MAX_BUFFERS + 1:
        raise WireError(f"expected at most {MAX_BUFFERS} buffers, got more")
    return split_header(parts[0].bytes)


def frames_of(
    headers: Sequence[tuple[bytes, int]], parts: Sequence[Part]
) -> Iterator[tuple[AnyFrame, Sequence[Buffer]]]:
    """Yield the frames of a message, each with its buffers; decode each when it is its turn.

    Raises:
        WireError: a header is not a frame of this protocol.
    """
    at = 1
    for header, count in headers:
        frame = decode_frame(header)
        if not count:
            yield frame, ()
            continue
        end = at + count if count >= 0 else len(parts)
        yield frame, _buffers(parts[at:end])
        at = end


def _buffers(parts: Sequence[Part]) -> list[Buffer]:
    # A small buffer is copied, so that keeping it does not keep zmq's frame.
    return [part.buffer if len(part) > INLINE_BYTES else part.bytes for part in parts]


class _Lane:
    """The messages of one connection.

    Attributes:
        messages: (parts, size, origin) of each, in order.
        frames: the rest of the oldest message, while it is being read.
        unread: number of these.
        nbytes: memory of all.
        free_at: time at which all that was taken is paid for, at the connection's rate.
        not_before: time before which no frame is taken: its last one was large.
        blocked: whether it waits for one of these.
        dropped, dropped_bytes: number and size of the messages dropped.
        is_closed: whether too much was dropped; then nothing more is accepted.
    """

    __slots__ = (
        "blocked",
        "dropped",
        "dropped_bytes",
        "frames",
        "free_at",
        "is_closed",
        "messages",
        "nbytes",
        "not_before",
        "unread",
    )

    def __init__(self) -> None:
        self.messages: deque[tuple[Sequence[Part], int, Any]] = deque()
        self.frames: Iterator[tuple[AnyFrame, Sequence[Buffer]]] = iter(())
        self.nbytes = self.unread = self.dropped = self.dropped_bytes = 0
        self.free_at = self.not_before = 0.0
        self.blocked = self.is_closed = False


class Inbox:
    """The messages of all connections that were received, and not handled yet.

    Args:
        messages_per_s, bytes_per_s: that one connection may send.
        costly_per_s: Hellos, unreadable frames and rejected posts that one connection may send.
        most, most_total: bytes that may wait of one connection and of all. What exceeds them is
            dropped. Beyond the total, each connection may still have `RESERVED_BYTES`.

    Attributes:
        dropped: number of messages dropped.
        flooders: connections of which very much was dropped, see `MOST_DROPPED`; to be closed.
    """

    def __init__(
        self,
        messages_per_s: float,
        bytes_per_s: float,
        costly_per_s: float,
        most: int,
        most_total: int,
    ) -> None:
        self._message_s, self._byte_s = 1.0 / messages_per_s, 1.0 / bytes_per_s
        self._costly_s = 1.0 / costly_per_s
        self._most, self._most_total = most, most_total
        self._lanes: dict[bytes, _Lane] = {}
        self._ready: dict[bytes, _Lane] = {}
        """Lanes with messages that may be handled now; the next one first."""
        self._blocked: list[tuple[float, bytes]] = []
        """A heap of (time, connection): lanes with messages that wait for their rate."""
        self._small: deque[float] = deque(maxlen=SMALL_MESSAGE_RATE)
        """Times at which the last small messages were taken."""
        self._bytes = 0
        self._to_read = _READ_BYTES
        self.dropped = 0
        self.flooders: list[bytes] = []

    @property
    def due(self) -> float | None:
        """Time at which a message may be handled; None without messages."""
        if self._ready:
            return 0.0
        return self._blocked[0][0] if self._blocked else None

    @property
    def wants_more(self) -> bool:
        """Return whether another message should be read from the socket in this turn."""
        return self._to_read > 0

    def put(self, peer: bytes, parts: Sequence[Part], nbytes: int, origin: Any) -> None:
        """Append a message of a connection, or drop it if too much waits.

        Args:
            peer: the connection.
            parts: of the message; its header, and buffers.
            nbytes: its size.
            origin: what the transport proves about the connection.
        """
        self._to_read -= nbytes
        lane = self._lanes.get(peer)
        if lane is None:
            lane = self._lanes[peer] = _Lane()
        if lane.is_closed:
            self.dropped += 1
            return
        if lane.nbytes >= self._most or (
            self._bytes >= self._most_total and lane.nbytes >= RESERVED_BYTES
        ):
            self.dropped += 1
            lane.dropped += 1
            lane.dropped_bytes += nbytes
            if lane.dropped >= MOST_DROPPED or lane.dropped_bytes >= MOST_DROPPED_BYTES:
                self._close(peer, lane)
            return
        if not lane.messages and not lane.blocked:
            self._ready[peer] = lane
        memory = nbytes + _PART_BYTES * len(parts)
        lane.messages.append((parts, memory, origin))
        lane.nbytes += memory
        self._bytes += memory

    def charge(self, peer: bytes) -> None:
        """Count the last message of a connection as a costly one: its post was rejected."""
        lane = self._lanes.get(peer)
        if lane is not None:
            lane.free_at += self._costly_s

    def take(self, now: float) -> Iterator[Received]:
        """Yield the frames of one turn.

        Args:
            now: in seconds, on a clock that is never set back.
        """
        while self._blocked and self._blocked[0][0] <= now:
            self._unblock(heapq.heappop(self._blocked)[1])
        self._to_read = _READ_BYTES
        room = _TURN_BYTES
        latest = now + BURST_S
        for peer, lane in list(self._ready.items()):
            if lane.free_at < now:
                lane.free_at = now
            end = max(0, room - _LANE_BYTES)
            for _ in range(TURN_FRAMES):
                if lane.free_at >= latest or lane.not_before > now:
                    self._block(peer, lane)
                    break
                frame, buffers, nbytes, origin = self._next(lane)
                room -= nbytes
                if nbytes and isinstance(frame, NumberedFrame):
                    if nbytes < _LANE_BYTES:
                        self._small.append(now)
                    elif self._is_shared(now):
                        lane.not_before = now + nbytes / SHARED_BYTES_PER_S
                yield peer, frame, buffers, nbytes, origin
                if not lane.messages:
                    del self._ready[peer]
                    break
                if room <= end:
                    self._ready[peer] = self._ready.pop(peer)
                    break
            else:
                self._ready[peer] = self._ready.pop(peer)  # the others are first in the next turn
            if room <= 0:
                return

    def _next(self, lane: _Lane) -> tuple[AnyFrame | WireError, Sequence[Buffer], int, Any]:
        """Decode the next frame of a lane; return (frame, buffers, size, origin)."""
        parts, memory, origin = lane.messages[0]
        nbytes, cost_s = 0, self._message_s
        frame: AnyFrame | WireError
        buffers: Sequence[Buffer] = ()
        try:
            if lane.unread:
                frame, buffers = next(lane.frames)
            else:
                nbytes = memory - _PART_BYTES * len(parts)
                cost_s += nbytes * self._byte_s
                headers = headers_of(parts)
                for header, _ in headers if len(parts[0]) > _LARGE_BYTES else ():
                    if len(header) > _LARGE_BYTES:
                        cost_s += self._body_s(header)
                lane.unread = len(headers)
                if lane.unread == 1:  # a short cut: most messages have one frame
                    frame = decode_frame(headers[0][0])
                    buffers = _buffers(parts[1:]) if len(parts) > 1 else ()
                else:
                    lane.frames = frames_of(headers, parts)
                    frame, buffers = next(lane.frames)
            if type(frame) is not Post:  # the most frequent
                cost_s += self._frame_s(frame)
        except WireError as error:
            frame, buffers = error, ()
            lane.unread = 1
            cost_s += self._costly_s
        lane.free_at += cost_s
        lane.unread -= 1
        if not lane.unread:
            lane.messages.popleft()
            lane.nbytes -= memory
            self._bytes -= memory
            if not lane.messages:
                lane.dropped = lane.dropped_bytes = 0
        return frame, buffers, nbytes, origin

    def _frame_s(self, frame: AnyFrame) -> float:
        """Return the cost of a frame beside that of its message."""
        if isinstance(frame, ChunkRequest):
            return frame.size * self._byte_s
        return self._costly_s if isinstance(frame, Hello) else 0.0

    def _body_s(self, header: bytes) -> float:
        """Return the cost of a large header beside that of a message.

        At one byte each, a header can hold 48,000 items, which take milliseconds to decode.
        """
        # Or fewer: text has such bytes, too.
        nested = len(header) - len(header.translate(None, _NESTED))
        per_byte_s = self._message_s / _BYTES_PER_MESSAGE
        return len(header) * per_byte_s + nested // _NESTED_PER_COSTLY * self._costly_s

    def _block(self, peer: bytes, lane: _Lane) -> None:
        del self._ready[peer]
        lane.blocked = True
        heapq.heappush(self._blocked, (max(lane.free_at - BURST_S, lane.not_before), peer))

    def _is_shared(self, now: float) -> bool:
        """Return whether small messages are frequent."""
        small = self._small
        return len(small) == SMALL_MESSAGE_RATE and now - small[0] < SMALL_MESSAGE_PERIOD_S

    def _close(self, peer: bytes, lane: _Lane) -> None:
        """Drop all messages of a connection, which is to be closed."""
        self.flooders.append(peer)
        lane.is_closed = True
        self._bytes -= lane.nbytes
        lane.messages.clear()
        lane.nbytes = lane.unread = 0
        self._ready.pop(peer, None)

    def _unblock(self, peer: bytes) -> None:
        lane = self._lanes[peer]
        lane.blocked = False
        if lane.messages:
            self._ready[peer] = lane

    def sweep(self, now: float) -> None:
        """Drop the records of connections that have sent nothing lately."""
        for peer, lane in list(self._lanes.items()):
            is_idle = not lane.messages and not lane.blocked
            if is_idle and lane.free_at <= now and lane.not_before <= now:
                del self._lanes[peer]
