"""Records in segment files: length-prefixed, checksummed, append-only.

A segment starts with 16 bytes, ``FEDMQLOG`` and the format version. A record is::

    head length  u32 LE
    data length  u32 LE
    check        u32 LE    XXH32 over both lengths
    checksum     u64 LE    XXH3-64 over head and data
    head         a msgpack map
    data         raw bytes, possibly none

A crash can cut the last record short, or leave blocks of zeros behind it: a *torn tail*,
which is cut off when the segment is opened for writing. A bad record that others follow
is *damage*, and is reported with segment and offset, never skipped. (The lengths have a
check of their own, so that a damaged length is not taken for a record that was cut short.)
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from fedmq.broker.errors import LedgerError
from fedmq.broker.wire import CHUNK_BYTES, MAX_HEADER_BYTES, Buffer

MAGIC = b"FEDMQLOG" + struct.pack("<II", 1, 0)
_PREFIX = struct.Struct("<IIIQ")
_LENGTHS = struct.Struct("<II")
# A head holds a whole message plus a few fields of the ledger's own.
_MAX_HEAD = 2 * MAX_HEADER_BYTES
_MAX_DATA = CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class Record:
    """Where a record lies and what its head says; its data are read when wanted."""

    offset: int
    head: bytes
    data_offset: int
    data_length: int

    @property
    def end(self) -> int:
        """Return the offset of the byte after this record."""
        return self.data_offset + self.data_length


def pack(head: bytes, data: Buffer = b"") -> bytes:
    """Return all of a record that stands before its data.

    Raises:
        LedgerError: the head is larger than `scan` would read.
    """
    if len(head) > _MAX_HEAD:
        raise LedgerError(f"expected a head of at most {_MAX_HEAD} bytes, got {len(head)}")
    length = memoryview(data).nbytes
    check = xxhash.xxh32_intdigest(_LENGTHS.pack(len(head), length))
    return _PREFIX.pack(len(head), length, check, _checksum(head, data)) + head


def scan(path: Path, start: int = len(MAGIC), *, verify_data: bool = True) -> Iterator[Record]:
    """Yield the whole records of a segment from byte ``start`` on, then stop.

    It stops without an error at a torn tail; `Record.end` of the last one says where.
    Without ``verify_data``, records that carry data are taken by their lengths alone,
    which is how an index is built without reading every payload.

    Raises:
        LedgerError: not a segment, or a bad record that is not the torn tail.
    """
    try:
        opened = path.open("rb", buffering=1 << 16)
    except OSError as error:
        raise LedgerError(f"cannot open: {error.strerror}", path.name) from None
    with opened as file:
        size = os.fstat(file.fileno()).st_size
        magic = file.read(len(MAGIC))
        if magic != MAGIC[: len(magic)]:
            raise LedgerError("not a ledger segment of this format", path.name, 0)
        offset = max(start, len(MAGIC))
        file.seek(offset)
        while offset + _PREFIX.size <= size:
            prefix = file.read(_PREFIX.size)
            if len(prefix) < _PREFIX.size:
                return  # a writer took back what it could not write whole
            head_length, data_length, check, checksum = _PREFIX.unpack(prefix)
            if check != xxhash.xxh32_intdigest(_LENGTHS.pack(head_length, data_length)) or not (
                0 < head_length <= _MAX_HEAD and data_length <= _MAX_DATA
            ):
                if _is_zero(path, offset, size):
                    return
                raise LedgerError("damaged record: its lengths are wrong", path.name, offset)
            end = offset + _PREFIX.size + head_length + data_length
            if end > size:
                return
            head = file.read(head_length)
            data_offset = offset + _PREFIX.size + head_length
            if data_length and not verify_data:
                file.seek(data_length, os.SEEK_CUR)
            elif _checksum(head, file.read(data_length)) != checksum:
                if end == size or _is_zero(path, end, size):
                    return
                raise LedgerError("damaged record: its checksum does not match", path.name, offset)
            yield Record(offset, head, data_offset, data_length)
            offset = end


class Segment:
    """One segment file open for appending.

    A new file gets the magic bytes; an existing one is cut at its last whole record.

    Attributes:
        path: the file.
        size: bytes in whole records, magic included.
        cut: bytes of torn tail that opening removed.

    Raises:
        LedgerError: the file is no segment, is damaged, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cut = 0
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            found = os.fstat(self._fd).st_size
        except OSError as error:
            raise LedgerError(f"cannot open: {error.strerror}", str(path)) from None
        try:
            self._begin(found)
        except LedgerError:
            os.close(self._fd)
            raise

    def _begin(self, found: int) -> None:
        """Find the end of the last whole record, and cut what is behind it."""
        if found < len(MAGIC):
            if found:
                os.ftruncate(self._fd, 0)
            self.size = 0
            self._write([MAGIC])
            return
        self.size = len(MAGIC)
        for record in scan(self.path):
            self.size = record.end
        self.cut = found - self.size
        if self.cut:
            os.ftruncate(self._fd, self.size)

    def append(self, buffers: Sequence[Buffer]) -> None:
        """Write whole records; after an error the segment is as it was before.

        Raises:
            LedgerError: the operating system refused the write, for example a full disk.
        """
        self._write(buffers)

    def sync(self) -> None:
        """Wait until everything appended is on the device.

        Raises:
            LedgerError: the device did not take it.
        """
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise LedgerError(f"cannot sync: {error.strerror}", self.path.name) from None

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _write(self, buffers: Sequence[Buffer]) -> None:
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
            os.ftruncate(self._fd, self.size)
            raise LedgerError(
                f"cannot write: {error.strerror}", self.path.name, self.size
            ) from None
        self.size += total


def _checksum(head: bytes, data: Buffer) -> int:
    if not data:
        return xxhash.xxh3_64_intdigest(head)
    hasher = xxhash.xxh3_64(head)
    hasher.update(data)
    return int(hasher.intdigest())


def _is_zero(path: Path, start: int, end: int) -> bool:
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            piece = file.read(min(1 << 16, end - start))
            if piece.strip(b"\0"):
                return False
            start += len(piece)
    return True
