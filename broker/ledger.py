"""The ledger: one ordered, append-only record of everything that a broker accepted.

Two families of segments lie in its folder. ``messages-*.log`` holds the entries: each
accepted message, and what became of it, numbered from 0 without gaps. ``payload-*.log``
holds the blobs, in checksummed pieces, each stored once; a message is written after all
of its blobs. So headers can be kept for ever and payloads dropped, a large blob can be
resumed after a crash from the pieces that are there, and a reader can follow the tail.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from fedmq.broker.errors import LedgerError, WireError
from fedmq.broker.records import MAGIC, Record, Segment, pack, scan
from fedmq.broker.wire import INLINE_BYTES, Blob, Buffer, Message, decode_message

MESSAGES = "messages"
PAYLOAD = "payload"
_MESSAGES_SEGMENT_BYTES = 64 << 20
_PAYLOAD_SEGMENT_BYTES = 128 << 20
_CACHED_SEGMENTS = 2
_RECENT_BYTES = 8 << 20


class BlobName(NamedTuple):
    """A blob's full name. Scoped by owner: nobody can pass bytes off as someone else's."""

    run: str
    owner: str
    digest: bytes


class Entry(Struct, frozen=True, kw_only=True, tag_field="kind", tag=str.lower):
    """Root of the ledger's entries. ``seq`` counts from 0; ``at`` is in seconds since 1970."""

    seq: int
    at: float


class Accepted(Entry, frozen=True):
    """A message, as the bytes its sender wrote, and the messages that it consumes."""

    message: bytes
    consumes: tuple[int, ...] = ()

    def read(self) -> Message:
        """Return the message."""
        return decode_message(self.message)


class Consumed(Entry, frozen=True):
    """A recipient is done with these messages."""

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


class Ended(Entry, frozen=True):
    """A run is over. ``nodes``: by name, what the broker counted for each."""

    run: str
    reason: str
    nodes: dict[str, dict[str, int]] = {}


AnyEntry = Accepted | Consumed | Refusal | Ended


class Piece(Struct, frozen=True):
    """Head of a payload record: these data are bytes ``start...`` of a blob of ``size``."""

    run: str
    owner: str
    digest: bytes
    size: int
    start: int


_encode = msgspec.msgpack.Encoder().encode
_entry_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnyEntry)
_piece_decoder = msgspec.msgpack.Decoder(Piece)


@dataclass
class _Stored:
    """Where the pieces of a blob lie: (segment number, offset, start, length), in order."""

    size: int
    pieces: list[tuple[int, int, int, int]] = field(default_factory=list)
    end: int = 0


class PayloadIndex:
    """Which blobs a folder's payload segments hold, and where; reads them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._blobs: dict[BlobName, _Stored] = {}
        self._fds: dict[int, int] = {}
        self._recent: OrderedDict[BlobName, Buffer] = OrderedDict()
        self._recent_bytes = 0

    def remember(self, name: BlobName, data: Buffer) -> None:
        """Keep a small, whole blob at hand: most are read once, right after they came."""
        if name not in self._recent:
            self._recent[name] = data
            self._recent_bytes += memoryview(data).nbytes
        while self._recent_bytes > _RECENT_BYTES:
            _, dropped = self._recent.popitem(last=False)
            self._recent_bytes -= memoryview(dropped).nbytes

    def add(self, piece: Piece, segment: int, offset: int, length: int) -> None:
        """Note a piece. Pieces of a blob come in order; one that is already there is ignored.

        A piece without data, of a blob that is not empty, takes back all before it.
        """
        name = BlobName(piece.run, piece.owner, piece.digest)
        if piece.size and not length:
            self._blobs.pop(name, None)
            return
        stored = self._blobs.setdefault(name, _Stored(piece.size))
        if piece.start == stored.end and length:
            stored.pieces.append((segment, offset, piece.start, length))
            stored.end += length

    def add_segment(self, number: int, *, verify: bool) -> None:
        """Note every piece of a segment.

        Raises:
            LedgerError: the segment is damaged.
        """
        path = segment_path(self._folder, PAYLOAD, number)
        for record in scan(path, verify_data=verify):
            piece = _decode(_piece_decoder, record, path)
            self.add(piece, number, record.data_offset, record.data_length)

    def have(self, name: BlobName) -> int:
        """Return how many bytes of the blob, from its start, are here."""
        stored = self._blobs.get(name)
        return stored.end if stored else 0

    def size_of(self, name: BlobName) -> int | None:
        """Return the size of a blob that is here as a whole, or None."""
        stored = self._blobs.get(name)
        return stored.size if stored is not None and stored.end == stored.size else None

    def read(self, name: BlobName, start: int, size: int) -> Buffer:
        """Return bytes of a blob that is here.

        Raises:
            LedgerError: those bytes are not here.
        """
        recent = self._recent.get(name)
        if recent is not None and (start, size) == (0, memoryview(recent).nbytes):
            return recent
        stored = self._blobs.get(name)
        if stored is None or start + size > stored.end:
            raise LedgerError(f"blob {name.digest.hex()} of {name.owner} is not in the ledger")
        parts = []
        # Pieces all have one length, but for the last.
        index = start // stored.pieces[0][3] if stored.pieces else 0
        while size:
            segment, offset, piece_start, length = stored.pieces[index]
            skip = start - piece_start
            take = min(size, length - skip)
            data = os.pread(self._fd(segment), take, offset + skip)
            if len(data) != take:
                raise LedgerError("payload is shorter than its index", f"payload {segment}", offset)
            parts.append(data)
            start, size, index = start + take, size - take, index + 1
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def let_go(self, segment: int) -> None:
        """Start writing a segment to the device; what is there already leaves the page cache.

        Called when a segment is full, and again some segments later. So the cache holds
        the newest payloads and its pages are used again and again: where memory is
        scarce, or is handed out by a hypervisor, writing into ever new pages was measured
        at 3.2 ms a MiB, this at 0.5.
        """
        if segment >= 0 and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd(segment), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the files."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _fd(self, segment: int) -> int:
        if segment not in self._fds:
            if len(self._fds) >= 64:
                os.close(self._fds.pop(next(iter(self._fds))))
            path = segment_path(self._folder, PAYLOAD, segment)
            self._fds[segment] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._fds[segment]


class Ledger:
    """The ledger of one broker, open for appending. One writer at a time.

    Appends are gathered and written together by `commit`, payload before messages.

    Attributes:
        next_seq: number of the next entry.
        cut_bytes: bytes of torn tails that opening removed.

    Raises:
        LedgerError: the folder cannot be written, or holds a damaged ledger.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.next_seq = 0
        self.cut_bytes = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(f"cannot make {folder}: {error.strerror}") from None
        self.payload = PayloadIndex(folder)
        numbers = segment_numbers(folder, PAYLOAD)
        self._payload_number = numbers[-1] if numbers else 0
        self._payload_file = self._open(PAYLOAD, self._payload_number)
        for number in numbers:
            self.payload.add_segment(number, verify=False)
        firsts = segment_numbers(folder, MESSAGES)
        self._messages_file = self._open(MESSAGES, firsts[-1] if firsts else 0)
        for entry in read_entries(folder):
            self.next_seq = entry.seq + 1
        self._messages: list[Buffer] = []
        self._first_queued = 0
        self._pieces: list[Buffer] = []
        self._piece_end = self._payload_file.size

    def append(self, entry: Entry) -> None:
        """Queue an entry; its number must be the next one."""
        if entry.seq != self.next_seq:
            raise LedgerError(f"expected entry {self.next_seq}, got {entry.seq}")
        if not self._messages:
            self._first_queued = entry.seq
        self.next_seq += 1
        self._messages += pack(_encode(entry))

    def put(self, name: BlobName, size: int, start: int, data: Buffer) -> None:
        """Queue a piece of a blob of ``size`` bytes; ``data`` must stay as it is until `commit`."""
        if self._piece_end > _PAYLOAD_SEGMENT_BYTES:
            self.commit()
            number = self._payload_number + 1
            fresh = self._open(PAYLOAD, number)
            self._payload_file.close()
            self.payload.let_go(self._payload_number)
            self.payload.let_go(self._payload_number - _CACHED_SEGMENTS)
            self._payload_file, self._payload_number = fresh, number
            self._piece_end = fresh.size
        piece = Piece(name.run, name.owner, name.digest, size, start)
        record = pack(_encode(piece), data)
        length = memoryview(data).nbytes
        self._pieces += record
        self._piece_end += sum(memoryview(part).nbytes for part in record)
        self.payload.add(piece, self._payload_number, self._piece_end - length, length)
        if length == size <= INLINE_BYTES:
            self.payload.remember(name, data)

    def drop(self, name: BlobName, size: int) -> None:
        """Queue a note that the pieces of a blob so far are not to be used."""
        self.put(name, size, 0, b"")

    def commit(self, *, sync: bool = False) -> None:
        """Write everything that is queued; with ``sync``, wait for the device as well.

        Raises:
            LedgerError: the operating system refused the write.
        """
        if self._pieces:
            self._payload_file.append(self._pieces)
            self._pieces = []
            if sync:
                self._payload_file.sync()
        if self._messages:
            if self._messages_file.size > _MESSAGES_SEGMENT_BYTES:
                fresh = self._open(MESSAGES, self._first_queued)
                self._messages_file.close()
                self._messages_file = fresh
            self._messages_file.append(self._messages)
            self._messages = []
            if sync:
                self._messages_file.sync()

    def close(self) -> None:
        """Write what is queued and close the files."""
        try:
            self.commit()
        finally:
            self._payload_file.close()
            self._messages_file.close()
            self.payload.close()

    def _open(self, family: str, number: int) -> Segment:
        segment = Segment(segment_path(self.folder, family, number))
        self.cut_bytes += segment.cut
        return segment


def read_entries(folder: Path) -> Iterator[AnyEntry]:
    """Yield the entries of a ledger in order; stops at a torn tail.

    Raises:
        LedgerError: a damaged record, or a number that is missing, with segment and offset.
    """
    follower = Follower(folder)
    yield from follower.poll()


class Follower:
    """Reads entries as they are appended; keeps its place between calls."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._first: int | None = None
        self._offset = len(MAGIC)
        self._next_seq = 0

    def poll(self) -> Iterator[AnyEntry]:
        """Yield the entries that have been appended since the last call.

        Raises:
            LedgerError: as `read_entries`.
        """
        for first in segment_numbers(self._folder, MESSAGES):
            if self._first is not None and first < self._first:
                continue
            if first != self._first:
                self._first, self._offset = first, len(MAGIC)
            path = segment_path(self._folder, MESSAGES, first)
            for record in scan(path, self._offset):
                entry = _decode_entry(record, path)
                if entry.seq != self._next_seq:
                    raise LedgerError(
                        f"expected entry {self._next_seq}, got {entry.seq}",
                        path.name,
                        record.offset,
                    )
                self._next_seq += 1
                self._offset = record.end
                yield entry


def open_payload(folder: Path) -> PayloadIndex:
    """Return an index of all blobs in a ledger, for reading.

    Raises:
        LedgerError: a damaged payload segment.
    """
    index = PayloadIndex(folder)
    for number in segment_numbers(folder, PAYLOAD):
        index.add_segment(number, verify=True)
    return index


def segment_path(folder: Path, family: str, number: int) -> Path:
    """Return the path of a segment: messages by their first entry, payload by count."""
    return folder / f"{family}-{number:020d}.log"


def segment_numbers(folder: Path, family: str) -> list[int]:
    """Return the numbers of the segments of a family, in order."""
    return sorted(int(path.stem.rpartition("-")[2]) for path in folder.glob(f"{family}-*.log"))


def blob_name(message: Message, blob: Blob) -> BlobName:
    """Return the full name of a message's blob."""
    return BlobName(message.run, message.sender, blob.digest)


def _decode(decoder: msgspec.msgpack.Decoder[Any], record: Record, path: Path) -> Any:
    try:
        return decoder.decode(record.head)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise LedgerError(f"not a ledger record: {error}", path.name, record.offset) from None


def _decode_entry(record: Record, path: Path) -> AnyEntry:
    entry: AnyEntry = _decode(_entry_decoder, record, path)
    if isinstance(entry, Accepted):
        try:
            entry.read()
        except WireError as error:
            raise LedgerError(str(error), path.name, record.offset) from None
    return entry
