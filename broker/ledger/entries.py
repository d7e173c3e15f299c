"""What the ledger's records say: entries about messages, and pieces of blobs.

``messages-*.log`` holds the entries, numbered from 0 without gaps: each accepted message,
and what became of it. ``payload-*.log`` holds the pieces. From the entries alone follows,
at every moment: accepted = consumed + pending + refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Struct, UnsetType, field

from fedmq.broker.errors import LedgerDamage, LedgerError, WireError, io_error
from fedmq.broker.ledger.records import Record
from fedmq.broker.rejections import code_of
from fedmq.broker.wire.encoding import decode_message
from fedmq.broker.wire.schema import Blob, Message

MESSAGES = "messages"
PAYLOAD = "payload"


class BlobName(Struct, frozen=True, gc=False):
    """A blob's full name. Scoped by owner: nobody can pass bytes off as someone else's."""

    run: str
    owner: str
    digest: bytes


class Entry(Struct, frozen=True, kw_only=True, tag_field="kind", tag=str.lower):
    """Root of the ledger's entries. ``seq`` counts from 0; ``at`` is in seconds since 1970."""

    seq: int
    at: float


class Opened(Entry, frozen=True):
    """An aggregator has brought a run."""

    run: str
    config: str
    total_clients: int
    identity: str = ""
    """Drawn when the run was opened; a run of the same id in another ledger has another one."""


class Accepted(Entry, frozen=True):
    """A message, as the bytes its sender wrote, and the messages that it consumes."""

    message: bytes
    consumes: tuple[int, ...] = ()
    traffic: tuple[int, int] | UnsetType = UNSET
    """Of a checkpoint: bytes on the wire to all nodes but the aggregator, and from them, since the
    run's beginning or its last end. A broker that is killed takes its newer counts with it."""

    def read(self) -> Message:
        """Return the message."""
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
    """A recipient is done with these messages, and will not need them again."""

    node: str
    of: tuple[int, ...]


class Refusal(Entry, frozen=True):
    """A message was not accepted (``of`` is None), or its recipient could not use it."""

    run: str
    node: str
    """Who refused."""
    id: str
    reason: str
    of: int | None = None
    dead_lettered: bool = field(name="parked", default=False)
    """Its recipients died of it, one after the other: nobody is offered it any more."""
    mark: bytes = b""
    """Of a post that was not accepted, so that it is known again: see `remembered.Mark`."""
    code: str = ""
    """See `rejections.Code`; empty in ledgers of version 0.1.0, which have only the reason."""

    @property
    def known_code(self) -> str:
        """Return the code, also where an old ledger has only the reason."""
        return code_of(self.code, self.reason)


class Ended(Entry, frozen=True):
    """A run is over. ``nodes``: by name, what the broker counted for each."""

    run: str
    reason: str
    nodes: dict[str, dict[str, int]] = {}


AnyEntry = Opened | Accepted | Consumed | Refusal | Ended
AnyRecord = AnyEntry | AcceptedAll


class ChunkRecord(Struct, frozen=True):
    """Head of a payload record: these data are bytes ``start...`` of a blob of ``size``."""

    run: str
    owner: str
    digest: bytes
    size: int
    start: int


encode_record = msgspec.msgpack.Encoder().encode
_entry_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnyRecord)
_chunk_decoder = msgspec.msgpack.Decoder(ChunkRecord)


def decode_entries(record: Record, path: Path) -> Sequence[AnyEntry]:
    """Read the entries of a record, mostly one, and check the messages in them.

    Raises:
        LedgerDamage: it is none, with segment and offset.
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
    """Read the head of a payload record.

    Raises:
        LedgerDamage: it is none, with segment and offset.
    """
    piece: ChunkRecord = _decode(_chunk_decoder, record, path)
    return piece


def segment_path(folder: Path, family: str, number: int) -> Path:
    """Return the path of a segment: messages by their first entry, payload by count."""
    return folder / f"{family}-{number:020d}.log"


def segment_numbers(folder: Path, family: str) -> list[int]:
    """Return the numbers of the segments of a family, in order; none where there is no folder.

    Raises:
        LedgerError: the folder cannot be read.
    """
    pattern = re.compile(rf"{family}-([0-9]{{20}})\.log")
    try:
        with os.scandir(folder) as found:
            matches = [pattern.fullmatch(each.name) for each in found]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise io_error(f"cannot read {folder}", error) from None
    return sorted(int(match[1]) for match in matches if match)


def ledger_folder(folder: Path) -> Path:
    """Return the folder of the ledger: of a run's folder that in it, or else the folder itself.

    Raises:
        LedgerError: the folder cannot be looked into.
    """
    try:
        (folder / "ledger").stat()  # `is_dir` would say no where it is refused to look
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
