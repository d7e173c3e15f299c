"""What the Broker core remembers: posts on their way, nodes and runs."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from msgspec import Struct
from msgspec.structs import replace

from fedmq.broker.access.quotas import JOINS_AT_ONCE, RESTARTS_AT_ONCE, Bucket
from fedmq.broker.access.rights import KEYLESS, Origin
from fedmq.broker.core.deduplication import PostFingerprint
from fedmq.broker.core.lifecycles import PRESENT, SessionEvent, SessionState, next_state
from fedmq.broker.ledger.entries import BlobName, blob_name
from fedmq.broker.rejections import Code, Rejection
from fedmq.broker.wire.addresses import AGGREGATOR, num_addresses
from fedmq.broker.wire.chunked_transfer import Fetcher, Owned
from fedmq.broker.wire.client_map import AddressMap
from fedmq.broker.wire.encoding import decode_message
from fedmq.broker.wire.schema import (
    MAX_BUFFERS,
    Blob,
    Done,
    Hello,
    Message,
    Post,
    RunEnded,
)
from fedmq.broker.wire.window import held_bytes

UPLOAD_WINDOW_CHUNKS = 8
"""Twice a node's own window, so that chunks arrive while the broker writes (measured on two
cores: 560 MB/s with 4, 640 with 8, 710 with 16)."""
ENDED_NODES = 400
"""Most nodes that the entry of a run's end lists one by one."""
MAX_READABLE = 1000
"""Finished blobs that a node's `readable` may hold before they are removed."""


class PendingPost(Struct, frozen=True):
    """A post that was parsed; it waits for its blobs, or for the frames before it.

    apart: blobs of its message that did not come with it.
    answers: whether it must answer a message that was delivered to its sender.
    held: see `held_bytes`, while the post waits; then its message has no body.
    """

    frame: Post
    message: Message
    fingerprint: PostFingerprint
    apart: tuple[Blob, ...] = ()
    answers: bool = False
    held: int = 0

    @property
    def n(self) -> int:
        """Return the number of its frame."""
        return self.frame.n

    @property
    def names(self) -> tuple[BlobName, ...]:
        """Return the names of all blobs of its message."""
        return tuple(blob_name(self.message, blob) for blob in self.message.blobs)

    def rejected(self, code: Code, reason: str) -> RejectedPost:
        """Return the same post, to be rejected in its turn."""
        rejection = Rejection(code, reason)
        return RejectedPost(
            self.frame, rejection, self.message.id, self.fingerprint, self.names, self.held
        )

    def hold(self) -> PendingPost:
        """Return the same post without the body: its objects may take 64 times its bytes."""
        held = held_bytes(self.frame, len(self.apart))
        return replace(self, message=replace(self.message, body={}), held=held)

    def complete(self) -> PendingPost:
        """Return the same post with its body."""
        return replace(self, message=decode_message(self.frame.message)) if self.held else self


class RejectedPost(Struct, frozen=True):
    """A post that the broker rejects once the frames before it have been applied.

    id: of its message; if that cannot be read, the session and number of its frame.
    names: of all blobs of its message.
    held: see `held_bytes`, while the post waits.
    """

    frame: Post
    rejection: Rejection
    id: str
    fingerprint: PostFingerprint
    names: tuple[BlobName, ...] = ()
    held: int = 0

    @property
    def n(self) -> int:
        """Return the number of its frame."""
        return self.frame.n

    def hold(self) -> RejectedPost:
        """Return the same post, with the memory that it uses while it waits."""
        return replace(self, held=held_bytes(self.frame, len(self.names)))


PendingFrame = PendingPost | RejectedPost | Done | RunEnded


@dataclass
class Node:
    """An admitted node, connected or gone: its session, its lease, and its messages.

    peer: its connection; empty after a restart of the broker, until it says Hello.
    next_n: number of the next numbered frame.
    pending_frames: numbered frames that have not been applied yet, in order.
    held_bytes: memory that they use.
    has_dropped: whether frames were dropped because it was too much.
    pending: its unfinished messages, in order: number to address.
    requests: ids of those that were delivered, by number; not all if there are very many.
    queue: numbers of the pending messages that have not been sent yet.
    in_flight: (number, bytes) of each delivery that was sent and not taken yet.
    sent: every pending message below this number has been sent.
    resume_at: no message is delivered before this time, in seconds since 1970.
    unchecked_bytes: see `Uploads`.
    origin: of its connection; the session belongs to the key in it.
    owner: of its name, see `fedmq.broker.access.owners`.
    reads_files: whether it may read blobs from the ledger's files.
    readable: numbers of the deliveries that name a blob.
    joins: of its name, for the limit of their rate.
    restarts: Hellos of the session that are answered with all deliveries at once.
    """

    hello: Hello
    run: RunState
    peer: bytes
    lease_until: float
    state: SessionState = SessionState.WAITING
    last_seen: float = 0.0
    next_n: int = 0
    pending_frames: deque[PendingFrame] = field(default_factory=deque)
    held_bytes: int = 0
    has_dropped: bool = False
    fetcher: Fetcher = field(default_factory=lambda: Fetcher(UPLOAD_WINDOW_CHUNKS))
    pending: dict[int, str] = field(default_factory=dict)
    requests: dict[int, str] = field(default_factory=dict)
    queue: deque[int] = field(default_factory=deque)
    in_flight: deque[tuple[int, int]] = field(default_factory=deque)
    in_flight_bytes: int = 0
    sent: int = 0
    resume_at: float = 0.0
    received_bytes: int = 0
    sent_bytes: int = 0
    pointed_bytes: int = 0
    """Bytes of blobs of this session's deliveries that were not sent with them."""
    read_bytes: int = 0
    """The part of these that the node has read from the ledger's files."""
    sessions: int = 0
    unchecked_bytes: int = 0
    origin: Origin = KEYLESS
    owner: str = ""
    reads_files: bool = False
    readable: dict[Owned, deque[int]] = field(default_factory=dict)
    joins: Bucket = field(default_factory=lambda: Bucket(JOINS_AT_ONCE))
    restarts: Bucket = field(default_factory=lambda: Bucket(RESTARTS_AT_ONCE))
    name: str = field(init=False)

    def __post_init__(self) -> None:
        """Look the name up once: it is needed for each message."""
        self.name = self.hello.node

    @property
    def alive(self) -> bool:
        """Return whether the session has not left: it gets the messages to its addresses."""
        return self.state in PRESENT

    def may_read(self, blob: Owned) -> bool:
        """Return whether the node may read a blob of its run.

        It posted the blob, or an unfinished delivery names it. An aggregator may read all.
        """
        return (
            any(seq in self.pending for seq in reversed(self.readable.get(blob, ())))
            or blob.owner == self.name
            or self.hello.role == AGGREGATOR
        )

    def note_readable(self, seq: int, message: Message) -> None:
        """Let the node read the blobs of an unfinished message that is delivered to it."""
        if self.hello.role != AGGREGATOR:
            if len(self.readable) > MAX_READABLE + 2 * MAX_BUFFERS * len(self.pending):
                self.readable = {k: v for k, v in self.readable.items() if self.may_read(k)}
            for blob in message.blobs:
                seqs = self.readable.setdefault(Owned(message.sender, blob.digest), deque())
                seqs.append(seq)
                while seqs[0] != seq and seqs[0] not in self.pending:
                    seqs.popleft()

    def finish(self, seq: int) -> bool:
        """Remove a message that the node has handled; return whether it was unfinished."""
        self.requests.pop(seq, None)
        return self.pending.pop(seq, None) is not None

    def hold(self, frame: PendingFrame) -> None:
        """Append a frame that must wait, and count its memory."""
        held = frame if isinstance(frame, Done | RunEnded) else frame.hold()
        self.pending_frames.append(held)
        self.held_bytes += held_size(held)

    def pop_frame(self) -> PendingFrame:
        """Remove the oldest pending frame, and return it."""
        frame = self.pending_frames.popleft()
        if self.held_bytes:
            self.held_bytes -= held_size(frame)
        return frame

    def drop_frames(self) -> None:
        """Drop the pending frames: the link sends them again with its next Hello."""
        if self.pending_frames:
            self.next_n = self.pending_frames[0].n
            self.pending_frames.clear()
            self.fetcher = Fetcher(UPLOAD_WINDOW_CHUNKS)
        self.held_bytes, self.has_dropped = 0, False

    def shrink(self) -> None:
        """Forget what a node that has left says again when it returns: its clients, mostly."""
        self.hello = replace(self.hello, clients=(), config="")
        self.readable.clear()

    def move(self, event: SessionEvent) -> None:
        """Apply an event to the session.

        Raises:
            ImpossibleTransition: the event cannot happen in its state.
        """
        self.state = next_state(self.state, event)

    def validate_state(self) -> None:
        """Raise AssertionError, with what is wrong, if the session contradicts itself."""
        if self.pending or self.queue or self.in_flight or self.requests:
            self._validate_messages()
        if self.state is SessionState.AWAITED and self.peer:
            raise AssertionError(f"{self.name} is awaited, but has a connection")
        if self.read_bytes > self.pointed_bytes:
            raise AssertionError(f"{self.name} has read {self.read_bytes} bytes: more than it got")
        if self.pending_frames:
            frames = [each.n for each in self.pending_frames]
            if sorted(frames) != frames or frames[-1] >= self.next_n:
                raise AssertionError(f"{self.name}'s frames {frames[:5]} are out of order")
            first = self.pending_frames[0]
            if not isinstance(first, PendingPost) or not any(
                Owned(first.message.sender, blob.digest) in self.fetcher for blob in first.apart
            ):
                raise AssertionError(f"{self.name}'s frame {first.n} waits for nothing")
        if (held := sum(map(held_size, self.pending_frames))) != self.held_bytes:
            raise AssertionError(f"{self.name} holds {held} bytes, not {self.held_bytes}")

    def _validate_messages(self) -> None:
        name, pending, queue, sent = self.name, [*self.pending], [*self.queue], self.sent
        if not self.alive and (pending or queue):
            raise AssertionError(f"{name} has left, but still has messages {pending[:5]}")
        if sorted(pending) != pending or sorted(set(queue)) != queue:
            raise AssertionError(f"{name}'s messages {pending} or queue {queue} are out of order")
        if not self.requests.keys() <= self.pending.keys():
            raise AssertionError(f"{name} has ids of messages that are finished")
        if queue and queue[0] < sent:
            raise AssertionError(f"{name}'s queue has message {queue[0]}, which was sent")
        if self.state is not SessionState.AWAITED and pending and pending[-1] >= sent:
            missing = {seq for seq in reversed(pending) if seq >= sent}.difference(queue)
            if missing:
                raise AssertionError(f"messages {missing} of {name} are neither sent nor queued")
        out = [seq for seq, _ in self.in_flight]
        if sorted(set(out)) != out or (out and out[-1] >= sent):
            raise AssertionError(f"{name}'s deliveries {out} are out of order, up to {sent}")
        if (total := sum(size for _, size in self.in_flight)) != self.in_flight_bytes:
            raise AssertionError(f"{name} has {total} bytes in flight, not {self.in_flight_bytes}")


def held_size(frame: PendingFrame) -> int:
    """Return the memory of a frame that waits, in bytes."""
    return held_bytes(frame, 0) if isinstance(frame, Done | RunEnded) else frame.held


@dataclass
class RunState:
    """A run: its nodes, their addresses, and the messages for addresses without a node.

    hosts: name of the node that hosts each address.
    waiting: numbers of the messages for an address that no connected node hosts, in order.
    refused: rejected messages that were not consumed: a new session of their recipient needs them.
    interrupted: number of sessions that ended while they handled a message, by its number.
    checkpoint: number of the newest checkpoint.
    over: why the run has ended; empty until then.
    identity: distinguishes runs with the same id; empty for runs of old ledgers.
    continued: number of the message that reopened the run, or None.
    owner: of the aggregator's place; "" in a ledger of 0.1.0 until the aggregator joins.
    carried: bytes (to, from) its nodes that earlier brokers have counted, up to a checkpoint.
    recovered: whether this state comes from a ledger: the bytes since that checkpoint are lost.
    """

    id: str
    config: str
    total_clients: int
    nodes: dict[str, Node] = field(default_factory=dict)
    hosts: AddressMap = field(default_factory=AddressMap)
    waiting: dict[str, list[int]] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    interrupted: dict[int, int] = field(default_factory=dict)
    checkpoint: int | None = None
    over: str = ""
    identity: str = ""
    continued: int | None = None
    owner: str = ""
    carried: tuple[int, int] = (0, 0)
    recovered: bool = False
    message_bytes: Counter[str] = field(default_factory=Counter)
    """Bytes of accepted messages by sender; and of all, by ""."""

    def count_message(self, sender: str, nbytes: int) -> None:
        """Count the bytes of an accepted message: entries are kept for ever."""
        self.message_bytes[sender] += nbytes
        self.message_bytes[""] += nbytes

    def traffic(self) -> tuple[int, int]:
        """Return the bytes (to, from) all nodes other than the aggregator."""
        nodes = [each for each in self.nodes.values() if each.hello.role != AGGREGATOR]
        down, up = self.carried
        return (
            down + sum(each.sent_bytes + each.read_bytes for each in nodes),
            up + sum(each.received_bytes for each in nodes),
        )

    def node_counts(self) -> dict[str, dict[str, int]]:
        """Return the sessions and bytes of each node, by name, for the entry of the run's end."""
        counts = {
            name: {
                "sessions": each.sessions,
                "sent_bytes": each.sent_bytes + each.read_bytes,
                "received_bytes": each.received_bytes,
            }
            for name, each in self.nodes.items()
        }
        # The size of an entry is limited: the last of very many nodes are counted together.
        names = list(counts)
        for name in names[ENDED_NODES:]:
            each = counts.pop(name)
            others = counts.setdefault("", dict.fromkeys(each, 0))
            counts[""] = {key: others[key] + each[key] for key in each}
        if self.recovered:
            before = counts.setdefault("", {"sessions": 0, "sent_bytes": 0, "received_bytes": 0})
            before["sent_bytes"] += self.carried[0]
            before["received_bytes"] += self.carried[1]
            before["recovered"] = 1
        return counts

    def host_of(self, address: str) -> Node | None:
        """Return the connected node that hosts an address, or None."""
        node = self.nodes.get(self.hosts.get(address) or "")
        return node if node is not None and node.alive else None

    def validate_state(self) -> list[int]:
        """Check the run, and return the numbers of its unfinished messages, but for its timers.

        Raises:
            AssertionError: its parts contradict each other; the message says what is wrong.
        """
        if self.over:
            rest = [
                each.name for each in self.nodes.values() if each.pending or each.pending_frames
            ]
            if rest or self.waiting or self.refused or self.interrupted:
                raise AssertionError(f"run {self.id} has ended, but has unfinished messages {rest}")
            return []
        places = [] if self.checkpoint is None else [self.checkpoint]
        present: set[str] = set()
        hosted = 0
        for node in self.nodes.values():
            node.validate_state()
            if node.alive:
                present.add(node.name)
                hosted += num_addresses(node.hello)
            if node.pending:
                places += node.pending
                for address in set(node.pending.values()):
                    if self.hosts.get(address) != node.name:
                        raise AssertionError(f"{node.name} has messages to {address}: not its own")
        if gone := present.symmetric_difference(self.hosts.nodes()):
            raise AssertionError(f"addresses of {gone} are hosted, but it has left, or the reverse")
        if len(self.hosts) != hosted:
            raise AssertionError(f"{hosted} addresses of nodes, but {len(self.hosts)} are hosted")
        for address, seqs in self.waiting.items():
            places += seqs
            if address in self.hosts:
                raise AssertionError(f"{seqs[:5]} wait for {address}, which is hosted")
            if sorted(set(seqs)) != seqs:
                raise AssertionError(f"messages to {address} are out of order: {seqs}")
        if self.interrupted and (unknown := self.interrupted.keys() - places - self.refused):
            raise AssertionError(f"messages {unknown} ended sessions, but are finished")
        return places
