"""Offering a node its messages: in order, under credit, again until they are done with.

Deliveries go out in the order of their numbers, and each says from where on the node has
no other unfinished message (``after``): so a node notices a gap, and takes a message once
however often it comes. Only a window of them is on its way; the others stay in the ledger,
and a reader that stalls costs the broker a few bytes a message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from fedmq.broker.core.state import Node, SendTo
from fedmq.broker.ledger.entries import Accepted, BlobName, blob_name
from fedmq.broker.wire import schema
from fedmq.broker.wire.encoding import inline_choice
from fedmq.broker.wire.schema import Deliver, Message

WINDOW_MESSAGES = 8192
WINDOW_BYTES = 4 << 20
RETRY_S = 0.5
RETRY_MAX_S = 30.0


def enqueue(node: Node, seq: int, address: str) -> None:
    """Put the newest message into a node's inbox."""
    node.pending[seq] = address
    node.queue.append(seq)


def enqueue_waiting(node: Node, seqs: dict[int, str]) -> None:
    """Put messages that have waited for this node into its inbox."""
    node.pending = dict(sorted((node.pending | seqs).items()))


def deliver(node: Node, read: Callable[[int], Accepted], now: float) -> list[SendTo]:
    """Return the deliveries that a node's window has room for; ``read`` finds a message."""
    sends: list[SendTo] = []
    while node.queue and _may_send(node, now):
        seq = node.queue.popleft()
        if seq in node.pending:
            found = read(seq)
            sends.append(delivery(node, seq, found.at, found.message, found.read()))
    return sends


def delivery(node: Node, seq: int, at: float, data: bytes, message: Message) -> SendTo:
    """Return one delivery, and count it as sent."""
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
    """Tell whether a new message may go out at once."""
    return not node.queue and _may_send(node, now)


def note_taken(node: Node, taken: int) -> None:
    """Note that a node has taken every delivery numbered below ``taken``."""
    while node.in_flight and node.in_flight[0][0] < taken:
        _, size = node.in_flight.popleft()
        node.in_flight_bytes -= size


def start_over(node: Node, got: int) -> None:
    """After a Hello: whatever has not arrived is to be sent (again)."""
    node.in_flight.clear()
    node.in_flight_bytes = 0
    node.sent = got
    node.queue = deque(seq for seq in node.pending if seq >= got)


def retry_pause(interrupted: int) -> float:
    """Return how long a message waits, at which so many sessions died, in seconds."""
    return 0.0 if interrupted < 2 else min(RETRY_MAX_S, RETRY_S * 2.0 ** (interrupted - 2))


def _may_send(node: Node, now: float) -> bool:
    has_room = len(node.in_flight) < WINDOW_MESSAGES and node.in_flight_bytes < WINDOW_BYTES
    return bool(node.peer) and node.resume_at <= now and has_room
