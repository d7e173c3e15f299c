"""The ledger's records: entries about messages, and chunks of blobs.

``messages-*.log`` holds the entries, numbered from 0 without gaps: each accepted message, and
whether it was consumed or rejected. ``payload-*.log`` holds the chunks. At every entry: accepted =
consumed + pending + rejected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Struct, UnsetType, field

from fedmq.broker.errors import LedgerDamage, LedgerError, WireError, io_error
from fedmq.broker.ledger.disk import LOCAL_DISK, Disk
from fedmq.broker.ledger.records import Record
from fedmq.broker.rejections import code_of
from fedmq.broker.wire.encoding import decode_message
from fedmq.broker.wire.schema import Blob, Message

MESSAGES = "messages"
PAYLOAD = "payload"


class BlobName(Struct, frozen=True, gc=False):
    """A blob's full name. The owner is part of it, so no node can supply another node's bytes."""

    run: str
    owner: str
    digest: bytes


class Entry(Struct, frozen=True, kw_only=True, tag_field="kind", tag=str.lower):
    """Base of the ledger's entries. ``seq`` counts from 0; ``at`` is in seconds since 1970."""

    seq: int
    at: float


class Opened(Entry, frozen=True):
    """An aggregator has opened a run."""

    run: str
    config: str
    total_clients: int
    identity: str = ""
    """Drawn when the run was opened, to distinguish runs with the same id in several ledgers."""
    owner: str = ""
    """Of the aggregator's place: a public key, or a digest. Not in ledgers of 0.1.0."""


class Accepted(Entry, frozen=True):
    """An accepted message, as the bytes its sender wrote; and the messages that it consumes."""

    message: bytes
    consumes: tuple[int, ...] = ()
    traffic: tuple[int, int] | UnsetType = UNSET
    """Of a checkpoint: bytes on the wire to all nodes but the aggregator, and from them, since the
    run's beginning or its last end. A broker that is killed takes its newer counts with it."""

    def read(self) -> Message:
        """Decode the message."""
        return decode_message(self.message)


class AcceptedAll(Entry, frozen=True):
    """Several messages in one record, numbered from ``seq`` on; written by 0.1.0 only."""

    messages: Annotated[tuple[bytes, ...], msgspec.Meta(min_length=1)]

    def each(self) -> list[Accepted]:
        """Return the same as single entries."""
        return [
            Accepted(seq=seq, at=self.at, message=data)
            for seq, data in enumerate(self.messages, self.seq)
        ]


class Consumed(Entry, frozen=True):
    """A recipient has handled these messages, and will not need them again."""

    node: str
    of: tuple[int, ...]


class Refusal(Entry, frozen=True):
    """A post was rejected (``of`` is None), or an accepted message was."""

    run: str
    node: str
    """Name of the node, or the broker, that rejected it."""
    id: str
    reason: str
    of: int | None = None
    dead_lettered: bool = field(name="parked", default=False)
    """Whether it is not delivered any more: too many sessions ended while they handled it."""
    mark: bytes = b""
    """Fingerprint of a rejected post, to recognise duplicates: see `PostFingerprint.to_bytes`."""
    code: str = ""
    """See `rejections.Code`; empty in ledgers of 0.1.0, which have only the reason."""
    sender: str = ""
    """Node that posted a rejected post, whose ``id`` can be any text; not in ledgers of 0.1.0."""

    @property
    def known_code(self) -> str:
        """Return the code; for a ledger of 0.1.0, the one of the reason."""
        return code_of(self.code, self.reason)


class Ended(Entry, frozen=True):
    """A run has ended.

    ``nodes``: the broker's counts for each node, by name. The name "" has those of others and of
    earlier brokers; after a restart it has ``recovered``: some bytes have not been counted.
    """

    run: str
    reason: str
    nodes: dict[str, dict[str, int]] = {}


AnyEntry = Opened | Accepted | Consumed | Refusal | Ended
AnyRecord = AnyEntry | AcceptedAll


class ChunkRecord(Struct, frozen=True):
    """Head of a payload record: its data are bytes ``start...`` of a blob of ``size`` bytes."""

    run: str
    owner: str
    digest: bytes
    size: int
    start: int


encode_record = msgspec.msgpack.Encoder().encode
_entry_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnyRecord)
_chunk_decoder = msgspec.msgpack.Decoder(ChunkRecord)


def decode_entries(record: Record, path: Path) -> Sequence[AnyEntry]:
    """Decode the entries of a record (usually one), and check the messages in them.

    Raises:
        LedgerDamage: the record does not hold an entry; with segment and offset.
    """
    found: AnyRecord = _decode(_entry_decoder, record, path)
    entries = found.each() if isinstance(found, AcceptedAll) else [found]
    for entry in entries:
        if isinstance(entry, Accepted):
            try:
                entry.read()
            except WireError as error:
                raise LedgerDamage(str(error), path.name, record.offset) from None
    return entries


def decode_chunk(record: Record, path: Path) -> ChunkRecord:
    """Decode the head of a payload record.

    Raises:
        LedgerDamage: the record is not a chunk; with segment and offset.
    """
    chunk: ChunkRecord = _decode(_chunk_decoder, record, path)
    return chunk


def segment_path(folder: Path, family: str, number: int) -> Path:
    """Return the path of a segment; messages are numbered by first entry, payload by count."""
    return folder / f"{family}-{number:020d}.log"


def segment_numbers(folder: Path, family: str, disk: Disk = LOCAL_DISK) -> list[int]:
    """Return the numbers of a family's segments, in order; none if the folder does not exist.

    Raises:
        LedgerError: the folder cannot be read.
    """
    pattern = re.compile(rf"{family}-([0-9]{{20}})\.log")
    try:
        matches = [pattern.fullmatch(name) for name in disk.names(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise io_error(f"cannot read {folder}", error) from None
    return sorted(int(match[1]) for match in matches if match)


def ledger_folder(folder: Path) -> Path:
    """Return ``ledger`` within a run's folder, or else the folder itself.

    Raises:
        LedgerError: the folder cannot be read.
    """
    try:
        (folder / "ledger").stat()  # `is_dir` would hide a permission error
    except (FileNotFoundError, NotADirectoryError):
        return folder
    except (OSError, ValueError) as error:
        raise LedgerError(f"cannot read {folder}: {getattr(error, 'strerror', error)}") from None
    return folder / "ledger"


def blob_name(message: Message, blob: Blob) -> BlobName:
    """Return the full name of a message's blob."""
    return BlobName(message.run, message.sender, blob.digest)


def _decode(decoder: msgspec.msgpack.Decoder[Any], record: Record, path: Path) -> Any:
    try:
        return decoder.decode(record.head)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise LedgerDamage(f"not a ledger record: {error}", path.name, record.offset) from None
