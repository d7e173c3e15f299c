"""Append to a segment file, and set aside the bytes that are cut from it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from fedmq.broker.errors import LedgerError, io_error
from fedmq.broker.ledger.records import MAGIC, DamagedRange, DamageKind, Record, walk
from fedmq.broker.wire.schema import Buffer

_BLOCK = 4 << 20
"""Bytes copied at a time."""


class Segment:
    """One segment file open for appending.

    A new file gets the magic bytes; an existing one is cut at its last whole record.

    Args:
        path: the file.
        each: called with every existing record, in order.
        over_damage: whether to skip damaged records and leave them in place; otherwise, damage is
            an error.

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
    ) -> None:
        self.path = path
        self.cut = 0
        self.damage: list[DamagedRange] = []
        self._has_excess = False
        """Whether bytes of a failed write, which could not be truncated, follow after ``size``."""
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise io_error("cannot open", error, str(path)) from None
        try:
            self._begin(each, over_damage=over_damage)
        except BaseException:
            os.close(self._fd)
            raise

    def _begin(self, each: Callable[[Record], None] | None, *, over_damage: bool) -> None:
        """Find the end of the last whole record, and truncate the file there."""
        self.size = 0
        tail: DamagedRange | None = None
        if self._length() >= len(MAGIC):
            self.size = len(MAGIC)
            for found in walk(self.path, resync=over_damage):
                if isinstance(found, Record):
                    if each is not None:
                        each(found)
                elif found.fault is DamageKind.TORN:
                    tail = found
                    break
                elif over_damage:
                    self.damage.append(found)
                else:
                    raise found.error(self.path)
                self.size = found.end
        if tail is not None and tail.offset < len(MAGIC):
            self.size = 0
        self.cut = self._length() - self.size
        if self.cut:
            if tail is not None and tail.full_length:
                set_aside(self.path, tail.offset, tail.end)
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
            os.fsync(self._fd)
        except OSError as error:
            reason = f"cannot sync: {error.strerror}"
            raise LedgerError(reason, self.path.name, self.size) from None

    def close(self) -> None:
        """Close the file.

        Raises:
            LedgerError: the operating system reports that a write has failed.
        """
        try:
            os.close(self._fd)
        except OSError as error:
            raise io_error("cannot close", error, self.path.name, self.size) from None

    def _length(self) -> int:
        try:
            return os.fstat(self._fd).st_size
        except OSError as error:
            raise io_error("cannot read", error, self.path.name) from None

    def _truncate(self) -> None:
        """Truncate the file after the last whole record."""
        try:
            os.ftruncate(self._fd, self.size)
        except OSError as error:
            raise io_error("cannot cut", error, self.path.name, self.size) from None
        self._has_excess = False

    def _write(self, buffers: Sequence[Buffer]) -> None:
        if self._has_excess:
            self._truncate()
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        total = 0
        try:
            while views:
                written = os.writev(self._fd, views[:512])
                total += written
                while views and written >= views[0].nbytes:
                    written -= views.pop(0).nbytes
                if written:
                    views[0] = views[0][written:]
        except OSError as error:
            self._has_excess = True
            with contextlib.suppress(LedgerError):  # tried again before the next write
                self._truncate()
            raise io_error("cannot write", error, self.path.name, self.size) from None
        self.size += total


def set_aside(path: Path, start: int, end: int) -> Path:
    """Copy bytes that will be cut from a segment to a file beside it; return that file.

    Raises:
        LedgerError: the bytes cannot be read, or the copy cannot be written.
    """
    copy = unused_name(path, f"cut-{start}")
    try:
        with path.open("rb") as source, copy.open("xb") as target:
            copy_bytes(source, target, start, end)
            target.flush()
            os.fsync(target.fileno())
    except OSError as error:
        raise io_error(f"cannot copy to {copy.name}", error, path.name, start) from None
    return copy


def copy_bytes(source: BinaryIO, target: BinaryIO, start: int, end: int) -> None:
    """Append the bytes of one file from ``start`` to ``end`` to another; fewer at its end."""
    source.seek(start)
    while start < end and (block := source.read(min(_BLOCK, end - start))):
        target.write(block)
        start += len(block)


def unused_name(path: Path, suffix: str) -> Path:
    """Return an unused path beside a file, with a suffix."""
    unused, number = path.with_name(f"{path.name}.{suffix}"), 1
    while unused.exists():
        number += 1
        unused = path.with_name(f"{path.name}.{suffix}-{number}")
    return unused


def sync_folder(folder: Path) -> None:
    """Wait until the names of a folder's files are on the device.

    Raises:
        LedgerError: the sync failed.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        # Not NoSpace: a failed sync must not be retried.
        raise LedgerError(f"cannot sync {folder}: {error.strerror}") from None
