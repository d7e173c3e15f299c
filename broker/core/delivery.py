"""Deliver messages to a node: in order, under credit, again until the node has handled them.

Deliveries go out in the order of their numbers. Each says from which number on the node has
no other unfinished message (``after``), so a node notices a gap and takes each message once.
Only a window of deliveries is in flight; the others stay in the ledger, so a slow reader costs
the broker a few bytes a message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from fedmq.broker.core.events import SendTo
from fedmq.broker.core.lifecycles import SessionState
from fedmq.broker.core.state import Node
from fedmq.broker.ledger.entries import Accepted, BlobName, blob_name
from fedmq.broker.wire import schema
from fedmq.broker.wire.encoding import inline_choice
from fedmq.broker.wire.schema import Deliver, Message

WINDOW_MESSAGES = 8192
WINDOW_BYTES = 4 << 20
RETRY_S = 0.5
RETRY_MAX_S = 30.0


def enqueue(node: Node, seq: int, address: str) -> None:
    """Queue the newest message for a node."""
    node.pending[seq] = address
    node.queue.append(seq)


def enqueue_waiting(node: Node, seqs: dict[int, str]) -> None:
    """Queue messages that have waited for this node."""
    node.pending = dict(sorted((node.pending | seqs).items()))


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
    inline = inline_choice(message.blobs, schema.INLINE_BYTES)
    size = len(data)
    beside: list[tuple[BlobName, int, int]] = []
    apart: list[tuple[int, BlobName]] = []
    for index, blob in enumerate(message.blobs):
        if index in inline:
            beside.append((blob_name(message, blob), 0, blob.size))
            size += blob.size
        else:
            apart.append((index, blob_name(message, blob)))
            node.pointed_bytes += blob.size
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


def start_over(node: Node, got: int) -> None:
    """After a Hello, queue every pending message that has not arrived at the node."""
    node.in_flight.clear()
    node.in_flight_bytes = 0
    node.sent = got
    node.queue = deque(seq for seq in node.pending if seq >= got)


def retry_pause(interrupted: int) -> float:
    """Return the pause, in seconds, before a message that ended sessions is sent again."""
    return 0.0 if interrupted < 2 else min(RETRY_MAX_S, RETRY_S * 2.0 ** (interrupted - 2))


def _may_send(node: Node, now: float) -> bool:
    has_room = len(node.in_flight) < WINDOW_MESSAGES and node.in_flight_bytes < WINDOW_BYTES
    return node.state is not SessionState.AWAITED and node.resume_at <= now and has_room
