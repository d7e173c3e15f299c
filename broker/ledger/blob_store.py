"""Where a ledger's blobs lie, and reading them."""

from __future__ import annotations

import bisect
import contextlib
import os
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from fedmq.broker.errors import LedgerDamage, LedgerError, io_error
from fedmq.broker.ledger import page_cache
from fedmq.broker.ledger.entries import (
    PAYLOAD,
    BlobName,
    ChunkRecord,
    decode_chunk,
    segment_numbers,
    segment_path,
)
from fedmq.broker.ledger.records import DamagedRange, DamageKind, walk
from fedmq.broker.ledger.segments import SegmentFiles
from fedmq.broker.wire.schema import CHUNK_BYTES, Buffer, Extent

_RECENT_BYTES = 32 << 20
_OPEN_FILES = 64
_IDLE_BLOBS = 4096
"""Blobs that no unfinished message names, but that the next one may."""


@dataclass
class _Stored:
    """Where the pieces of a blob lie: (segment number, offset, start, length), in order."""

    size: int
    pieces: list[tuple[int, int, int, int]] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    """Numbers of the segments that they lie in, in order."""
    end: int = 0
    users: int = 0
    """Unfinished messages that name this blob."""
    pinned: bool = False
    """Whether its segments must stay: it is on its way, or has users."""


class BlobStore:
    """Which blobs a folder's payload segments hold, and where; reads them.

    Blobs that an unfinished message names are all known; of the others, those that were
    used last, so that memory does not grow with a run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._blobs: dict[BlobName, _Stored] = {}
        self._idle: OrderedDict[BlobName, None] = OrderedDict()
        self._pins: dict[int, int] = {}
        """Blobs that need a segment, by its number."""
        self._files = SegmentFiles(folder, _OPEN_FILES)
        self._recent: OrderedDict[tuple[BlobName, int], Buffer] = OrderedDict()
        self._recent_bytes = 0

    def remember(self, name: BlobName, start: int, data: Buffer) -> None:
        """Keep a piece at hand: most are read once, right after they came, or by many at once.

        Whoever reads the same piece gets the same bytes, so a model that goes out to many
        workers at a time is in memory once.
        """
        if (name, start) not in self._recent:
            self._recent[name, start] = data
            self._recent_bytes += memoryview(data).nbytes
        while self._recent_bytes > _RECENT_BYTES:
            _, dropped = self._recent.popitem(last=False)
            self._recent_bytes -= memoryview(dropped).nbytes

    def add(
        self, piece: ChunkRecord, segment: int, offset: int, length: int, *, arriving: bool = False
    ) -> None:
        """Note a piece. Pieces of a blob come in order; one that is already there is ignored.

        A piece without data, of a blob that is not empty, takes back all before it. The
        segments of a blob that is ``arriving`` stay until a message that named it is done.
        """
        name = BlobName(piece.run, piece.owner, piece.digest)
        if piece.size and not length:
            self._discard(name)
            return
        stored = self._blobs.get(name)
        if stored is None:
            stored = self._blobs[name] = _Stored(piece.size, pinned=arriving)
            if not arriving:
                self._idle[name] = None
        elif arriving:
            self.pin(name)
        if piece.start == stored.end and length:
            if segment not in stored.segments:
                stored.segments.append(segment)
                if stored.pinned:
                    self._pins[segment] = self._pins.get(segment, 0) + 1
            stored.pieces.append((segment, offset, piece.start, length))
            stored.end += length

    def pin(self, name: BlobName) -> None:
        """Keep a blob that is on its way, or some of it, until `use` or `let_be`."""
        stored = self._blobs.get(name)
        if stored is not None:
            self._idle.pop(name, None)
            self._pin(stored, pinned=True)

    def unpin(self, name: BlobName) -> None:
        """A blob that was on its way is not wanted now; it may be, but it is not kept for that."""
        stored = self._blobs.get(name)
        if stored is not None and not stored.users:
            self._pin(stored, pinned=False)
            self._idle[name] = None

    def use(self, name: BlobName) -> None:
        """Note that an unfinished message names this blob."""
        stored = self._blobs.get(name)
        if stored is not None:
            stored.users += 1
            self._idle.pop(name, None)
            self._pin(stored, pinned=True)

    def finish(self, name: BlobName) -> None:
        """Note that one message that named this blob is done."""
        stored = self._blobs.get(name)
        if stored is None:
            return
        stored.users = max(0, stored.users - 1)
        if not stored.users:
            self._pin(stored, pinned=False)
            self._idle[name] = None
        while len(self._idle) > _IDLE_BLOBS:
            self._discard(next(iter(self._idle)))

    def needs_segment(self, number: int) -> bool:
        """Tell whether a segment holds something that must stay."""
        return bool(self._pins.get(number))

    def remove_segment(self, number: int) -> bool:
        """Forget a segment's blobs and delete it, unless one of them is still needed.

        Returns whether it was deleted.

        Raises:
            LedgerError: it cannot be deleted.
        """
        if self.needs_segment(number):
            return False
        for name in [n for n in self._idle if number in self._blobs[n].segments]:
            self._discard(name)
        self._files.close(number)
        path = segment_path(self._folder, PAYLOAD, number)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise io_error("cannot delete", error, path.name) from None
        return True

    def resume(self, name: BlobName) -> tuple[int, xxhash.xxh3_128]:
        """Return how many bytes of a blob, from its start, are here, and their hash so far."""
        hasher = xxhash.xxh3_128()
        have = self.have(name)
        self.pin(name)
        for start in range(0, have, CHUNK_BYTES):
            hasher.update(self.read(name, start, min(CHUNK_BYTES, have - start)))
        return have, hasher

    def add_segment(self, number: int, *, verify: bool = False) -> list[LedgerDamage]:
        """Note every piece of a segment; return what is damaged in it, which is passed over.

        Without ``verify``, the data of pieces are not looked at.

        Raises:
            LedgerError: the segment cannot be read, or is none.
        """
        path = segment_path(self._folder, PAYLOAD, number)
        damage = []
        for found in walk(path, verify_data=verify):
            if isinstance(found, DamagedRange):
                if found.fault is not DamageKind.TORN:
                    damage.append(found.error(path))
                continue
            try:
                piece = decode_chunk(found, path)
            except LedgerDamage as error:
                damage.append(error)
                continue
            self.add(piece, number, found.data_offset, found.data_length)
        return damage

    def have(self, name: BlobName) -> int:
        """Return how many bytes of the blob, from its start, are here."""
        stored = self._blobs.get(name)
        return stored.end if stored else 0

    def expected(self, name: BlobName) -> int:
        """Return the size that a blob will have; 0 if nothing of it is here."""
        stored = self._blobs.get(name)
        return stored.size if stored else 0

    def size_of(self, name: BlobName) -> int | None:
        """Return the size of a blob that is here as a whole, or None."""
        stored = self._blobs.get(name)
        return stored.size if stored is not None and stored.end == stored.size else None

    def read(self, name: BlobName, start: int, size: int) -> Buffer:
        """Return bytes of a blob that is here.

        Raises:
            LedgerError: those bytes are not here.
        """
        recent = self._recent.get((name, start))
        if recent is not None and size == memoryview(recent).nbytes:
            return recent
        stored = self._blobs.get(name)
        if stored is None or start + size > stored.end:
            raise LedgerError(f"blob {name.digest.hex()} of {name.owner} is not in the ledger")
        parts = []
        first = start
        index = bisect.bisect_right(stored.pieces, start, key=_start_of) - 1
        while size:
            segment, offset, piece_start, length = stored.pieces[index]
            skip = start - piece_start
            take = min(size, length - skip)
            try:
                data = os.pread(self._files.fd(segment), take, offset + skip)
            except OSError as error:
                file = segment_path(self._folder, PAYLOAD, segment).name
                raise io_error("cannot read", error, file, offset + skip) from None
            if len(data) != take:
                file = segment_path(self._folder, PAYLOAD, segment).name
                raise LedgerDamage("payload is shorter than its index", file, offset)
            parts.append(data)
            start, size, index = start + take, size - take, index + 1
        found = parts[0] if len(parts) == 1 else b"".join(parts)
        self.remember(name, first, found)
        return found

    def extents(self, name: BlobName) -> tuple[Extent, ...]:
        """Return where the pieces of a blob lie, in order; none if it is not here as a whole."""
        stored = self._blobs.get(name)
        if stored is None or stored.end < stored.size:
            return ()
        return tuple((segment, offset, length) for segment, offset, _, length in stored.pieces)

    def evict(self, segment: int) -> None:
        """Let a segment's pages leave the page cache, if it can be done: see `disk.let_go`."""
        # Deleted, or no descriptor or thread to spare: it costs time only.
        with contextlib.suppress(LedgerError, OSError, RuntimeError):
            page_cache.evict(self._files.fd(segment))

    def close(self) -> None:
        """Close the files."""
        self._files.close_all()

    def _discard(self, name: BlobName) -> None:
        stored = self._blobs.pop(name, None)
        self._idle.pop(name, None)
        if stored is not None:
            self._pin(stored, pinned=False)
        for start in [piece[2] for piece in stored.pieces] if stored is not None else ():
            dropped = self._recent.pop((name, start), b"")
            self._recent_bytes -= memoryview(dropped).nbytes

    def _pin(self, stored: _Stored, *, pinned: bool) -> None:
        if stored.pinned != pinned:
            stored.pinned = pinned
            for segment in stored.segments:
                self._pins[segment] = self._pins.get(segment, 0) + (1 if pinned else -1)


def _start_of(piece: tuple[int, int, int, int]) -> int:
    return piece[2]


def open_payload(folder: Path) -> BlobStore:
    """Return an index of all blobs in a ledger, for reading.

    Raises:
        LedgerError: a damaged payload segment, or one that cannot be read.
    """
    index = BlobStore(folder)
    for number in segment_numbers(folder, PAYLOAD):
        for damage in index.add_segment(number, verify=True):
            raise damage
    return index


def find_damage(folder: Path) -> LedgerDamage | None:
    """Return the first damage in a ledger's payload, of which all is read; None if it is whole.

    Raises:
        LedgerError: a segment cannot be read, or is none.
    """
    index = BlobStore(folder)
    for number in segment_numbers(folder, PAYLOAD):
        for damage in index.add_segment(number, verify=True):
            return damage
    return None
