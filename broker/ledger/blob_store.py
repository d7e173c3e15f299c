"""Index and read the blobs of a ledger."""

from __future__ import annotations

import bisect
import contextlib
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import xxhash

from fedmq.broker.errors import LedgerDamage, LedgerError, io_error
from fedmq.broker.ledger.disk import LOCAL_DISK, Disk
from fedmq.broker.ledger.entries import (
    PAYLOAD,
    BlobName,
    ChunkRecord,
    decode_chunk,
    segment_numbers,
    segment_path,
)
from fedmq.broker.ledger.records import DamagedRange, DamageKind, Record, read_record, walk
from fedmq.broker.ledger.segments import SegmentFiles
from fedmq.broker.wire.schema import CHUNK_BYTES, Buffer, Extent

_RECENT_BYTES = 32 << 20
_OPEN_FILES = 64
_IDLE_BLOBS = 4096
"""Most blobs kept in the index that no unfinished message names; the next one may."""


class _ChunkPlace(NamedTuple):
    """Where a chunk is, and where it belongs.

    record: offset of its record in the segment.
    offset: of its first byte in the segment.
    start: of its first byte in the blob.
    """

    segment: int
    record: int
    offset: int
    start: int
    length: int


@dataclass
class _Stored:
    """A blob's chunks in order."""

    size: int
    chunks: list[_ChunkPlace] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    """Numbers of the segments of its chunks, in order."""
    end: int = 0
    users: int = 0
    """Number of unfinished messages that name this blob."""
    pinned: bool = False
    """Whether its segments must be kept: it is being uploaded, or has users."""


class DiskUsage:
    """Bytes of payload records on the disk, by run and by owner within a run."""

    def __init__(self) -> None:
        self._by_segment: dict[int, Counter[tuple[str, str]]] = {}
        self._by_owner: Counter[tuple[str, str]] = Counter()
        self._by_run: Counter[str] = Counter()

    def add(self, segment: int, name: BlobName, nbytes: int) -> None:
        """Count a record in a segment."""
        self._by_segment.setdefault(segment, Counter())[name.run, name.owner] += nbytes
        self._by_owner[name.run, name.owner] += nbytes
        self._by_run[name.run] += nbytes

    def remove(self, segment: int) -> None:
        """Stop counting a segment, which is deleted."""
        for (run, owner), nbytes in self._by_segment.pop(segment, Counter()).items():
            self._by_owner[run, owner] -= nbytes
            self._by_run[run] -= nbytes

    def of(self, run: str, owner: str) -> tuple[int, int]:
        """Return the bytes of an owner, and of its run."""
        return self._by_owner[run, owner], self._by_run[run]


class BlobStore:
    """Index of the blobs in a folder's payload segments, and their reader.

    It holds all blobs that an unfinished message names, and the most recently used of the others,
    so that its memory does not grow with a run.

    Attributes:
        damage: of the segments that were added. It is skipped: its blobs are incomplete.
        usage: of the disk; also of blobs that are not in the index any more.
    """

    def __init__(self, folder: Path, disk: Disk = LOCAL_DISK) -> None:
        self._folder, self._disk = folder, disk
        self.damage: list[LedgerDamage] = []
        self.usage = DiskUsage()
        self._blobs: dict[BlobName, _Stored] = {}
        self._idle: OrderedDict[BlobName, None] = OrderedDict()
        self._pins: dict[int, int] = {}
        """Number of pinned blobs of each segment, by its number."""
        self._files = SegmentFiles(folder, _OPEN_FILES, disk)
        self._recent: OrderedDict[tuple[BlobName, int], Buffer] = OrderedDict()
        self._recent_bytes = 0

    def remember(self, name: BlobName, start: int, data: Buffer) -> None:
        """Cache a chunk: most chunks are read right after they arrive, often for many nodes.

        All readers share the cached bytes, so a model that is sent to many workers at a time is
        in memory once.
        """
        if (name, start) not in self._recent:
            self._recent[name, start] = data
            self._recent_bytes += memoryview(data).nbytes
        while self._recent_bytes > _RECENT_BYTES:
            _, dropped = self._recent.popitem(last=False)
            self._recent_bytes -= memoryview(dropped).nbytes

    def add(
        self,
        chunk: ChunkRecord,
        segment: int,
        record: int,
        offset: int,
        length: int,
        *,
        arriving: bool = False,
    ) -> None:
        """Index a chunk. The chunks of a blob come in order; a duplicate is ignored.

        A chunk without data, of a blob that is not empty, discards the chunks before it. A blob
        that is ``arriving`` is pinned.
        """
        name = BlobName(chunk.run, chunk.owner, chunk.digest)
        self.usage.add(segment, name, offset + length - record)
        if chunk.size and not length:
            self._discard(name)
            return
        stored = self._blobs.get(name)
        if stored is None:
            stored = self._blobs[name] = _Stored(chunk.size, pinned=arriving)
            if not arriving:
                self._idle[name] = None
        elif arriving:
            self.pin(name)
        if chunk.start == stored.end and length:
            if segment not in stored.segments:
                stored.segments.append(segment)
                if stored.pinned:
                    self._pins[segment] = self._pins.get(segment, 0) + 1
            stored.chunks.append(_ChunkPlace(segment, record, offset, chunk.start, length))
            stored.end += length

    def pin(self, name: BlobName) -> None:
        """Keep the segments of a blob that is being uploaded, until `unpin` or `finish`."""
        stored = self._blobs.get(name)
        if stored is not None:
            self._idle.pop(name, None)
            self._pin(stored, pinned=True)

    def unpin(self, name: BlobName) -> None:
        """Allow the deletion of a blob that was being uploaded, unless a message names it."""
        stored = self._blobs.get(name)
        if stored is not None and not stored.users:
            self._pin(stored, pinned=False)
            self._idle[name] = None

    def use(self, name: BlobName) -> None:
        """Pin a blob that an unfinished message names."""
        stored = self._blobs.get(name)
        if stored is not None:
            stored.users += 1
            self._idle.pop(name, None)
            self._pin(stored, pinned=True)

    def finish(self, name: BlobName) -> None:
        """Unpin a blob once every message that named it is finished."""
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
        """Return whether a segment holds a pinned blob."""
        return bool(self._pins.get(number))

    def remove_segment(self, number: int) -> None:
        """Delete a segment that is not needed, and discard its blobs.

        Raises:
            LedgerError: the file cannot be deleted.
        """
        for name in [n for n in self._idle if number in self._blobs[n].segments]:
            self._discard(name)
        self._files.close(number)
        path = segment_path(self._folder, PAYLOAD, number)
        try:
            self._disk.unlink(path)
        except OSError as error:
            raise io_error("cannot delete", error, path.name) from None
        self.usage.remove(number)

    def resume(self, name: BlobName) -> tuple[int, xxhash.xxh3_128]:
        """Return how many bytes of a blob, from its start, are stored, and their hash; pins it."""
        hasher = xxhash.xxh3_128()
        have = self.have(name)
        self.pin(name)
        for start in range(0, have, CHUNK_BYTES):
            hasher.update(self.read(name, start, min(CHUNK_BYTES, have - start)))
        return have, hasher

    def add_segment(self, number: int, *, verify: bool = False) -> None:
        """Index every chunk of a segment.

        Without ``verify``, the checksums of data are not verified.

        Raises:
            LedgerError: the file cannot be read, or is not a segment.
        """
        path = segment_path(self._folder, PAYLOAD, number)
        for found in walk(path, verify_data=verify, disk=self._disk):
            self.add_found(number, path, found)

    def add_found(self, number: int, path: Path, found: Record | DamagedRange) -> None:
        """Index the chunk of a record, or note damage; a torn tail is none."""
        if isinstance(found, DamagedRange):
            if found.fault is not DamageKind.TORN:
                self.damage.append(found.error(path))
            return
        try:
            chunk = decode_chunk(found, path)
        except LedgerDamage as error:
            self.damage.append(error)
        else:
            self.add(chunk, number, found.offset, found.data_offset, found.data_length)

    def have(self, name: BlobName) -> int:
        """Return how many bytes of a blob, from its start, are stored."""
        stored = self._blobs.get(name)
        return stored.end if stored else 0

    def expected(self, name: BlobName) -> int:
        """Return the full size of a blob in bytes; 0 if no chunk of it is stored."""
        stored = self._blobs.get(name)
        return stored.size if stored else 0

    def size_of(self, name: BlobName) -> int | None:
        """Return the size in bytes of a complete blob, or None."""
        stored = self._blobs.get(name)
        return stored.size if stored is not None and stored.end == stored.size else None

    def read(self, name: BlobName, start: int, size: int) -> Buffer:
        """Return ``size`` bytes of a blob from ``start`` on.

        Raises:
            LedgerDamage: a chunk is damaged.
            LedgerError: these bytes are not in the ledger, or cannot be read.
        """
        recent = self._recent.get((name, start))
        if recent is not None and size == memoryview(recent).nbytes:
            return recent
        stored = self._blobs.get(name)
        if stored is None or start + size > stored.end:
            raise LedgerError(f"blob {name.digest.hex()} of {name.owner} is not in the ledger")
        parts = []
        first = start
        index = bisect.bisect_right(stored.chunks, start, key=attrgetter("start")) - 1
        while size:
            chunk = stored.chunks[index]
            skip = start - chunk.start
            take = min(size, chunk.length - skip)
            parts.append(self._read_chunk(chunk)[skip : skip + take])
            start, size, index = start + take, size - take, index + 1
        found = parts[0] if len(parts) == 1 else b"".join(parts)
        self.remember(name, first, found)
        return found

    def _read_chunk(self, chunk: _ChunkPlace) -> memoryview:
        """Read a chunk with its record, because the checksum is over all of it."""
        path = segment_path(self._folder, PAYLOAD, chunk.segment)
        try:
            fd = self._files.fd(chunk.segment)
            end = chunk.offset + chunk.length
            record = read_record(self._disk, fd, path, chunk.record, end)
        except OSError as error:
            raise io_error("cannot read", error, path.name, chunk.record) from None
        return memoryview(record)[chunk.offset - chunk.record :]

    def extents(self, name: BlobName) -> tuple[Extent, ...]:
        """Return the extents of a blob in order; none if it is incomplete."""
        stored = self._blobs.get(name)
        if stored is None or stored.end < stored.size:
            return ()
        return tuple((each.segment, each.offset, each.length) for each in stored.chunks)

    def evict(self, segment: int) -> None:
        """Drop a segment's pages from the page cache, if possible: see `Disk.evict`."""
        # Failures (a deleted file, no descriptor, no thread) cost only time.
        with contextlib.suppress(LedgerError, OSError, RuntimeError):
            self._disk.evict(self._files.fd(segment))

    def close(self) -> None:
        """Close the files."""
        self._files.close_all()

    def _discard(self, name: BlobName) -> None:
        stored = self._blobs.pop(name, None)
        self._idle.pop(name, None)
        if stored is not None:
            self._pin(stored, pinned=False)
        for start in [chunk.start for chunk in stored.chunks] if stored is not None else ():
            dropped = self._recent.pop((name, start), b"")
            self._recent_bytes -= memoryview(dropped).nbytes

    def _pin(self, stored: _Stored, *, pinned: bool) -> None:
        if stored.pinned != pinned:
            stored.pinned = pinned
            for segment in stored.segments:
                self._pins[segment] = self._pins.get(segment, 0) + (1 if pinned else -1)


def read_payload(folder: Path, disk: Disk) -> BlobStore:
    """Read and verify all payload of a ledger; return its index.

    Raises:
        LedgerError: a file cannot be read, or is not a segment.
    """
    index = BlobStore(folder, disk)
    for number in segment_numbers(folder, PAYLOAD, disk):
        index.add_segment(number, verify=True)
    return index
