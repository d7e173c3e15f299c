"""Append to a segment file, and set aside the bytes that are cut from it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from fedmq.broker.errors import LedgerDamage, LedgerError, io_error
from fedmq.broker.ledger.disk import APPEND, LOCAL_DISK, READ, Disk, append_all
from fedmq.broker.ledger.records import MAGIC, DamagedRange, DamageKind, Record, walk
from fedmq.broker.wire.schema import Buffer

_BLOCK = 4 << 20
"""Bytes that are copied at a time."""


class Segment:
    """One segment file open for appending.

    A new file gets the magic bytes; an existing one is cut at its last whole record.

    Args:
        path: the file.
        each: called with every existing record, in order.
        over_damage: whether to skip damaged records and leave them in place; otherwise, damage is
            an error.
        unacknowledged_from: offset from which on no record was acknowledged: damage there is set
            aside with all that follows it, unless it is skipped. None if that is not known.
        disk: holds the file.

    Attributes:
        path: the file.
        size: bytes in whole records, magic included.
        cut: bytes of the torn tail that opening has removed.
        damage: the skipped damage.

    Raises:
        LedgerDamage: the file is not a segment, or is damaged.
        LedgerError: the file cannot be read or written.
    """

    def __init__(
        self,
        path: Path,
        each: Callable[[Record], None] | None = None,
        *,
        over_damage: bool = False,
        unacknowledged_from: int | None = None,
        disk: Disk = LOCAL_DISK,
    ) -> None:
        self.path = path
        self._disk = disk
        self.cut = 0
        self._is_closed = False
        self.damage: list[DamagedRange] = []
        self._has_excess = False
        """Whether bytes of a failed write, which could not be truncated, follow after ``size``."""
        try:
            self._fd = disk.open(path, APPEND)
        except OSError as error:
            raise io_error("cannot open", error, str(path)) from None
        try:
            self._begin(each, unacknowledged_from, over_damage=over_damage)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error says more
                disk.close(self._fd)
            raise

    def _begin(
        self,
        each: Callable[[Record], None] | None,
        unacknowledged_from: int | None,
        *,
        over_damage: bool,
    ) -> None:
        """Find the end of the last whole record, and truncate the file there."""
        self.size = 0
        length = self._length()
        tail: DamagedRange | None = None
        if length >= len(MAGIC):
            self.size = len(MAGIC)
            try:
                for found in walk(self.path, resync=over_damage, disk=self._disk):
                    if isinstance(found, Record):
                        if each is not None:
                            each(found)
                    elif found.fault is DamageKind.TORN or (
                        not over_damage
                        and unacknowledged_from is not None
                        and found.offset >= unacknowledged_from
                    ):
                        tail = found
                        break
                    elif over_damage:
                        self.damage.append(found)
                    else:
                        raise found.error(self.path)
                    self.size = found.end
            except LedgerDamage as error:
                if unacknowledged_from != 0 or error.offset != 0:
                    raise
                # Without its first bytes, the whole file is the rest of a batch.
                tail = DamagedRange(DamageKind.FORMAT, 0, length)
        if tail is not None and tail.offset < len(MAGIC):
            self.size = 0
        self.cut = length - self.size
        if self.cut:
            if tail is not None and (tail.full_length or tail.fault is not DamageKind.TORN):
                set_aside(self.path, tail.offset, length, self._disk)
            self._truncate()
        if not self.size:
            self._write([MAGIC])

    def append(self, buffers: Sequence[Buffer]) -> None:
        """Write whole records; an error leaves the segment unchanged.

        Raises:
            NoSpace: the disk is full.
            LedgerError: the operating system refused the write.
        """
        self._write(buffers)

    def sync(self) -> None:
        """Wait until everything appended is on the device.

        Raises:
            LedgerError: the sync failed. Whether the data are on the device cannot be found
                out: the kernel reports a failed write once, and may have dropped the data.
        """
        try:
            self._disk.sync(self._fd)
        except OSError as error:
            reason = f"cannot sync: {error.strerror}"
            raise LedgerError(reason, self.path.name, self.size) from None

    def close(self) -> None:
        """Close the file, once.

        Raises:
            LedgerError: the operating system reports that a write has failed.
        """
        if self._is_closed:
            return
        self._is_closed = True  # also if closing fails: the number may be another file's then
        try:
            self._disk.close(self._fd)
        except OSError as error:
            raise io_error("cannot close", error, self.path.name, self.size) from None

    def _length(self) -> int:
        try:
            return self._disk.size(self._fd)
        except OSError as error:
            raise io_error("cannot read", error, self.path.name) from None

    def _truncate(self) -> None:
        """Truncate the file after the last whole record."""
        try:
            self._disk.truncate(self._fd, self.size)
        except OSError as error:
            raise io_error("cannot cut", error, self.path.name, self.size) from None
        self._has_excess = False

    def _write(self, buffers: Sequence[Buffer]) -> None:
        if self._has_excess:
            self._truncate()
        try:
            self.size += append_all(self._disk, self._fd, buffers)
        except OSError as error:
            self._has_excess = True
            with contextlib.suppress(LedgerError):  # tried again before the next write
                self._truncate()
            raise io_error("cannot write", error, self.path.name, self.size) from None


def set_aside(path: Path, start: int, end: int, disk: Disk = LOCAL_DISK) -> Path:
    """Copy bytes that will be cut from a segment to a file beside it; return that file.

    Raises:
        LedgerError: the bytes cannot be read, or the copy cannot be written.
    """
    copy = unused_name(path, f"cut-{start}")
    try:
        fd = disk.open(copy, APPEND)
        try:
            with disk.reader(path) as source:
                for block in blocks(source, start, end):
                    append_all(disk, fd, [block])
            disk.sync(fd)
        finally:
            disk.close(fd)
    except OSError as error:
        raise io_error(f"cannot copy to {copy.name}", error, path.name, start) from None
    return copy


def blocks(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """Yield the bytes of a file from ``start`` to ``end``, or to its end, in large blocks."""
    file.seek(start)
    while start < end and (block := file.read(min(_BLOCK, end - start))):
        yield block
        start += len(block)


def unused_name(path: Path, suffix: str) -> Path:
    """Return an unused path beside a file, with a suffix."""
    unused, number = path.with_name(f"{path.name}.{suffix}"), 1
    while unused.exists():
        number += 1
        unused = path.with_name(f"{path.name}.{suffix}-{number}")
    return unused


def sync_folder(folder: Path, disk: Disk = LOCAL_DISK) -> None:
    """Wait until the names of a folder's files are on the device.

    Raises:
        LedgerError: the sync failed.
    """
    try:
        fd = disk.open(folder, READ)
        try:
            disk.sync(fd)
        finally:
            disk.close(fd)
    except OSError as error:
        # Not NoSpace: a failed sync must not be retried.
        raise LedgerError(f"cannot sync {folder}: {error.strerror}") from None
