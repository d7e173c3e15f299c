"""The events and actions of the Link core."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from msgspec import Struct

from fedmq.broker.wire.schema import (
    AnyFrame,
    Blob,
    Buffer,
    Done,
    Extent,
    Frame,
    Goodbye,
    Message,
    RunEnded,
    StorageFull,
    Wait,
    Welcome,
)


class BlobSource(Protocol):
    """Reads the blobs of deliveries, such as a node's connection or a trace."""

    def read(self, delivery: Delivery, index: int) -> Buffer:
        """Return the bytes of a delivery's blob."""
        ...

    def chunks(self, delivery: Delivery, index: int) -> Iterator[Buffer]:
        """Yield the bytes of a delivery's blob in order."""
        ...


class Delivery(Struct, frozen=True):
    """A message from the ledger: an action of the Link core, and an event of the nodes' cores.

    Blobs are content-addressed, so reading one is a pure function.

    seq, at: its number in the ledger, and the time at which the broker accepted it.
    inline: bytes of the blobs that came with it, by index.
    extents: places of other blobs in the ledger's files, by index, if the broker shares them.
    source: reads the blobs that are not inline; None while the delivery is in the Link core.
    """

    seq: int
    at: float
    message: Message
    inline: Mapping[int, Buffer] = {}
    extents: Mapping[int, Sequence[Extent]] = {}
    source: BlobSource | None = None

    def read(self, index: int) -> Buffer:
        """Return the bytes of a blob.

        Raises:
            WireError: nobody has the blob any more.
            LinkClosed: the link ended meanwhile.
            LedgerError: the blob is damaged or missing in a trace.
        """
        if index in self.inline:
            return self.inline[index]
        return self._source().read(self, index)

    def chunks(self, index: int) -> Iterator[Buffer]:
        """Yield the bytes of a blob in order; read it to its end before you read another blob.

        Raises:
            WireError: nobody has the blob any more; or, after the last chunk, its digest does
                not match.
            LinkClosed: the link ended meanwhile.
            LedgerError: the blob is damaged or missing in a trace.
        """
        if index in self.inline:
            return iter((self.inline[index],))
        return self._source().chunks(self, index)

    def _source(self) -> BlobSource:
        if self.source is None:
            raise LookupError(f"message {self.seq} has neither all of its blobs nor a source")
        return self.source


# ---- events


class FrameReceived(Struct, frozen=True):
    """A frame from the broker."""

    frame: AnyFrame
    buffers: Sequence[Buffer] = ()


class PostMessage(Struct, frozen=True):
    """Post a message: an event of the link, and an action of the nodes' cores.

    data: bytes of each of its blobs.
    consumes: numbers of the messages that are handled once this one is in the ledger.
    """

    message: Message
    data: Sequence[Buffer] = ()
    consumes: tuple[int, ...] = ()


class Fetch(Struct, frozen=True):
    """The node requests the bytes of a blob: whole, or ``in_pieces`` as they arrive."""

    owner: str
    blob: Blob
    in_pieces: bool = False


class More(Struct, frozen=True):
    """The node has read a streamed chunk: credit for another."""


class Leave(Struct, frozen=True):
    """The node stops reading a streamed blob."""

    owner: str
    blob: Blob


class Publish(Struct, frozen=True):
    """The node sends a frame that is not a message: Done, RunEnded or Goodbye."""

    frame: Done | RunEnded | Goodbye


class Taken(Struct, frozen=True):
    """The node has taken these deliveries out of its inbox, in order."""

    deliveries: Sequence[Delivery]


class ReadInPlace(Struct, frozen=True):
    """The node has read bytes of blobs from the ledger's files."""

    nbytes: int


class Wake(Struct, frozen=True):
    """A deadline has passed."""


Event = FrameReceived | PostMessage | Fetch | More | Leave | Publish | Taken | ReadInPlace | Wake


# ---- actions


class Send(Struct, frozen=True):
    """Send a frame to the broker."""

    frame: Frame
    buffers: Sequence[Buffer] = ()


class Admitted(Struct, frozen=True):
    """The broker has welcomed this node for the first time."""

    welcome: Welcome


class Fetched(Struct, frozen=True):
    """A blob is complete; ``data`` is None if nobody has it, or its digest does not match."""

    owner: str
    blob: Blob
    data: Buffer | None


class ChunkStreamed(Struct, frozen=True):
    """A chunk of a streamed blob; `Fetched` follows once the digest has been checked."""

    data: Buffer


class Blocked(Struct, frozen=True):
    """The broker cannot write its ledger now; the link keeps what was posted."""

    reason: str


class OutOfTouch(Struct, frozen=True):
    """Report that the node is not connected to its run.

    seconds: since when. answer: the broker's answer; None if it is silent. admitted: whether the
        node was connected before.
    """

    seconds: float
    answer: Wait | StorageFull | None
    admitted: bool


class BackInTouch(Struct, frozen=True):
    """Report that the node is connected to its run again, after this many seconds."""

    seconds: float


class LinkEnded(Struct, frozen=True):
    """The link has ended.

    over: because the run has ended. rejected: because the broker did not admit the node; code,
        config: see `Rejected`. out_of_touch: because the node gave up; its last report.
    """

    reason: str
    rejected: bool = False
    over: bool = False
    code: str = ""
    config: str = ""
    out_of_touch: OutOfTouch | None = None


Action = (
    Send
    | Admitted
    | Delivery
    | Fetched
    | ChunkStreamed
    | Blocked
    | OutOfTouch
    | BackInTouch
    | LinkEnded
)


def another_run(run: str) -> tuple[Send, LinkEnded]:
    """Return the actions that end a link whose broker has started another run with the same id.

    The node's state and its posts belong to the earlier run.
    """
    reason = (
        f"the broker has started another run {run!r} since this node joined: start the node "
        "again to join it"
    )
    return Send(Goodbye(reason="this is another run")), LinkEnded(reason, rejected=True)
