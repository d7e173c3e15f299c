"""Read a ledger's entries: in order as they are appended, or one by its number."""

from __future__ import annotations

import bisect
import os
from array import array
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from fedmq.broker.errors import LedgerDamage, LedgerError, io_error
from fedmq.broker.ledger.disk import LOCAL_DISK, Disk
from fedmq.broker.ledger.entries import (
    MESSAGES,
    AnyEntry,
    decode_entries,
    segment_numbers,
    segment_path,
)
from fedmq.broker.ledger.records import MAGIC, scan

TornTail = tuple[str, int, int]
"""(file name, offset, size) of the bytes after the last whole record of a segment."""
_BLOCK = 64
"""Entries per offset that is kept in memory; a reader scans to the others from there."""


def read_entries(folder: Path, disk: Disk = LOCAL_DISK) -> Iterator[AnyEntry]:
    """Yield the entries of a ledger in order; stops at a torn tail.

    Raises:
        LedgerError: a damaged record, or a missing number; with segment and offset.
    """
    yield from LedgerTail(folder, disk).poll()


class LedgerTail:
    """Reads entries as they are appended; keeps its position between calls.

    Attributes:
        at: (segment, offset) of the record of the entry that `poll` yielded last.
    """

    def __init__(self, folder: Path, disk: Disk = LOCAL_DISK) -> None:
        self._folder, self._disk = folder, disk
        self._first: int | None = None
        self._offset = len(MAGIC)
        self._next_seq = 0
        self._unread: deque[AnyEntry] = deque()
        """Entries of the record at ``at`` that were not yielded yet."""
        self.at = (0, 0)

    def poll(self) -> Iterator[AnyEntry]:
        """Yield the entries that have been appended since the last call.

        Raises:
            LedgerError: as `read_entries`.
        """
        yield from self._take()
        for first in segment_numbers(self._folder, MESSAGES, self._disk):
            if self._first is not None and first < self._first:
                continue
            if first != self._first:
                self._enter(first)
            path = segment_path(self._folder, MESSAGES, first)
            for record in scan(path, self._offset, disk=self._disk):
                entries = decode_entries(record, path)
                if entries[0].seq != self._next_seq:
                    raise LedgerDamage(
                        f"expected entry {self._next_seq}, got {entries[0].seq}",
                        path.name,
                        record.offset,
                    )
                self._next_seq += len(entries)
                self._offset = record.end
                self.at = (first, record.offset)
                self._unread.extend(entries)
                yield from self._take()

    def _take(self) -> Iterator[AnyEntry]:
        while self._unread:
            yield self._unread.popleft()

    def torn(self) -> TornTail | None:
        """Return the bytes after the last whole record, or None."""
        if self._first is None:
            return None
        path = segment_path(self._folder, MESSAGES, self._first)
        return tail_of(path, self._offset, self._disk)

    def _enter(self, first: int) -> None:
        """Continue with a segment, which is named by its first entry.

        The segment before it was whole when this one was begun: if it ends early, it is damaged.
        """
        expected = self._next_seq
        if first != expected:
            reason = f"expected entry {expected}, got {first}"
            if first < expected:
                raise LedgerDamage(reason, segment_path(self._folder, MESSAGES, first).name)
            reason += f": {first - expected} entries are missing"
            path = segment_path(self._folder, MESSAGES, self._first or 0)
            if self._first is None:
                raise LedgerDamage(reason, path.name)
            tail = tail_of(path, self._offset, self._disk)
            raise LedgerDamage(reason, path.name, tail[1] if tail else self._offset)
        self._first, self._offset = first, len(MAGIC)


def tail_of(path: Path, end: int, disk: Disk = LOCAL_DISK) -> TornTail | None:
    """Return the bytes of a segment after ``end``, the end of its last whole record; or None.

    All of a file that does not begin like a segment (too short, or zeros) is its tail.

    Raises:
        LedgerError: the file cannot be read.
    """
    try:
        with disk.reader(path) as file:
            begun = file.read(len(MAGIC)) == MAGIC
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise io_error("cannot open", error, path.name) from None
    if not begun:
        return path.name, 0, size
    return (path.name, end, size - end) if size > end else None


class EntryIndex:
    """Finds an entry by its number, with a few bytes of memory for many entries on disk."""

    def __init__(self, folder: Path, disk: Disk = LOCAL_DISK) -> None:
        self._folder, self._disk = folder, disk
        self._firsts: list[int] = []
        self._offsets: dict[int, array[int]] = {}
        self._block: list[AnyEntry] = []

    def add(self, seq: int, segment: int, offset: int) -> None:
        """Index an entry by the offset of its record; entries come in order."""
        if segment not in self._offsets:
            self._firsts.append(segment)
            self._offsets[segment] = array("Q")
        offsets = self._offsets[segment]
        if (seq - segment) // _BLOCK == len(offsets):
            offsets.append(offset)

    def read(self, seq: int) -> AnyEntry:
        """Return an entry that is on disk.

        Raises:
            LedgerError: there is none with this number, or it cannot be read.
        """
        if not (self._block and self._block[0].seq <= seq <= self._block[-1].seq):
            self._block = self._read_block(seq)
        found = seq - self._block[0].seq if self._block else 0
        if not 0 <= found < len(self._block):
            raise LedgerError(f"entry {seq} is not in the ledger")
        return self._block[found]

    def _read_block(self, seq: int) -> list[AnyEntry]:
        index = bisect.bisect_right(self._firsts, seq) - 1
        if index < 0:
            return []
        segment = self._firsts[index]
        offsets, number = self._offsets[segment], (seq - segment) // _BLOCK
        if number >= len(offsets):
            return []
        path = segment_path(self._folder, MESSAGES, segment)
        block: list[AnyEntry] = []
        try:
            for record in scan(path, offsets[number], disk=self._disk):
                block += decode_entries(record, path)
                if block[-1].seq - segment >= (number + 1) * _BLOCK - 1:
                    break
        except LedgerError:
            # Damage does not affect the entries before it.
            if not (block and seq <= block[-1].seq):
                raise
        return block
