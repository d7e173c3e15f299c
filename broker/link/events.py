"""What the Link core takes and gives: events and actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


class Delivery(Struct, frozen=True):
    """A message from the ledger: its number and time there, and the blobs that came along.

    ``places``: where in the ledger's files the others lie, as far as the broker says so.
    """

    seq: int
    at: float
    message: Message
    inline: Mapping[int, Buffer] = {}
    extents: Mapping[int, Sequence[Extent]] = {}


# ---- events


class FrameReceived(Struct, frozen=True):
    """A frame from the broker."""

    frame: AnyFrame
    buffers: Sequence[Buffer] = ()


class Outgoing(Struct, frozen=True):
    """The node posts a message; ``data[i]`` are the bytes of its i-th blob."""

    message: Message
    data: Sequence[Buffer] = ()
    consumes: tuple[int, ...] = ()


class Fetch(Struct, frozen=True):
    """The node wants the bytes of a blob: all at once, or ``in_pieces``, as they come."""

    owner: str
    blob: Blob
    in_pieces: bool = False


class More(Struct, frozen=True):
    """The node is done with a piece of a blob: the next may be asked for."""


class Leave(Struct, frozen=True):
    """The node does not want the rest of a blob that it fetched in pieces."""

    owner: str
    blob: Blob


class Publish(Struct, frozen=True):
    """The node says something that is no message: Done, Over or Goodbye."""

    frame: Done | RunEnded | Goodbye


class Taken(Struct, frozen=True):
    """The node has taken these deliveries out of its inbox, in order."""

    deliveries: Sequence[Delivery]


class ReadInPlace(Struct, frozen=True):
    """The node has read so many bytes from the ledger's files."""

    nbytes: int


class Wake(Struct, frozen=True):
    """A deadline has passed."""


Event = FrameReceived | Outgoing | Fetch | More | Leave | Publish | Taken | ReadInPlace | Wake


# ---- actions


class Send(Struct, frozen=True):
    """Send a frame to the broker."""

    frame: Frame
    buffers: Sequence[Buffer] = ()


class Admitted(Struct, frozen=True):
    """The broker has welcomed this node for the first time."""

    welcome: Welcome


class Deliveries(Struct, frozen=True):
    """Messages for the node, in order."""

    deliveries: Sequence[Delivery]


class Fetched(Struct, frozen=True):
    """A blob is here; ``data`` is None if nobody holds it, or its bytes were wrong."""

    owner: str
    blob: Blob
    data: Buffer | None


class ChunkStreamed(Struct, frozen=True):
    """A piece of a blob that was asked for in pieces; whether they are right comes last."""

    data: Buffer


class Blocked(Struct, frozen=True):
    """The broker cannot keep anything now, with the reason; what was posted is kept here."""

    reason: str


class OutOfTouch(Struct, frozen=True):
    """The node is not connected to its run: a person should know it now.

    seconds: for how long. answer: what the broker says meanwhile; None if it is silent.
    admitted: the node was connected before.
    """

    seconds: float
    answer: Wait | StorageFull | None
    admitted: bool


class BackInTouch(Struct, frozen=True):
    """The node is connected to its run again; it says after how many seconds."""

    seconds: float


class LinkEnded(Struct, frozen=True):
    """The link is at its end.

    over: because the run is. rejected: the broker did not admit the node; code, config: see
    `Rejected`. out_of_touch: the node gave up, after this.
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
    | Deliveries
    | Fetched
    | ChunkStreamed
    | Blocked
    | OutOfTouch
    | BackInTouch
    | LinkEnded
)


def another_run(run: str) -> tuple[Send, LinkEnded]:
    """Return how a link ends whose broker has started another run under the same id.

    What the node knows, and what it has sent, belong to the run before.
    """
    reason = (
        f"the broker has another run {run!r} now than the one that this node took part in: "
        "start the node again to join it"
    )
    return Send(Goodbye(reason="this is another run")), LinkEnded(reason, rejected=True)
