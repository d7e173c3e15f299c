"""What the Broker core takes and gives: the ledger that it reads, events and actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import xxhash
from msgspec import Struct

from fedmq.broker.access.rights import KEYLESS, Access, Origin
from fedmq.broker.errors import WireError
from fedmq.broker.ledger.entries import Accepted, BlobName, Entry
from fedmq.broker.wire.schema import AnyFrame, Buffer, Frame


class Store(Protocol):
    """The part of the ledger that the core reads."""

    def size_of(self, name: BlobName) -> int | None:
        """Return the size in bytes of a complete blob, or None."""

    def have(self, name: BlobName) -> int:
        """Return how many bytes of a blob, from its start, are stored."""

    def resume(self, name: BlobName, size: int) -> tuple[int, xxhash.xxh3_128]:
        """Return how many bytes of a blob, from its start, are stored, and their hash."""

    def used(self, run: str, owner: str) -> tuple[int, int]:
        """Return the bytes of an owner's blobs on the disk, and those of its run."""

    def read(self, seq: int) -> Accepted:
        """Return the entry of an accepted message, written or queued."""


# ---- events


class ReceivedFrom(Struct, frozen=True):
    """A frame from a connection.

    peer: the connection; its name proves nothing, because a peer may choose it.
    nbytes: size on the wire, including buffers.
    origin: what the transport proves about the peer.
    """

    peer: bytes
    frame: AnyFrame
    buffers: Sequence[Buffer] = ()
    nbytes: int = 0
    origin: Origin = KEYLESS


class Unreadable(Struct, frozen=True):
    """Bytes from a connection that are not a valid frame."""

    peer: bytes
    error: WireError
    origin: Origin = KEYLESS


class AccessChanged(Struct, frozen=True):
    """The keys, rights or invites have changed; also the first event of a core with keys.

    reason: why the last key that was handed in could not be stored; then ``key`` is that key.
    """

    access: Access
    key: str = ""
    reason: str = ""


class Gone(Struct, frozen=True):
    """A connection that was probed is closed."""

    peer: bytes


class DiskFull(Struct, frozen=True):
    """The ledger cannot be written. ``reason``: empty once it can be written again."""

    reason: str


class TimerFired(Struct, frozen=True):
    """A deadline has passed, or a batch of events has ended."""


Event = ReceivedFrom | Unreadable | AccessChanged | Gone | DiskFull | TimerFired


# ---- actions


class Append(Struct, frozen=True):
    """Append an entry to the ledger.

    uses: blobs that it names. kept: whether they must be kept until the entry is consumed.
    """

    entry: Entry
    uses: Sequence[BlobName] = ()
    kept: bool = True


class Put(Struct, frozen=True):
    """Append a chunk of a blob to the ledger."""

    name: BlobName
    size: int
    start: int
    data: Buffer


class Unpin(Struct, frozen=True):
    """Stop keeping blobs whose message will not be accepted now."""

    names: tuple[BlobName, ...]


class Discard(Struct, frozen=True):
    """Discard the stored chunks of a blob: they do not match its digest."""

    name: BlobName
    size: int


class SendTo(Struct, frozen=True):
    """Send a frame, with blobs from the ledger as its buffers."""

    peer: bytes
    frame: Frame
    blobs: Sequence[tuple[BlobName, int, int]] = ()
    """(name, start, size) of each buffer."""
    apart: Sequence[tuple[int, BlobName]] = ()
    """(index, name) of the blobs of a delivery that its node may read in the ledger's files."""
    files: bool = False
    """Of a Welcome: whether the node may read the ledger's files."""


class Probe(Struct, frozen=True):
    """Check whether a connection is still up; if not, the driver reports `Gone`."""

    peer: bytes


class Disconnect(Struct, frozen=True):
    """Close a connection, whose key has been revoked."""

    peer: bytes


class Forget(Struct, frozen=True):
    """Drop the frames that wait for a connection, which has another key now."""

    peer: bytes


class Charge(Struct, frozen=True):
    """Count the message that a connection has just sent as a costly one: see `Limits`."""

    peer: bytes


class Enlist(Struct, frozen=True):
    """Store a key with the rights of an invite, synced, before any frame of this turn is sent.

    The driver answers with `AccessChanged`.
    """

    key: str
    invite: str


class Log(Struct, frozen=True):
    """Log an event for people; ``level`` as in `logging`."""

    level: str
    event: str
    fields: dict[str, Any]


Action = (
    Append | Put | Unpin | Discard | SendTo | Probe | Disconnect | Forget | Charge | Enlist | Log
)
