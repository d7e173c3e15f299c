"""Write the ledger: the ordered, append-only record of everything that a broker accepted.

Its folder has two families of segments: entries, numbered from 0 without gaps, and chunks of blobs,
each blob stored once. A message is written after all of its blobs. So messages can be kept for ever
while payload is deleted, the upload of a large blob resumes after a crash from the stored chunks,
and a reader can follow the tail.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

from fedmq.broker.errors import LedgerDamage, LedgerError, NoSpace
from fedmq.broker.ledger.blob_store import BlobStore
from fedmq.broker.ledger.disk import LOCAL_DISK, Disk
from fedmq.broker.ledger.entries import (
    MESSAGES,
    PAYLOAD,
    Accepted,
    AnyEntry,
    BlobName,
    ChunkRecord,
    Consumed,
    Ended,
    Entry,
    encode_record,
    segment_numbers,
    segment_path,
)
from fedmq.broker.ledger.lock import FolderLock
from fedmq.broker.ledger.manifest import Manifest, check_segments, payload_is_gone
from fedmq.broker.ledger.reader import EntryIndex, LedgerTail
from fedmq.broker.ledger.records import pack
from fedmq.broker.ledger.retention import RetentionPolicy
from fedmq.broker.ledger.segment_writer import Segment, sync_folder
from fedmq.broker.ledger.sync_point import (
    SyncPoint,
    SyncPointFile,
    read_sync_point,
    remove_sync_point,
    sync_all,
)
from fedmq.broker.settings import EVERYTHING, Durability, Retained
from fedmq.broker.wire.schema import Buffer, Extent

_MESSAGES_SEGMENT_BYTES = 64 << 20
_PAYLOAD_SEGMENT_BYTES = 128 << 20
_CACHED_SEGMENTS = 2
_RECENT_BYTES = 4 << 20


class Ledger:
    """The ledger of one broker, open for appending by a single writer.

    Appends are queued, and written together by `commit`, payload before messages.

    Args:
        folder: of the ledger; created if it does not exist.
        each: called with every existing entry, in order.
        retain_bytes: full payload segments that no unfinished message needs are deleted,
            oldest first, while all of them together are larger; `EVERYTHING` deletes none;
            `HEADERS` is as 0, and deletes at the end of a run also the segment being filled.
        durability: what a committed entry survives: see `LedgerSettings`.
        disk: holds the folder.

    Attributes:
        next_seq: number of the next entry.
        cut_bytes: bytes of torn tails that opening has removed.
        damage: see `BlobStore`.
        proof: see `FolderLock`.

    Raises:
        LedgerDamage: the entries are damaged, or a segment is missing.
        LedgerError: the folder cannot be read or written, or another broker writes to it.
    """

    def __init__(
        self,
        folder: Path,
        each: Callable[[AnyEntry], None] | None = None,
        *,
        retain_bytes: Retained = EVERYTHING,
        durability: Durability = "process",
        disk: Disk = LOCAL_DISK,
    ) -> None:
        self.folder = folder
        self._disk = disk
        self.next_seq = 0
        self.cut_bytes = 0
        try:
            disk.make_folder(folder)
        except OSError as error:
            raise LedgerError(f"cannot create {folder}: {error.strerror}") from None
        self._retention = RetentionPolicy(folder, retain_bytes, disk)
        self.payload = BlobStore(folder, disk)
        self.damage = self.payload.damage
        self._messages: list[Buffer] = []
        self._first_queued = 0
        self._chunks: list[Buffer] = []
        self._entries = EntryIndex(folder, disk)
        self._positions: list[tuple[int, int]] = []
        self._recent: OrderedDict[int, Accepted] = OrderedDict()
        self._recent_bytes = 0
        self._unsynced_payload = False
        self._unlisted: list[tuple[str, int]] = []
        """New segments, by family and number, that the manifest does not have yet."""
        self._failed_sync: LedgerError | None = None
        """After a failed sync, it is unknown what is on the device."""
        self._uses: dict[int, tuple[BlobName, ...]] = {}
        with contextlib.ExitStack() as opened:
            opened.callback(self.payload.close)
            self._lock = FolderLock(folder, disk)
            opened.callback(self._lock.release)
            self.proof = self._lock.proof
            self._manifest = Manifest(folder, disk)
            check_segments(folder, self._manifest, disk)
            point = read_sync_point(folder, disk)
            self._messages_number, self._messages_file = self._open_last(MESSAGES, point)
            opened.callback(self._messages_file.close)
            if payload_is_gone(folder, disk):
                self.damage.append(LedgerDamage(f"there is no payload-*.log in {folder}"))
            for number in segment_numbers(folder, PAYLOAD, disk)[:-1]:
                self.payload.add_segment(number)
            self._payload_number, self._payload_file = self._open_last(PAYLOAD, point)
            opened.callback(self._payload_file.close)
            self._chunk_end = self._payload_file.size
            self._sync_point = SyncPointFile(folder, disk) if durability == "power" else None
            if self._sync_point is None:
                # What is acknowledged from now on may not be on the device.
                remove_sync_point(folder, disk)
            else:
                opened.callback(self._sync_point.close)
                sync_all(folder, point, disk)
                self._sync_point.begin(self._end())
            # A line that is on the device must not name a segment that is not.
            self._manifest.begin()
            tail = LedgerTail(folder, disk)
            for entry in tail.poll():
                self._entries.add(entry.seq, *tail.at)
                self.next_seq = entry.seq + 1
                if each is not None:
                    each(entry)
            opened.pop_all()

    def _open_last(self, family: str, point: SyncPoint | None) -> tuple[int, Segment]:
        """Open the last segment of a family for appending; return its number as well."""
        numbers = segment_numbers(self.folder, family, self._disk)
        number = numbers[-1] if numbers else 0
        path = segment_path(self.folder, family, number)
        index = functools.partial(self.payload.add_found, number, path)
        segment = Segment(
            path,
            index if family == PAYLOAD else None,
            unacknowledged_from=point.end(family, number) if point else None,
            disk=self._disk,
        )
        self.cut_bytes += segment.cut
        return number, segment

    def append(self, entry: Entry) -> None:
        """Queue an entry; its number must be the next one."""
        if entry.seq != self.next_seq:
            raise LedgerError(f"expected entry {self.next_seq}, got {entry.seq}")
        if not self._messages:
            self._first_queued = entry.seq
        record = pack(encode_record(entry))
        self._messages.append(record)
        match entry:
            case Accepted(consumes=consumes):
                self._recent[entry.seq] = entry
                self._recent_bytes += len(entry.message)
                self._finish(consumes)
            case Consumed(of=of):
                self._finish(of)
            case Ended(run=run):
                self._finish([seq for seq, names in self._uses.items() if names[0].run == run])
                self._retention.end_run()
        self._positions.append((entry.seq, len(record)))
        self.next_seq += 1

    def use(self, seq: int, names: Sequence[BlobName], *, kept: bool = True) -> None:
        """Keep blobs until the message ``seq`` that names them is consumed.

        If it is not ``kept``, they may be deleted at once.
        """
        if names:
            self._uses[seq] = tuple(names)
            for name in names:
                self.payload.use(name)
            if not kept:
                self._finish((seq,))

    def read(self, seq: int) -> Accepted:
        """Return an accepted message by its number, written or queued.

        Raises:
            LedgerError: there is no message with this number.
        """
        entry = self._recent.get(seq) or self._entries.read(seq)
        if not isinstance(entry, Accepted):
            raise LedgerError(f"entry {seq} is not a message")
        return entry

    def size_of(self, name: BlobName) -> int | None:
        """Return the size in bytes of a complete blob, or None."""
        return self.payload.size_of(name)

    def used(self, run: str, owner: str) -> tuple[int, int]:
        """Return the bytes of an owner's blobs on the disk, and those of its run."""
        return self.payload.usage.of(run, owner)

    def extents(self, name: BlobName) -> tuple[Extent, ...]:
        """Return the extents of a blob in the files; none if not all of it is written."""
        extents = self.payload.extents(name)
        if extents and extents[-1][0] == self._payload_number:
            _, offset, length = extents[-1]
            if offset + length > self._payload_file.size:
                return ()
        return extents

    def have(self, name: BlobName) -> int:
        """Return how many bytes of a blob, from its start, are stored."""
        return self.payload.have(name)

    def resume(self, name: BlobName, size: int) -> tuple[int, xxhash.xxh3_128]:
        """Return how many bytes of a blob, from its start, are stored, and their hash."""
        if self.payload.expected(name) not in (0, size):
            self.discard(name, self.payload.expected(name))
        try:
            if self._chunks and self.payload.have(name):
                self._write_chunks()  # unwritten chunks cannot be read back and hashed
            return self.payload.resume(name)
        except LedgerError:
            self.discard(name, self.payload.expected(name))
            return self.payload.resume(name)

    def unpin(self, names: Sequence[BlobName]) -> None:
        """Stop keeping blobs whose message will not be accepted now."""
        for name in names:
            self.payload.unpin(name)

    def put(self, name: BlobName, size: int, start: int, data: Buffer) -> None:
        """Queue a chunk of a blob of ``size`` bytes; ``data`` must not change before `commit`."""
        chunk = ChunkRecord(name.run, name.owner, name.digest, size, start)
        record = pack(encode_record(chunk), data)
        length = memoryview(data).nbytes
        self._chunks.append(record)
        if length:
            self._chunks.append(data)
        begin, data_begin = self._chunk_end, self._chunk_end + len(record)
        self._chunk_end = data_begin + length
        self.payload.add(chunk, self._payload_number, begin, data_begin, length, arriving=True)
        if length:
            self.payload.remember(name, start, data)

    def discard(self, name: BlobName, size: int) -> None:
        """Queue a record that discards the chunks of a blob so far."""
        self.put(name, size, 0, b"")

    def commit(self) -> None:
        """Write everything that is queued; under durability ``power``, wait for the device as well.

        Raises:
            NoSpace: the disk is full; the queue is kept.
            LedgerError: the operating system refused the write, or a sync has failed, now or
                earlier.
        """
        if self._failed_sync is not None:
            raise self._failed_sync
        if self._chunks:
            self._write_chunks()
        if self._messages and self._messages_file.size > _MESSAGES_SEGMENT_BYTES:
            self._next_messages_segment()
        if self._unlisted:
            self._list_segments()
        if self._sync_point is not None and self._unsynced_payload:
            # Before the messages, so that a message on the device has its blobs there.
            self._sync(self._payload_file.sync)
            self._unsynced_payload = False
        if self._messages:
            self._write_messages()
            if self._sync_point is not None:
                self._sync(self._messages_file.sync)
                self._sync_point.advance(self._end())
        if self._payload_file.size > self._retention.segment_bytes(_PAYLOAD_SEGMENT_BYTES):
            self._next_payload_segment()
        elif self._retention.must_delete:
            self._retention.apply(self.payload.needs_segment, self._delete)

    def _sync(self, wait: Callable[[], None]) -> None:
        try:
            wait()
        except LedgerError as error:
            self._failed_sync = error
            raise

    def _end(self) -> SyncPoint:
        """Return the end of what is written."""
        messages, payload = self._messages_file, self._payload_file
        return SyncPoint(self._messages_number, messages.size, self._payload_number, payload.size)

    def _list_segments(self) -> None:
        """List new segments in the manifest; under `power`, once their names are on the device."""
        if self._sync_point is not None:
            self._sync(lambda: sync_folder(self.folder, self._disk))
        for family, number in self._unlisted:
            self._manifest.add(family, number)
        self._unlisted.clear()

    def _write_chunks(self) -> None:
        self._payload_file.append(self._chunks)
        self._chunks = []
        self._unsynced_payload = True

    def _write_messages(self) -> None:
        offset = self._messages_file.size
        self._messages_file.append([b"".join(self._messages)])
        self._messages = []
        for seq, length in self._positions:
            self._entries.add(seq, self._messages_number, offset)
            offset += length
        self._positions.clear()
        while self._recent_bytes > _RECENT_BYTES:
            _, dropped = self._recent.popitem(last=False)
            self._recent_bytes -= len(dropped.message)

    def _next_messages_segment(self) -> None:
        full, number = self._messages_file, self._first_queued
        self._messages_file, self._messages_number = self._begin(MESSAGES, number), number
        full.close()

    def _next_payload_segment(self) -> None:
        full, number = self._payload_file, self._payload_number + 1
        try:
            self._payload_file = self._begin(PAYLOAD, number)
        except NoSpace:
            return  # the present segment grows until there is space
        self._unsynced_payload = True  # its first bytes: the next note of what is synced names it
        for old in (number - 1, number - 1 - _CACHED_SEGMENTS):
            if old >= 0:
                self.payload.evict(old)
        self._payload_number, self._chunk_end = number, self._payload_file.size
        full.close()
        self._retention.apply(self.payload.needs_segment, self._delete)

    def close(self) -> None:
        """Write what is queued and close the files.

        Raises:
            LedgerError: not everything could be written; the files are closed nevertheless.
        """
        with self._closing():
            self.commit()

    def abandon(self) -> None:
        """Close the files; what is queued is lost."""
        with contextlib.suppress(LedgerError), self._closing():
            pass

    def _closing(self) -> contextlib.ExitStack:
        """Return a context that closes all files at its end."""
        last = contextlib.ExitStack()
        last.callback(self._lock.release)
        last.callback(self.payload.close)
        if self._sync_point is not None:
            last.callback(self._sync_point.close)
        # A commit may replace these files.
        last.callback(lambda: self._messages_file.close())
        last.callback(lambda: self._payload_file.close())
        return last

    def _finish(self, seqs: Sequence[int]) -> None:
        for seq in seqs if self._uses else ():
            for name in self._uses.pop(seq, ()):
                self.payload.finish(name)

    def _delete(self, number: int) -> bool:
        """Delete a payload segment; return whether there was space for the note of that."""
        if not self._manifest.remove(PAYLOAD, number):
            return False
        self.payload.remove_segment(number)
        return True

    def _begin(self, family: str, number: int) -> Segment:
        segment = Segment(segment_path(self.folder, family, number), disk=self._disk)
        self._unlisted.append((family, number))
        if self._sync_point is None:
            self._list_segments()
        return segment
