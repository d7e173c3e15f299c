"""What the Link core takes and gives: events and actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmq.broker.wire import AnyFrame, Blob, Buffer, Bye, Done, Frame, Message, Over, Welcome


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message from the ledger: its number and time there, and the blobs that came along."""

    seq: int
    at: float
    message: Message
    inline: Mapping[int, Buffer]


# ---- events


@dataclass(frozen=True, slots=True)
class Received:
    """A frame from the broker."""

    frame: AnyFrame
    buffers: Sequence[Buffer] = ()


@dataclass(frozen=True, slots=True)
class Outgoing:
    """The node posts a message; ``data[i]`` are the bytes of its i-th blob."""

    message: Message
    data: Sequence[Buffer] = ()
    consumes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Fetch:
    """The node wants the bytes of a blob: all at once, or ``in_pieces``, as they come."""

    owner: str
    blob: Blob
    in_pieces: bool = False


@dataclass(frozen=True, slots=True)
class More:
    """The node is done with a piece of a blob: the next may be asked for."""


@dataclass(frozen=True, slots=True)
class Leave:
    """The node does not want the rest of a blob that it fetched in pieces."""

    owner: str
    blob: Blob


@dataclass(frozen=True, slots=True)
class Say:
    """The node says something that is no message: Done, Over or Bye."""

    frame: Done | Over | Bye


@dataclass(frozen=True, slots=True)
class Taken:
    """The node has taken a delivery out of its inbox."""

    delivery: Delivery


@dataclass(frozen=True, slots=True)
class Wake:
    """A deadline has passed."""


Event = Received | Outgoing | Fetch | More | Leave | Say | Taken | Wake


# ---- actions


@dataclass(frozen=True, slots=True)
class Send:
    """Send a frame to the broker."""

    frame: Frame
    buffers: Sequence[Buffer] = ()


@dataclass(frozen=True, slots=True)
class Admitted:
    """The broker has welcomed this node for the first time."""

    welcome: Welcome


@dataclass(frozen=True, slots=True)
class Deliveries:
    """A message for the node."""

    delivery: Delivery


@dataclass(frozen=True, slots=True)
class Fetched:
    """A blob is here; ``data`` is None if nobody holds it, or its bytes were wrong."""

    owner: str
    blob: Blob
    data: Buffer | None


@dataclass(frozen=True, slots=True)
class Came:
    """A piece of a blob that was asked for in pieces; whether they are right comes last."""

    data: Buffer


@dataclass(frozen=True, slots=True)
class Blocked:
    """The broker cannot keep anything now, with the reason; what was posted is kept here."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The link is at its end.

    over: because the run is. rejected: the broker did not admit the node.
    """

    reason: str
    rejected: bool = False
    over: bool = False


Action = Send | Admitted | Deliveries | Fetched | Came | Blocked | Ended
