"""The wire format: ``[header][buffer...]``, versioned, bounded, never trusted.

The header is a msgpack map of at most 64 KiB, always parsed; buffers are raw bytes and
are never copied into msgpack. The structs below are the schema. Its rules of evolution:
a new field has a default; unknown fields are ignored here and kept on the way, because a
relayed message travels as the bytes that its sender wrote; a field never changes its
meaning; what cannot follow these rules is a new major version.

Several frames may travel as one ZeroMQ message: its header is then a list of [header,
number of buffers], and the buffers of all of them follow. A small message costs a socket
far more than its bytes do.

Two layers. A *frame* is what one end of a link says to the other (hello, post, want,
chunk, ...). A *message* is what one node says to another; it is carried in a ``post`` and
a ``deliver`` frame, and is what the ledger keeps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import xxhash
from msgspec import UNSET, Meta, Struct, UnsetType, field

from fedmq.broker.rejections import MAX_CODE

PROTOCOL = (1, 3)
"""Protocol version, [major, minor]; both ends of a link must have the same major."""

MAX_HEADER_BYTES = 64 * 1024
MAX_MESSAGE_BYTES = 48 * 1024
"""Of a message; less than a header, which carries it and more."""
MAX_BUFFERS = 64
MAX_ALL = 256
"""Messages in a `PostAll` or `DeliverAll`."""
MIN_MESSAGE_BYTES = 32
"""No message is shorter: a small `PostAll` cannot cause very many rejections."""
MAX_NAMED = 20
"""Most runs that are named to a node which asks for one that is not there."""
MAX_DEPTH = 32
"""Of a message's body: whoever reads it, or prints it, must not run out of stack."""
CHUNK_BYTES = 1024 * 1024
"""A blob crosses a link in pieces of this size."""
INLINE_BYTES = 256 * 1024
"""Blobs up to this size, all of a message's together, travel beside its delivery;"""
POST_BYTES = CHUNK_BYTES
"""and up to this size beside its post: larger ones are asked for, in chunks as large."""
MAX_BLOB_BYTES = 1 << 40

Buffer = bytes | memoryview

Name = Annotated[str, Meta(min_length=1, max_length=120)]
Id = Annotated[str, Meta(min_length=1, max_length=200)]
Reason = Annotated[str, Meta(max_length=2000)]
Identity = Annotated[str, Meta(max_length=64, pattern=r"\A[0-9a-z]*\Z")]
"""Of a run; nodes name folders by it."""
CodeName = Annotated[str, Meta(max_length=MAX_CODE)]
"""Of a rejection, for programs: see `rejections.Code`."""
Natural = Annotated[int, Meta(ge=0, le=1 << 62)]
Size = Annotated[int, Meta(ge=0, le=MAX_BLOB_BYTES)]
Digest = Annotated[bytes, Meta(min_length=16, max_length=16)]
Range = tuple[Natural, Natural]
Extent = tuple[Natural, Natural, Annotated[int, Meta(ge=1, le=CHUNK_BYTES)]]
"""Where bytes lie in a ledger: number of the payload segment, offset there, how many."""
MAX_EXTENTS = 640
"""In one delivery: they leave room in its header for any message."""


class Blob(Struct, frozen=True):
    """Content-addressed bytes: an XXH3-128 digest and a size in bytes."""

    digest: Digest
    size: Size

    @classmethod
    def of(cls, data: Buffer) -> Blob:
        """Return the name of these bytes."""
        return cls(digest(data), memoryview(data).nbytes)


class Message(Struct, frozen=True, kw_only=True):
    """What one node says to another, and what the ledger keeps.

    The broker reads the addresses and the list of blobs; ``body`` is for the nodes.
    """

    kind: Name
    id: Id
    run: Name
    sender: Name
    to: Annotated[str, Meta(min_length=1, max_length=130)]
    """``client/17``, ``aggregator``, ``evaluator``, ``node/NAME``; ``record`` (kept, not
    delivered), ``checkpoint`` (kept for the sender's next session), ``timer`` (comes back
    to the aggregator as a ``tick`` when it is due)."""
    re: Id | None = None
    """Id of the message that this one answers."""
    body: dict[str, Any] = {}
    blobs: tuple[Blob, ...] = ()


class Frame(Struct, frozen=True, kw_only=True, tag_field="kind", tag=str.lower):
    """Root of all frames.

    The field ``kind`` on the wire is the class's name in lower case, or its ``tag`` where the
    class was renamed after messages had been recorded.
    """

    v: tuple[int, int] = PROTOCOL
    """Protocol version of who wrote the frame, [major, minor]."""


class NumberedFrame(Frame, frozen=True, kw_only=True):
    """Frames that must not be lost. ``n`` counts them in a session, from 0.

    They are taken in order and once, receipted, and sent again after a reconnect.
    """

    n: Natural = 0
    taken: Natural = 0
    """Every delivery numbered below this has been taken by the node: credit for more."""
    read: Natural = 0
    """Bytes that this session has read from the ledger's files, in place of being sent them."""


class Hello(Frame, frozen=True, kw_only=True):
    """A node names itself, and what it hosts; sent at the start and after a reconnect."""

    node: Name
    role: Name
    session: Name
    """Drawn anew at each start of a node: a restart is told from a reconnect."""
    key: Annotated[str, Meta(max_length=64)] = ""
    """Of who starts the node: a newer session with the same key takes over at once."""
    first: Natural = 0
    """Number of the oldest frame that this session has no receipt for."""
    got: Natural = 0
    """Every delivery numbered below this has arrived in this session."""
    run: Annotated[str, Meta(max_length=120)] = ""
    """Empty: the one run that the broker serves."""
    clients: tuple[Range, ...] = ()
    """Ranges of clients hosted here, both ends included."""
    config: str = ""
    """From the aggregator: the run's configuration, handed to every node in Welcome."""
    total_clients: Natural = 0
    """From the aggregator: number of clients of the run."""


class Reject(Frame, frozen=True, kw_only=True):
    """The broker does not admit a node: ``code`` for programs, ``reason`` for people."""

    code: Name
    reason: Reason
    protocol: tuple[int, int] = PROTOCOL
    config: str | UnsetType = UNSET
    """Of the run, for an aggregator that came with another one. Not sent before 1.3."""


class UnknownSession(Frame, frozen=True, kw_only=True, tag="stranger"):
    """The broker does not know this connection (any more): say Hello."""


class Serving(Struct, frozen=True):
    """The runs that a broker has: some by name, the newest first, and how many others."""

    runs: Annotated[tuple[Name, ...], Meta(max_length=MAX_NAMED)] = ()
    others: Natural = 0
    ended: Annotated[tuple[Name, ...], Meta(max_length=MAX_NAMED)] = ()
    """Runs that have ended."""
    others_ended: Natural = 0


class Wait(Frame, frozen=True, kw_only=True):
    """The broker has no such run yet: keep the connection and say Hello again when told."""

    reason: Reason = ""
    serving: Serving | UnsetType = UNSET
    """What it has instead, if anything; not sent before 1.3."""


class Post(NumberedFrame, frozen=True, kw_only=True):
    """A message for the ledger and its recipient. ``inline``: which blobs stand beside it."""

    message: bytes
    inline: tuple[Natural, ...] = ()
    consumes: tuple[Natural, ...] = ()
    """Ledger numbers of the messages that are done with once this one is kept."""


class PostAll(NumberedFrame, frozen=True, kw_only=True):
    """Several messages without blobs, in order, under one number; sent by 0.1.0 only."""

    messages: Annotated[
        tuple[Annotated[bytes, Meta(min_length=MIN_MESSAGE_BYTES)], ...],
        Meta(min_length=1, max_length=MAX_ALL),
    ]

    def each(self) -> list[Post]:
        """Return the same as single posts, all with the number of this frame."""
        return [
            Post(n=self.n, taken=self.taken, read=self.read, message=data) for data in self.messages
        ]


class Ack(Frame, frozen=True, kw_only=True, tag="receipt"):
    """Every numbered frame up to ``upto`` has taken effect: a post is in the ledger.

    (Or was refused, and that was said.)
    """

    upto: Natural


class StorageFull(Frame, frozen=True, kw_only=True, tag="full"):
    """The broker cannot keep anything now, for the reason given: hold on, and say Hello again.

    Nothing that was sent since the last Ack is lost to its sender, nor taken.
    """

    reason: Reason


class Deliver(Frame, frozen=True, kw_only=True):
    """A message from the ledger, its number and its time there."""

    seq: Natural
    at: float
    message: bytes
    inline: tuple[Natural, ...] = ()
    after: Natural = 0
    """This session has no other unfinished message from here to ``seq``: a gap is noticed."""
    extents: dict[Natural, tuple[Extent, ...]] = field(name="places", default_factory=dict)
    """Where blobs that are not inline lie in the ledger, in pieces, by their index."""


class DeliverAll(Frame, frozen=True, kw_only=True):
    """Several messages without blobs from the ledger, in order; sent by 0.1.0 only."""

    at: float
    messages: Annotated[tuple[tuple[Natural, bytes], ...], Meta(min_length=1, max_length=MAX_ALL)]
    """Each with its number."""
    after: Natural = 0
    """As in `Deliver`, of the first."""

    def each(self) -> list[Deliver]:
        """Return the same as single deliveries."""
        afters = [self.after, *(seq + 1 for seq, _ in self.messages)]
        return [
            Deliver(seq=seq, at=self.at, message=data, after=after)
            for (seq, data), after in zip(self.messages, afters, strict=False)
        ]


class Welcome(Frame, frozen=True, kw_only=True):
    """The broker admits a node."""

    run: Name
    beat_s: float
    """Say something at least this often."""
    lease_s: float
    """Silent for longer, a node is taken to have left."""
    config: str = ""
    checkpoint: Deliver | None = None
    """For a new session of the aggregator: the newest checkpoint of the one before."""
    ledger: str = ""
    """The folder of the ledger, whose files a node on the same host may read itself."""
    proof: Annotated[str, Meta(max_length=64)] = ""
    """What stands in a file there: a folder of that name may be another host's."""
    identity: Identity = ""
    """Drawn when the run was opened: another run under the same id has another one. Empty: the
    run was opened before 1.3."""
    continued: Natural | UnsetType = UNSET
    """For the aggregator: number of the message by which the run goes further than it was to; an
    end in a checkpoint before that one holds no longer. Not sent before 1.3."""


class Done(NumberedFrame, frozen=True, kw_only=True):
    """The recipient is done with ``seqs`` and will not need them again, in any session.

    ``refused``: why some could not be used, by number; one that is not in ``seqs`` as well
    is delivered again to a new session.
    """

    seqs: tuple[Natural, ...] = ()
    refused: dict[Natural, Reason] = {}
    codes: dict[Natural, CodeName] | UnsetType = UNSET
    """Codes of the reasons, by number; not sent by nodes older than 0.2."""

    @classmethod
    def rejecting(cls, seq: int, reason: str, code: str, seqs: Iterable[int] = ()) -> Done:
        """Return the frame that rejects one delivery."""
        return cls(seqs=tuple(seqs), refused={seq: reason}, codes={seq: code} if code else UNSET)

    def code_of(self, seq: int) -> str:
        """Return the code of a reason, or ""."""
        return self.codes.get(seq, "") if self.codes else ""


class ChunkRequest(Frame, frozen=True, kw_only=True, tag="want"):
    """Send me ``size`` bytes of a blob, from ``start``. ``owner``: the node that named it."""

    owner: Name
    digest: Digest
    start: Size
    size: Annotated[int, Meta(ge=1, le=CHUNK_BYTES)]


class Chunk(Frame, frozen=True, kw_only=True):
    """A piece of a blob; the bytes are the one buffer. No buffer: the blob is not held here."""

    owner: Name
    digest: Digest
    start: Size


class Heartbeat(Frame, frozen=True, kw_only=True, tag="beat"):
    """Nothing to say, but alive; the broker answers in kind."""

    taken: Natural = 0
    """From a node: as in numbered frames."""
    sent: Natural = 0
    """From the broker: every delivery numbered below this has been sent."""


class RunEnded(NumberedFrame, frozen=True, kw_only=True, tag="over"):
    """The run has ended. From the aggregator to the broker, and from there to every node."""

    reason: Reason = ""


class Goodbye(Frame, frozen=True, kw_only=True, tag="bye"):
    """This node leaves; ``failed``: not on purpose, but for an error."""

    reason: Reason = ""
    failed: bool = False


AnyFrame = (
    Hello
    | Welcome
    | Reject
    | UnknownSession
    | Wait
    | Post
    | PostAll
    | Ack
    | StorageFull
    | Deliver
    | DeliverAll
    | Done
    | ChunkRequest
    | Chunk
    | Heartbeat
    | RunEnded
    | Goodbye
)


def kind_of(value: Frame | type[Frame]) -> str:
    """Return the kind of a frame, or of a class of frames, as it stands on the wire."""
    return str(value.__struct_config__.tag)


def digest(data: Buffer) -> bytes:
    """Return the XXH3-128 digest of the bytes, 16 bytes, big endian."""
    return xxhash.xxh3_128_digest(data)


EMPTY = digest(b"")
"""The digest of no bytes."""
