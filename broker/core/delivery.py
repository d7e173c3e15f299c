"""Deliver messages to a node: in order, under credit, again until the node has handled them.

Deliveries go out in the order of their numbers. Each says from which number on the node has
no other unfinished message (``after``), so a node notices a gap and takes each message once.
Only a window of deliveries is in flight; the others stay in the ledger, so a slow reader costs
the broker a few bytes a message. `PendingAcks` acknowledges frames in the other direction:
cumulatively, and a little late, because no node waits for that.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from fedmq.broker.core.events import SendTo
from fedmq.broker.core.lifecycles import SessionState
from fedmq.broker.core.state import Node
from fedmq.broker.ledger.entries import Accepted, BlobName, blob_name
from fedmq.broker.wire import schema
from fedmq.broker.wire.addresses import AGGREGATOR, addresses, num_addresses
from fedmq.broker.wire.encoding import inline_choice
from fedmq.broker.wire.schema import Ack, Deliver, Message

WINDOW_MESSAGES = 8192
WINDOW_BYTES = 4 << 20
MAX_REQUESTS = 1 << 14
"""Ids of deliveries that are kept for each node, so that its answers can be checked without reading
the ledger; those beyond that are read from there."""
RETRY_S = 0.5
RETRY_MAX_S = 30.0
ACK_WITHIN_S = 0.1
"""Longest time until a frame is acknowledged, in seconds."""
ACK_FRAMES = 128
"""Frames of one node after which they are acknowledged at once: its link waits for acknowledgments
of `WINDOW_FRAMES`."""
_ACK_BYTES = 8192
"""Bytes with a frame that count as another frame: its link waits for those of `WINDOW_BYTES`."""


def enqueue(node: Node, seq: int, address: str) -> None:
    """Queue the newest message for a node."""
    node.pending[seq] = address
    node.queue.append(seq)


def enqueue_waiting(node: Node) -> None:
    """Queue the messages that have waited for the addresses of this node."""
    run, hello = node.run, node.hello
    few = len(run.waiting) < num_addresses(hello)  # a node can have a million addresses
    found: dict[int, str] = {}
    for address in [*run.waiting] if few else addresses(hello):
        if run.hosts.get(address) == hello.node:
            found |= dict.fromkeys(run.waiting.pop(address, ()), address)
    node.pending = dict(sorted((node.pending | found).items()))


def deliver(node: Node, read: Callable[[int], Accepted], now: float) -> list[SendTo]:
    """Return the deliveries that fit a node's window; ``read`` returns a message by number."""
    sends: list[SendTo] = []
    while node.queue and _may_send(node, now):
        seq = node.queue.popleft()
        if seq in node.pending:
            found = read(seq)
            sends.append(delivery(node, seq, found.at, found.message, found.read()))
    return sends


def delivery(node: Node, seq: int, at: float, data: bytes, message: Message) -> SendTo:
    """Return the delivery of one message, and count it as in flight."""
    inline = inline_choice(message.blobs, schema.INLINE_BYTES) if message.blobs else ()
    size = len(data)
    beside: list[tuple[BlobName, int, int]] = []
    apart: list[tuple[int, BlobName]] = []
    for index, blob in enumerate(message.blobs):
        if index in inline:
            beside.append((blob_name(message, blob), 0, blob.size))
            size += blob.size
        elif node.reads_files:
            apart.append((index, blob_name(message, blob)))
            node.pointed_bytes += blob.size
    if len(node.requests) < MAX_REQUESTS and node.hello.role != AGGREGATOR:
        node.requests[seq] = message.id
    if message.blobs:
        node.note_readable(seq, message)
    node.in_flight_bytes += size
    node.in_flight.append((seq, size))
    frame = Deliver(seq=seq, at=at, message=data, inline=inline, after=node.sent)
    node.sent = seq + 1
    return SendTo(node.peer, frame, beside, apart)


def is_open(node: Node, now: float) -> bool:
    """Return whether a new message may be sent at once."""
    return not node.queue and _may_send(node, now)


def note_taken(node: Node, taken: int) -> None:
    """Release the credit of every delivery numbered below ``taken``: the node has it."""
    while node.in_flight and node.in_flight[0][0] < taken:
        _, size = node.in_flight.popleft()
        node.in_flight_bytes -= size


def start_over(node: Node, got: int, read: Callable[[int], Accepted] | None) -> None:
    """After a Hello, queue every pending message that has not arrived at the node.

    Of those that have, a node without a record of them may read the blobs again; it keeps its
    record if ``read`` is None.
    """
    node.in_flight.clear()
    node.in_flight_bytes = 0
    node.sent = got
    node.queue = deque(seq for seq in node.pending if seq >= got)
    if read is None:
        return
    node.readable.clear()
    for seq in node.pending if node.hello.role != AGGREGATOR else ():
        if seq < got:
            node.note_readable(seq, read(seq).read())


def retry_pause(interrupted: int) -> float:
    """Return the pause, in seconds, before a message that ended sessions is sent again."""
    return 0.0 if interrupted < 2 else min(RETRY_MAX_S, RETRY_S * 2.0 ** min(interrupted - 2, 60))


def _may_send(node: Node, now: float) -> bool:
    has_room = len(node.in_flight) < WINDOW_MESSAGES and node.in_flight_bytes < WINDOW_BYTES
    return node.state is not SessionState.AWAITED and node.resume_at <= now and has_room


class PendingAcks:
    """Nodes with frames that were applied but not acknowledged yet.

    Attributes:
        due: when the oldest of them must be acknowledged; infinite if there are none.
    """

    def __init__(self) -> None:
        self.due = math.inf
        self._pending: dict[int, Node] = {}
        self._counts: dict[int, int] = {}

    def add(self, node: Node, now: float, nbytes: int = 0) -> None:
        """Schedule an acknowledgment for a frame that has just been applied, or had been before.

        nbytes: size of what came with the frame.
        """
        key = id(node)
        self._pending[key] = node
        count = self._counts[key] = self._counts.get(key, 0) + 1 + nbytes // _ACK_BYTES
        self.due = min(self.due, now + (ACK_WITHIN_S if count < ACK_FRAMES else 0.0))

    def take(self) -> list[SendTo]:
        """Return all acknowledgments that are pending, and clear them."""
        sends = [each for node in self._pending.values() for each in _ack(node)]
        self._pending.clear()
        self._counts.clear()
        self.due = math.inf
        return sends

    def take_of(self, node: Node) -> list[SendTo]:
        """Return the acknowledgment of a node, if one is pending, and clear it."""
        if self._pending.pop(id(node), None) is None:
            return []
        del self._counts[id(node)]
        self.due = self.due if self._pending else math.inf
        return _ack(node)

    def validate_state(self) -> None:
        """Raise AssertionError if acknowledgments are pending without a time, or the reverse."""
        waiting = self.due < math.inf
        if waiting != bool(self._pending) or self._pending.keys() != self._counts.keys():
            names = [node.name for node in self._pending.values()]
            raise AssertionError(f"acknowledgments of {names} are due at {self.due}")


def _ack(node: Node) -> list[SendTo]:
    """Return the acknowledgment of all frames of a node that were applied, if there are any."""
    first = node.pending_frames[0].n if node.pending_frames else node.next_n
    return [SendTo(node.peer, Ack(upto=first - 1))] if first and node.peer else []
