"""What waits to be sent to each connection: in joined messages, counted in bytes, and bounded.

ZeroMQ bounds its own queue for a connection by the number of messages, whatever their size. So some
messages are handed to it with a tracker, which says when ZeroMQ has given them, and all before
them, to the kernel. Bytes count from `SendQueues.add` until then; those that follow the last
tracker do not count, and are bounded by where the next tracker must be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from fedmq.broker.wire.batching import Outbox
from fedmq.broker.wire.schema import Buffer
from fedmq.broker.wire.window import RESERVED_BYTES

MARK_BYTES = 64 * 1024
"""Bytes of one connection without a tracker that are never too many: tracking a message takes as
long as sending ten small ones, and wakes a thread of pyzmq."""
MOST_UNMARKED_BYTES = 1 << 20
"""Most bytes of one connection without a tracker, while those of all connections are few."""
SWEEP_S = 10.0
"""Time, in seconds, after which the record of a connection without traffic may be dropped."""
CHUNKS_WAITING = 64
"""Most requested chunks that wait until their connection has read others: more than a node of ours
requests at a time. It requests again what is dropped."""
_NEGLIGIBLE_BYTES = 4096
"""Bytes without a tracker that may be forgotten when a record is dropped."""


class Tracker(Protocol):
    """Tells whether a message has left ZeroMQ's queue."""

    @property
    def done(self) -> bool:
        """Return whether it has, or its connection is gone."""


class SendQueue(Outbox):
    """The frames for one connection.

    Attributes:
        counted: bytes that `SendQueues` has counted for it.
        marked: bytes in ZeroMQ's queue, up to the last message with a tracker.
        unmarked: bytes handed to ZeroMQ since then.
        counted_unmarked: the part of these that `SendQueues` has counted.
        idle: whether nothing was added since the last sweep.
        marks_next: whether the next message must have a tracker, whatever its size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counted = self.marked = self.unmarked = self.counted_unmarked = 0
        self.idle = self.marks_next = False
        self._marks: deque[tuple[Tracker, int]] = deque()

    def handed_over(self, tracker: Tracker | None) -> int:
        """Remove the message that `next` returned: ZeroMQ has it; return its size in bytes."""
        nbytes = self.sent()
        self.unmarked += nbytes
        if tracker is not None:
            self._marks.append((tracker, self.unmarked))
            self.marked += self.unmarked
            self.unmarked, self.marks_next = 0, False
        return nbytes

    def release(self) -> None:
        """Stop counting what has left ZeroMQ's queue."""
        while self._marks and self._marks[0][0].done:
            self.marked -= self._marks.popleft()[1]


class SendQueues:
    """The frames for all connections.

    Args:
        most: bytes that may wait for one connection. What exceeds them is dropped: nodes recover
            from that as from any lost frame.
        most_total: bytes that may wait for all. Beyond them, only `RESERVED_BYTES` may wait for
            each.

    Attributes:
        dropped: number of frames dropped.
    """

    def __init__(self, most: int, most_total: int) -> None:
        self._most, self._most_total = most, most_total
        self._queues: dict[bytes, SendQueue] = {}
        self._filled: dict[bytes, SendQueue] = {}
        """Those with frames that ZeroMQ does not have yet."""
        self._total = self._unmarked = 0
        self._mark_bytes = max(MARK_BYTES, min(MOST_UNMARKED_BYTES, most // 32))
        self._released = False
        """Whether all queues were released since the last `begin`."""
        self.dropped = 0

    def __bool__(self) -> bool:
        return bool(self._filled)

    def add(self, peer: bytes, header: bytes, buffers: Sequence[Buffer]) -> None:
        """Append a frame, or drop it if too many bytes wait."""
        queue = self._queues.get(peer)
        if queue is None:
            queue = self._queues[peer] = SendQueue()
        is_much = queue.counted >= self._most or self._total >= self._most_total
        if is_much and self._exceeds(queue, self._most):
            self.dropped += 1
            return
        queue.idle = False
        queue.add(header, buffers)
        self._filled[peer] = queue
        self.count(queue)

    def needs_mark(self, queue: SendQueue) -> bool:
        """Return whether the message that ``queue.next`` has returned must have a tracker."""
        unmarked = queue.unmarked + queue.next_bytes
        if unmarked < MARK_BYTES:
            return queue.marks_next
        are_many = self._unmarked >= self._most_total // 16
        return are_many or unmarked >= self._mark_bytes or queue.marks_next

    def has_room(self, peer: bytes) -> bool:
        """Return whether a chunk can be sent; half of the bytes are left to other frames."""
        queue = self._queues.get(peer)
        return queue is None or not self._exceeds(queue, self._most // 2)

    def begin(self) -> list[tuple[bytes, SendQueue]]:
        """Return the connections with frames that ZeroMQ does not have yet."""
        self._released = False
        return list(self._filled.items())

    def emptied(self, peer: bytes) -> None:
        """Note that ZeroMQ has all frames of a connection."""
        del self._filled[peer]

    def discard(self, peer: bytes) -> None:
        """Drop the frames of a connection, which is gone."""
        queue = self._queues.pop(peer, None)
        if queue is not None:
            self._total -= queue.counted
            self._unmarked -= queue.counted_unmarked
            self._filled.pop(peer, None)

    def count(self, queue: SendQueue) -> None:
        """Count the bytes of a queue again, after a change."""
        nbytes = queue.nbytes + queue.marked
        self._total += nbytes - queue.counted
        queue.counted = nbytes
        if queue.unmarked != queue.counted_unmarked:
            self._unmarked += queue.unmarked - queue.counted_unmarked
            queue.counted_unmarked = queue.unmarked

    def sweep(self) -> list[bytes]:
        """Drop the records of idle connections; return those whose state is unknown.

        Send them a frame with a tracker: it tells whether they are gone, or do not read.
        """
        unknown = []
        for peer, queue in list(self._queues.items()):
            queue.release()
            self.count(queue)
            if queue.counted or not queue.idle:
                queue.idle = True
            elif queue.unmarked < _NEGLIGIBLE_BYTES:
                self._unmarked -= queue.counted_unmarked
                del self._queues[peer]
            else:
                queue.marks_next = True
                unknown.append(peer)
        return unknown

    def _exceeds(self, queue: SendQueue, most: int) -> bool:
        """Return whether a queue has as many bytes as it may have."""
        queue.release()
        self.count(queue)
        if queue.counted >= most:
            return True
        if self._total >= self._most_total and not self._released:
            self._released = True
            for each in self._queues.values():
                each.release()
                self.count(each)
        return self._total >= self._most_total and queue.counted >= RESERVED_BYTES


_Request = TypeVar("_Request")


class WaitingChunks(Generic[_Request]):
    """Requests of chunks that wait, unread, until their connections have read others.

    Args:
        has_room: returns whether a connection can be sent a chunk.
    """

    def __init__(self, has_room: Callable[[bytes], bool]) -> None:
        self._has_room = has_room
        self._waiting: dict[bytes, deque[_Request]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def may_send(self, peer: bytes, request: _Request) -> bool:
        """Return whether a chunk can be sent now; otherwise queue its request."""
        waiting = self._waiting.get(peer)
        if waiting is None and self._has_room(peer):
            return True
        if waiting is None:
            waiting = self._waiting[peer] = deque()
        if len(waiting) < CHUNKS_WAITING:
            waiting.append(request)
        return False

    def take(self) -> Iterator[_Request]:
        """Yield the requests that can be answered now; each is answered before the next."""
        for peer, waiting in list(self._waiting.items()):
            while waiting and self._has_room(peer):
                yield waiting.popleft()
            if not waiting:
                del self._waiting[peer]

    def discard(self, peer: bytes) -> None:
        """Drop the requests of a connection."""
        self._waiting.pop(peer, None)
