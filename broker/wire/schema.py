"""The wire format: ``[header][buffer...]``, versioned, bounded, never trusted.

The header is a msgpack map of at most 64 KiB, always parsed; buffers are raw bytes and are never
copied into msgpack. The structs below are the schema. Rules for changing it: a new field has a
default; unknown fields are ignored here but kept in relayed messages, which travel as the bytes
that their sender wrote; a field never changes its meaning; anything else is a new major version.

Several frames may travel as one ZeroMQ message: its header is then a list of [header, number of
buffers], followed by the buffers of all frames. This saves most of the cost of small frames.

A *frame* goes from one end of a link to the other (hello, post, want, chunk, ...). A *message* goes
from one node to another; ``post`` and ``deliver`` frames carry it, and the ledger records it.
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
"""Largest message; smaller than a header, which carries it with other fields."""
MAX_BUFFERS = 64
MAX_ALL = 256
"""Most messages in a `PostAll` or `DeliverAll`."""
MIN_MESSAGE_BYTES = 32
"""No message is shorter: a small `PostAll` cannot cause very many rejections."""
MAX_NUMBERS = 1024
"""Most ledger numbers that one frame lists; a link lists at most half as many."""
MAX_NAMED = 20
"""Most runs that the answer to a node without a run lists."""
MAX_DEPTH = 32
"""Deepest nesting of a message's body, so that its readers do not exhaust the stack."""
CHUNK_BYTES = 1024 * 1024
"""Size of the chunks in which a blob crosses a link."""
INLINE_BYTES = 256 * 1024
"""Most bytes of a message's blobs that travel with its delivery."""
POST_BYTES = CHUNK_BYTES
"""Most bytes of a message's blobs that travel with its post; others are requested in chunks."""
MAX_BLOB_BYTES = 1 << 40

Buffer = bytes | memoryview

Name = Annotated[str, Meta(min_length=1, max_length=120)]
Id = Annotated[str, Meta(min_length=1, max_length=200)]
Address = Annotated[str, Meta(min_length=1, max_length=130)]
Reason = Annotated[str, Meta(max_length=2000)]
Identity = Annotated[str, Meta(max_length=64, pattern=r"\A[0-9a-z]*\Z")]
"""Identity of a run; nodes name folders by it."""
CodeName = Annotated[str, Meta(max_length=MAX_CODE)]
"""Code of a rejection, for programs: see `rejections.Code`."""
PublicKey = Annotated[str, Meta(min_length=40, max_length=40)]
"""A CURVE public key: 32 bytes in Z85."""
Natural = Annotated[int, Meta(ge=0, le=1 << 62)]
Size = Annotated[int, Meta(ge=0, le=MAX_BLOB_BYTES)]
Digest = Annotated[bytes, Meta(min_length=16, max_length=16)]
Numbers = Annotated[tuple[Natural, ...], Meta(max_length=MAX_NUMBERS)]
Range = tuple[Natural, Natural]
Extent = tuple[Natural, Natural, Annotated[int, Meta(ge=1, le=CHUNK_BYTES)]]
"""Bytes in a ledger: (number of the payload segment, offset, size)."""
MAX_EXTENTS = 640
"""Most extents in one delivery; a header has room for them and the largest message."""


class Blob(Struct, frozen=True):
    """Content-addressed bytes: an XXH3-128 digest and a size in bytes."""

    digest: Digest
    size: Size

    @classmethod
    def of(cls, data: Buffer) -> Blob:
        """Return the name of a buffer's bytes."""
        return cls(digest(data), memoryview(data).nbytes)


class Message(Struct, frozen=True, kw_only=True):
    """A message from one node to another, as the ledger records it.

    The broker reads the addresses and the list of blobs; only nodes read ``body``.
    """

    kind: Name
    id: Id
    run: Name
    sender: Name
    to: Address
    """``client/17``, ``aggregator``, ``evaluator``, ``node/NAME``; ``record`` (recorded, not
    delivered), ``checkpoint`` (kept for the sender's next session), ``timer`` (returns to the
    aggregator as a ``tick`` when it is due)."""
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
    """Protocol version of the sender, [major, minor]."""


class NumberedFrame(Frame, frozen=True, kw_only=True):
    """A frame that must not be lost. ``n`` counts them in a session, from 0.

    The broker applies them in order and once, and acknowledges them; after a reconnect, the node
    sends the unacknowledged ones again.
    """

    n: Natural = 0
    taken: Natural = 0
    """The node has taken every delivery numbered below this: credit for more."""
    read: Natural = 0
    """Bytes of blobs that this session has read from the ledger's files instead of the link."""


class Hello(Frame, frozen=True, kw_only=True):
    """A node introduces itself; sent at its start and after a reconnect."""

    node: Name
    role: Name
    session: Name
    """Drawn at each start of a node, to distinguish a restart from a reconnect."""
    key: Annotated[str, Meta(max_length=64)] = ""
    """Key of the starter of the node: a newer session with the same key takes over at once."""
    first: Natural = 0
    """Number of the oldest unacknowledged frame of this session."""
    got: Natural = 0
    """Every delivery numbered below this has arrived in this session."""
    run: Annotated[str, Meta(max_length=120)] = ""
    """Id of the run; empty for the only run of the broker."""
    clients: tuple[Range, ...] = ()
    """Ranges of the hosted clients, both ends included."""
    config: str = ""
    """From the aggregator: the run's configuration, sent to every node in Welcome."""
    total_clients: Natural = 0
    """From the aggregator: number of clients of the run."""
    reports_availability: bool | UnsetType = UNSET
    """Whether its clients are away until it reports that they are back. Not sent before 1.3."""


class Reject(Frame, frozen=True, kw_only=True):
    """The broker does not admit a node: ``code`` for programs, ``reason`` for people."""

    code: Name
    reason: Reason
    protocol: tuple[int, int] = PROTOCOL
    config: str | UnsetType = UNSET
    """The run's configuration, if the aggregator's differs. Not sent before 1.3."""


class UnknownSession(Frame, frozen=True, kw_only=True, tag="stranger"):
    """The broker does not know this connection, or lacks frames of it: send Hello."""

    dropped: bool | UnsetType = UNSET
    """Whether it has dropped frames, because too many wait. Not sent before 1.3."""


class Serving(Struct, frozen=True):
    """The runs of a broker: the names of some, the newest first, and the number of others."""

    runs: Annotated[tuple[Name, ...], Meta(max_length=MAX_NAMED)] = ()
    others: Natural = 0
    ended: Annotated[tuple[Name, ...], Meta(max_length=MAX_NAMED)] = ()
    """Names of runs that have ended."""
    others_ended: Natural = 0


class Wait(Frame, frozen=True, kw_only=True):
    """The broker has no such run yet: keep the connection, and send Hello again when asked."""

    reason: Reason = ""
    serving: Serving | UnsetType = UNSET
    """The runs that it has. Not sent before 1.3."""
    crowded: bool | UnsetType = UNSET
    """Whether too many nodes wait for a run, see `reason`. Not sent before 1.3."""


class Post(NumberedFrame, frozen=True, kw_only=True):
    """A message for the ledger and its recipient.

    ``inline``: indices of the blobs that the buffers hold.
    """

    message: bytes
    inline: tuple[Natural, ...] = ()
    consumes: Numbers = ()
    """Ledger numbers of the messages that the sender has handled once this one is accepted."""


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
    """Every numbered frame up to ``upto`` has been applied.

    A post is then in the ledger: the message, or its rejection.
    """

    upto: Natural


class StorageFull(Frame, frozen=True, kw_only=True, tag="full"):
    """The broker cannot write its ledger now: keep unacknowledged frames, and send Hello again.

    It has ignored the frame that it answers.
    """

    reason: Reason


class Deliver(Frame, frozen=True, kw_only=True):
    """A message from the ledger, with its number and its time of acceptance."""

    seq: Natural
    at: float
    message: bytes
    inline: tuple[Natural, ...] = ()
    after: Natural = 0
    """This session has no other unfinished message from here to ``seq``, so gaps are noticed."""
    extents: dict[Natural, tuple[Extent, ...]] = field(name="places", default_factory=dict)
    """Extents in the ledger of the blobs that are not inline, by index."""


class DeliverAll(Frame, frozen=True, kw_only=True):
    """Several messages without blobs from the ledger, in order; sent by 0.1.0 only."""

    at: float
    messages: Annotated[tuple[tuple[Natural, bytes], ...], Meta(min_length=1, max_length=MAX_ALL)]
    """(number, message) of each."""
    after: Natural = 0
    """As in `Deliver`, for the first message."""

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
    """Longest time between two frames of the node, in seconds."""
    lease_s: float
    """Silence, in seconds, after which a node has left."""
    config: str = ""
    checkpoint: Deliver | None = None
    """For a new session of the aggregator: the newest checkpoint of the one before."""
    ledger: str = ""
    """The ledger's folder, whose files a node on the same host may read; empty if not shared."""
    proof: Annotated[str, Meta(max_length=64)] = ""
    """Content of a file in the ledger's folder: proves that the folder is the broker's."""
    identity: Identity = ""
    """Drawn when the run was opened, to distinguish runs with the same id; empty for runs opened
    before 1.3."""
    continued: Natural | UnsetType = UNSET
    """For the aggregator: number of the message that reopened the run. The end in an older
    checkpoint no longer holds. Not sent before 1.3."""


class Done(NumberedFrame, frozen=True, kw_only=True):
    """The recipient has handled ``seqs``: no session of it needs them again.

    ``refused``: reasons of the rejected ones, by number; one that is not in ``seqs`` as well
    is delivered again to a new session.
    """

    seqs: Numbers = ()
    refused: Annotated[dict[Natural, Reason], Meta(max_length=MAX_NUMBERS)] = {}
    codes: Annotated[dict[Natural, CodeName], Meta(max_length=MAX_NUMBERS)] | UnsetType = UNSET
    """Codes of the reasons, by number. Not sent by 0.1.0."""

    @classmethod
    def rejecting(cls, seq: int, reason: str, code: str, seqs: Iterable[int] = ()) -> Done:
        """Return the frame that rejects one delivery."""
        return cls(seqs=tuple(seqs), refused={seq: reason}, codes={seq: code} if code else UNSET)

    def code_of(self, seq: int) -> str:
        """Return the code of a rejected delivery, or ""."""
        return self.codes.get(seq, "") if self.codes else ""


class ChunkRequest(Frame, frozen=True, kw_only=True, tag="want"):
    """Request ``size`` bytes of a blob from ``start`` on. ``owner``: the node that named it."""

    owner: Name
    digest: Digest
    start: Size
    size: Annotated[int, Meta(ge=1, le=CHUNK_BYTES)]


class Chunk(Frame, frozen=True, kw_only=True):
    """A chunk of a blob, with its bytes as the one buffer; no buffer if the sender lacks it."""

    owner: Name
    digest: Digest
    start: Size


class Heartbeat(Frame, frozen=True, kw_only=True, tag="beat"):
    """A sign of life; the broker answers with one."""

    taken: Natural = 0
    """From a node: as in `NumberedFrame`."""
    sent: Natural = 0
    """From the broker: every delivery numbered below this has been sent."""
    ack: bool | UnsetType = UNSET
    """From a node: acknowledge what came before this at once. Not sent before 1.3."""


class RunEnded(NumberedFrame, frozen=True, kw_only=True, tag="over"):
    """The run has ended; sent by the aggregator to the broker, and by the broker to every node."""

    reason: Reason = ""


class Goodbye(Frame, frozen=True, kw_only=True, tag="bye"):
    """A node leaves; ``failed``: because of an error."""

    reason: Reason = ""
    failed: bool = False


class Enroll(Frame, frozen=True, kw_only=True):
    """The holder of an invite hands in a public key of its own. Not sent before 1.3."""

    key: PublicKey


class Enrolled(Frame, frozen=True, kw_only=True):
    """The broker has stored the key, with the rights of the invite. Not sent before 1.3."""

    key: PublicKey


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
    | Enroll
    | Enrolled
)


def kind_of(value: Frame | type[Frame]) -> str:
    """Return the kind of a frame or of a class of frames, as spelled on the wire."""
    return str(value.__struct_config__.tag)


def digest(data: Buffer) -> bytes:
    """Return the XXH3-128 digest of the bytes, 16 bytes, big endian."""
    return xxhash.xxh3_128_digest(data)


EMPTY = digest(b"")
"""The digest of no bytes."""
