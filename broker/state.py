"""What the Broker core takes, gives and remembers: events, actions, nodes and runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmq.broker.errors import WireError
from fedmq.broker.fetch import Fetcher, Owned
from fedmq.broker.ledger import BlobName, Entry
from fedmq.broker.wire import AnyFrame, Buffer, Frame, Hello, Message, Numbered, Refused

AGGREGATOR = "aggregator"
EVALUATOR = "evaluator"
WORKER = "worker"
RECORD = "record"
ROLES = (AGGREGATOR, EVALUATOR, WORKER)
BROKER = "broker"


@dataclass(frozen=True)
class BrokerSettings:
    """Times of the broker, in seconds."""

    lease_s: float = 10.0
    beat_s: float = 1.0


# ---- events


@dataclass(frozen=True, slots=True)
class Received:
    """A frame from a connection. ``nbytes``: what it took on the wire, buffers included."""

    peer: bytes
    frame: AnyFrame
    buffers: Sequence[Buffer] = ()
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Bytes from a connection that are not a frame."""

    peer: bytes
    error: WireError


@dataclass(frozen=True, slots=True)
class Wake:
    """A deadline has passed, or a batch of events has ended."""


Event = Received | Unreadable | Wake


# ---- actions


@dataclass(frozen=True, slots=True)
class Append:
    """Put an entry into the ledger."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Put:
    """Put a piece of a blob into the ledger."""

    name: BlobName
    size: int
    start: int
    data: Buffer


@dataclass(frozen=True, slots=True)
class Drop:
    """Take back the pieces of a blob that were put so far: they are not what it says."""

    name: BlobName
    size: int


@dataclass(frozen=True, slots=True)
class Send:
    """Send a frame, with these blobs from the ledger as its buffers."""

    peer: bytes
    frame: Frame
    blobs: tuple[tuple[BlobName, int, int], ...] = ()
    """(name, start, size) of each buffer."""


@dataclass(frozen=True, slots=True)
class Log:
    """Something that a person may want to know; ``level`` as in logging."""

    level: str
    event: str
    fields: dict[str, Any]


Action = Append | Put | Drop | Send | Log


# ---- state


@dataclass
class Pending:
    """An accepted message that its recipient is not done with."""

    seq: int
    at: float
    data: bytes
    message: Message


@dataclass
class Parked:
    """A numbered frame that waits for its blobs, or for the frames before it."""

    frame: Numbered
    message: Message | None = None
    missing: set[Owned] = field(default_factory=set)
    refusal: str = ""


@dataclass
class Node:
    """A node that has been admitted, here or gone: its session, lease, and what is under way."""

    hello: Hello
    run: Run
    peer: bytes
    lease_until: float
    alive: bool = True
    next_n: int = 0
    """Number of the next numbered frame."""
    refused: dict[int, Refused] = field(default_factory=dict)
    """Posts that were refused, by number."""
    parked: deque[Parked] = field(default_factory=deque)
    fetcher: Fetcher = field(default_factory=Fetcher)
    unconsumed: dict[int, Pending] = field(default_factory=dict)
    received_bytes: int = 0
    sent_bytes: int = 0
    sessions: int = 0

    @property
    def name(self) -> str:
        """Return the node's name."""
        return self.hello.node


@dataclass
class Run:
    """A run: its nodes, who hosts which address, and what waits for an absent host."""

    id: str
    config: str
    total_clients: int
    nodes: dict[str, Node] = field(default_factory=dict)
    hosts: dict[str, str] = field(default_factory=dict)
    """Address to the name of the node that hosts it."""
    waiting: dict[str, list[Pending]] = field(default_factory=dict)
    """Accepted messages for an address that no live node hosts, in order."""
    over: str = ""
    """Why the run is over; empty while it is not."""


def addresses(hello: Hello) -> Iterator[str]:
    """Yield the addresses that a node hosts."""
    if hello.role == WORKER:
        for low, high in hello.clients:
            for client in range(low, high + 1):
                yield f"client/{client}"
    elif hello.role in (AGGREGATOR, EVALUATOR):
        yield hello.role
