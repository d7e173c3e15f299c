"""Offering a node its messages: in order, under credit, again until they are done with.

Deliveries go out in the order of their numbers, and each says from where on the node has
no other unfinished message (``after``): so a node notices a gap, and takes a message once
however often it comes. Only a window of them is on its way; the others stay in the ledger,
and a reader that stalls costs the broker a few bytes a message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from fedmq.broker.core.state import Node, SendTo
from fedmq.broker.ledger.entries import Accepted, AcceptedAll, BlobName, blob_name
from fedmq.broker.wire import schema
from fedmq.broker.wire.encoding import decode_message, inline_choice, slices_of
from fedmq.broker.wire.schema import Deliver, DeliverAll, Message

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
    plain: list[tuple[int, bytes]] = []
    at = 0.0
    while node.queue and _may_send(node, now):
        seq = node.queue.popleft()
        if seq not in node.pending:
            continue
        accepted = read(seq)
        message = decode_message(accepted.message)
        if plain and (message.blobs or accepted.at != at):
            sends += _frames(node, at, plain)
            plain = []
        if message.blobs:
            sends.append(delivery(node, seq, accepted.at, accepted.message, message))
        else:
            at = accepted.at
            plain.append((seq, accepted.message))
            _use_window(node, 1, len(accepted.message))
            if len(plain) == schema.MAX_ALL:
                sends += _frames(node, at, plain)
                plain = []
    sends += _frames(node, at, plain)
    return sends


def bring(node: Node, found: dict[int, str], among: AcceptedAll, now: float) -> list[SendTo]:
    """Put the newest messages, without blobs, into a node's inbox: their numbers, and addresses.

    Returns their deliveries, if there is room.
    """
    node.pending |= found
    if not is_open(node, now):
        node.queue.extend(found)
        return []
    if len(found) == len(among.messages):
        messages = list(zip(found, among.messages, strict=True))
    else:
        messages = [(seq, among.messages[seq - among.seq]) for seq in found]
    _use_window(node, len(messages), sum(len(data) for _, data in messages))
    return list(_frames(node, among.at, messages))


def _frames(node: Node, at: float, messages: Sequence[tuple[int, bytes]]) -> Iterator[SendTo]:
    """Yield deliveries of messages without blobs, as few as the node understands, as sent."""
    sizes = [len(data) for _, data in messages]
    for part in slices_of(sizes, 1 if node.hello.v < schema.ALL_SINCE else schema.MAX_ALL):
        some = tuple(messages[part])
        (first, data), after = some[0], node.sent
        last = some[-1][0]
        node.sent = last + 1
        node.in_flight.append((last, len(some), sum(sizes[part])))
        if len(some) == 1:
            yield SendTo(node.peer, Deliver(seq=first, at=at, message=data, after=after))
        else:
            yield SendTo(node.peer, DeliverAll(at=at, messages=some, after=after))


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
    _use_window(node, 1, size)
    node.in_flight.append((seq, 1, size))
    frame = Deliver(seq=seq, at=at, message=data, inline=inline, after=node.sent)
    node.sent = seq + 1
    return SendTo(node.peer, frame, beside, apart)


def _use_window(node: Node, messages: int, size: int) -> None:
    node.in_flight_messages += messages
    node.in_flight_bytes += size


def is_open(node: Node, now: float) -> bool:
    """Tell whether a new message may go out at once."""
    return not node.queue and _may_send(node, now)


def note_taken(node: Node, taken: int) -> None:
    """Note that a node has taken every delivery numbered below ``taken``."""
    while node.in_flight and node.in_flight[0][0] < taken:
        _, messages, size = node.in_flight.popleft()
        node.in_flight_messages -= messages
        node.in_flight_bytes -= size


def start_over(node: Node, got: int) -> None:
    """After a Hello: whatever has not arrived is to be sent (again)."""
    node.in_flight.clear()
    node.in_flight_messages = node.in_flight_bytes = 0
    node.sent = got
    node.queue = deque(seq for seq in node.pending if seq >= got)


def retry_pause(interrupted: int) -> float:
    """Return how long a message waits, at which so many sessions died, in seconds."""
    return 0.0 if interrupted < 2 else min(RETRY_MAX_S, RETRY_S * 2.0 ** (interrupted - 2))


def _may_send(node: Node, now: float) -> bool:
    has_room = node.in_flight_messages < WINDOW_MESSAGES and node.in_flight_bytes < WINDOW_BYTES
    return bool(node.peer) and node.resume_at <= now and has_room
