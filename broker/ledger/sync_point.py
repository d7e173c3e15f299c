"""The sync point: how much of a ledger is known to be on the device, under durability `power`.

After each sync, the broker notes the ends of both families' last segments in a small file, over the
older of the two notes there. Only the first note of a broker is synced itself: an older one is true
as well. When a ledger is opened, the newest note answers two questions.

- What may an earlier broker not have synced? All after the note. It is written again before it
  counts. A second sync is not enough: the kernel reports a failed write once, and the next sync
  succeeds although the device may lack the bytes.
- Which damage may be cut? Damage that begins after the note: it is the rest of a batch that was not
  acknowledged. (If a later note was lost, it may also be an acknowledged record that the device
  damaged afterwards.) Damage before the note is an error.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import xxhash

from fedmq.broker.errors import io_error
from fedmq.broker.ledger.disk import REWRITE, UPDATE, Disk
from fedmq.broker.ledger.entries import MESSAGES, PAYLOAD, segment_numbers, segment_path
from fedmq.broker.ledger.records import MAGIC, READ_ATTEMPTS, Record, read_record, walk
from fedmq.broker.ledger.segment_writer import sync_folder

SYNC_POINT_FILE = "synced"

_FORMAT = re.compile(rb"([0-9]{20}) ([0-9]{20}) ([0-9]{20}) ([0-9]{20}) ([0-9a-f]{16})\n")
_NOTE_BYTES = 101
_NOTES = 2
"""Notes in the file, written in turn: if writing one fails half-way, the other is whole."""


@dataclass(frozen=True, slots=True, order=True)
class SyncPoint:
    """Up to where both families are on the device: their last segments, and bytes in them."""

    messages: int
    messages_bytes: int
    payload: int
    payload_bytes: int

    def end(self, family: str, number: int) -> int | None:
        """Return up to which byte a segment is on the device; None for all of it."""
        last, size = (
            (self.messages, self.messages_bytes)
            if family == MESSAGES
            else (self.payload, self.payload_bytes)
        )
        return None if number < last else size if number == last else 0

    def encode(self) -> bytes:
        """Return the note: always of the same length, with a checksum."""
        text = (
            f"{self.messages:020d} {self.messages_bytes:020d} "
            f"{self.payload:020d} {self.payload_bytes:020d}"
        )
        return f"{text} {xxhash.xxh3_64_hexdigest(text.encode())}\n".encode()


def read_sync_point(folder: Path, disk: Disk) -> SyncPoint | None:
    """Return the newest whole note of a folder; None if there is none."""
    points = []
    for _ in range(READ_ATTEMPTS):
        with contextlib.suppress(OSError), disk.reader(folder / SYNC_POINT_FILE) as file:
            for match in _FORMAT.finditer(file.read()):
                point = SyncPoint(*(int(each) for each in match.groups()[:4]))
                if point.encode() == match[0]:
                    points.append(point)
        if points:
            break
    return max(points, default=None)


def remove_sync_point(folder: Path, disk: Disk) -> None:
    """Delete a folder's note, because what follows will not be synced.

    Raises:
        LedgerError: it cannot be deleted.
    """
    try:
        disk.unlink(folder / SYNC_POINT_FILE)
    except OSError as error:
        raise io_error("cannot delete", error, SYNC_POINT_FILE) from None


class SyncPointFile:
    """The notes of what is on the device.

    Args:
        folder: of the ledger.
        disk: holds the folder.

    Raises:
        LedgerError: the file cannot be opened.
    """

    def __init__(self, folder: Path, disk: Disk) -> None:
        self._disk, self._notes = disk, 0
        try:
            self._fd = disk.open(folder / SYNC_POINT_FILE, UPDATE)
        except OSError as error:
            raise io_error("cannot open", error, SYNC_POINT_FILE) from None

    def begin(self, point: SyncPoint) -> None:
        """Note that all up to this point is on the device, and sync the note.

        Without a note on the device, what a power failure leaves of the next batch would count as
        damage, and no broker would start.

        Raises:
            LedgerError: the note cannot be written, or the sync failed.
        """
        try:
            self._write(point)
            self._disk.sync(self._fd)
        except OSError as error:
            raise io_error("cannot write", error, SYNC_POINT_FILE) from None

    def advance(self, point: SyncPoint) -> None:
        """Note a later point, if possible: the earlier one is true as well."""
        with contextlib.suppress(OSError):
            self._write(point)

    def _write(self, point: SyncPoint) -> None:
        _write(self._disk, self._fd, point.encode(), self._notes % _NOTES * _NOTE_BYTES)
        self._notes += 1  # not after a failure: it would put the next one over the good one

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._disk.close(self._fd)


def sync_all(folder: Path, point: SyncPoint | None, disk: Disk) -> None:
    """Put on the device whatever an earlier broker may not have synced.

    Args:
        folder: of the ledger.
        point: up to where its segments are on the device; None if that is unknown.
        disk: holds the folder.

    Raises:
        LedgerDamage: the checksum of a record does not match.
        LedgerError: a file cannot be read or written, or a sync failed.
    """
    for family in (PAYLOAD, MESSAGES):
        for number in segment_numbers(folder, family, disk):
            start = 0 if point is None else point.end(family, number)
            if start is not None:
                write_again(segment_path(folder, family, number), start, disk)
    folder = folder.absolute()
    sync_folder(folder, disk)
    # The folder and its parents may be new as well, up to the root of their file system.
    while not os.path.ismount(folder) and os.access(folder.parent, os.R_OK):
        folder = folder.parent
        sync_folder(folder, disk)


def write_again(path: Path, start: int, disk: Disk) -> None:
    """Write the whole records of a segment from ``start`` on to the same places, and sync them.

    Args:
        path: the segment.
        start: offset of a record, or 0.
        disk: holds the segment.

    Raises:
        LedgerDamage: the checksum of a record does not match.
        LedgerError: the file cannot be read or written.
    """
    offset = start
    try:
        fd = disk.open(path, REWRITE)
        try:
            # If they are damaged, the first bytes stay as they are.
            reads = (disk.pread(fd, len(MAGIC), 0) for _ in range(READ_ATTEMPTS))
            if start < len(MAGIC) and MAGIC in reads:
                _write(disk, fd, MAGIC, 0)
            for found in walk(path, max(start, len(MAGIC)), disk=disk):
                if isinstance(found, Record):
                    offset = found.offset
                    _write(disk, fd, read_record(disk, fd, path, offset, found.end), offset)
            disk.sync(fd)
        finally:
            disk.close(fd)
    except OSError as error:
        raise io_error("cannot write again", error, path.name, offset) from None


def _write(disk: Disk, fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = disk.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
