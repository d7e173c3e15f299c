"""What the Broker core takes, gives and remembers: events, actions, nodes and runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import xxhash
from msgspec import Struct

from fedmq.broker.core.deduplication import PostFingerprint
from fedmq.broker.errors import WireError
from fedmq.broker.ledger.entries import Accepted, BlobName, Entry, blob_name
from fedmq.broker.rejections import Rejection
from fedmq.broker.wire.addresses import AGGREGATOR
from fedmq.broker.wire.chunked_transfer import Fetcher, Owned
from fedmq.broker.wire.schema import AnyFrame, Blob, Buffer, Frame, Hello, Message, NumberedFrame

UPLOAD_WINDOW_CHUNKS = 8
"""Twice a node's own window: the broker writes each chunk, and more are to come meanwhile
(measured on two cores: 560 MB/s with 4, 640 with 8, 710 with 16)."""


@dataclass(frozen=True)
class Continuation:
    """A run that is taken up again, with all of its nodes, when the broker starts.

    run: its id.
    config: its configuration from now on.
    further: whether an end that it has reached is lifted.
    """

    run: str
    config: str
    further: bool = False


class Store(Protocol):
    """What the core reads from the ledger."""

    def size_of(self, name: BlobName) -> int | None:
        """Return the size of a blob that is there as a whole, or None."""

    def have(self, name: BlobName) -> int:
        """Return how many bytes of a blob, from its start, are there."""

    def resume(self, name: BlobName, size: int) -> tuple[int, xxhash.xxh3_128]:
        """Return how many bytes of a blob, from its start, are there, and their hash so far."""

    def read(self, seq: int) -> Accepted:
        """Return an accepted message, written or still to be written."""


# ---- events


class ReceivedFrom(Struct, frozen=True):
    """A frame from a connection. ``nbytes``: what it took on the wire, buffers included."""

    peer: bytes
    frame: AnyFrame
    buffers: Sequence[Buffer] = ()
    nbytes: int = 0


class Unreadable(Struct, frozen=True):
    """Bytes from a connection that are not a frame."""

    peer: bytes
    error: WireError


class Gone(Struct, frozen=True):
    """A connection that was probed is no more."""

    peer: bytes


class DiskFull(Struct, frozen=True):
    """Nothing can be written to the ledger, for this reason; empty: it can be again."""

    reason: str


class TimerFired(Struct, frozen=True):
    """A deadline has passed, or a batch of events has ended."""


Event = ReceivedFrom | Unreadable | Gone | DiskFull | TimerFired


# ---- actions


class Append(Struct, frozen=True):
    """Put an entry into the ledger.

    uses: blobs that it names. kept: until it is consumed; else nobody is to read them.
    """

    entry: Entry
    uses: Sequence[BlobName] = ()
    kept: bool = True


class Put(Struct, frozen=True):
    """Put a piece of a blob into the ledger."""

    name: BlobName
    size: int
    start: int
    data: Buffer


class Unpin(Struct, frozen=True):
    """These blobs were on their way, and are not wanted now."""

    names: tuple[BlobName, ...]


class Discard(Struct, frozen=True):
    """Take back the pieces of a blob that were put so far: they are not what it says."""

    name: BlobName
    size: int


class SendTo(Struct, frozen=True):
    """Send a frame, with these blobs from the ledger as its buffers."""

    peer: bytes
    frame: Frame
    blobs: Sequence[tuple[BlobName, int, int]] = ()
    """(name, start, size) of each buffer."""
    apart: Sequence[tuple[int, BlobName]] = ()
    """Of a delivery: blobs that are not sent with it, and their indices."""


class Probe(Struct, frozen=True):
    """Find out whether this connection still stands; if not, say `Gone`."""

    peer: bytes


class Log(Struct, frozen=True):
    """Something that a person may want to know; ``level`` as in logging."""

    level: str
    event: str
    fields: dict[str, Any]


Action = Append | Put | Unpin | Discard | SendTo | Probe | Log


# ---- state


@dataclass
class PendingPost:
    """A numbered frame that waits for its blobs, or for the frames before it."""

    frame: NumberedFrame
    message: Message | None = None
    fingerprint: PostFingerprint | None = None
    apart: list[Blob] = field(default_factory=list)
    """Its blobs that are not beside it."""
    missing: set[Owned] = field(default_factory=set)
    refusal: Rejection | None = None

    def names(self) -> tuple[BlobName, ...]:
        """Return the names of all blobs of its message."""
        message = self.message
        return tuple(blob_name(message, blob) for blob in message.blobs) if message else ()


@dataclass
class Node:
    """A node that has been admitted, here or gone: its session, lease, and what is under way.

    peer: its connection; empty after a restart of the broker, until it says Hello.
    next_n: number of the next numbered frame.
    pending: numbers of its unfinished messages, in order, each with its address.
    queue: those of them that are still to be sent.
    in_flight: (number, bytes) of each of them that was sent and not taken yet.
    sent: every one of them below this number has been sent.
    resume_at: nothing is sent before this time.
    """

    hello: Hello
    run: RunState
    peer: bytes
    lease_until: float
    alive: bool = True
    last_seen: float = 0.0
    next_n: int = 0
    pending_posts: deque[PendingPost] = field(default_factory=deque)
    fetcher: Fetcher = field(default_factory=lambda: Fetcher(UPLOAD_WINDOW_CHUNKS))
    pending: dict[int, str] = field(default_factory=dict)
    queue: deque[int] = field(default_factory=deque)
    in_flight: deque[tuple[int, int]] = field(default_factory=deque)
    in_flight_bytes: int = 0
    sent: int = 0
    resume_at: float = 0.0
    received_bytes: int = 0
    sent_bytes: int = 0
    pointed_bytes: int = 0
    """Blobs of this session's deliveries that did not go with them."""
    read_bytes: int = 0
    """What of those it has read from the ledger's files, in place of being sent it."""
    sessions: int = 0
    name: str = field(init=False)

    def __post_init__(self) -> None:
        """Look the name up once: it is asked for at each message."""
        self.name = self.hello.node


@dataclass
class RunState:
    """A run: its nodes, who hosts which address, and what waits for an absent host.

    hosts: address to the name of the node that hosts it.
    waiting: numbers of the messages for an address that no live node hosts, in order.
    refused: messages that were refused, but are not done with: their recipient needs them
        again should it restart.
    interrupted: how many sessions died at a message, by its number.
    checkpoint: number of the newest one.
    over: why the run is over; empty while it is not.
    identity: tells this run from any other of the same id; empty for runs of old ledgers.
    continued: number of the message by which it goes further than it was to, or None.
    carried: bytes to its nodes, and from them, that brokers before this one have counted.
    """

    id: str
    config: str
    total_clients: int
    nodes: dict[str, Node] = field(default_factory=dict)
    hosts: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, list[int]] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    interrupted: dict[int, int] = field(default_factory=dict)
    checkpoint: int | None = None
    over: str = ""
    identity: str = ""
    continued: int | None = None
    carried: tuple[int, int] = (0, 0)

    def traffic(self) -> tuple[int, int]:
        """Return the bytes on the wire to all nodes but the aggregator, and from them."""
        nodes = [each for each in self.nodes.values() if each.hello.role != AGGREGATOR]
        down, up = self.carried
        return (
            down + sum(each.sent_bytes + each.read_bytes for each in nodes),
            up + sum(each.received_bytes for each in nodes),
        )

    def host_of(self, address: str) -> Node | None:
        """Return the live node that hosts an address."""
        node = self.nodes.get(self.hosts.get(address, ""))
        return node if node is not None and node.alive else None
