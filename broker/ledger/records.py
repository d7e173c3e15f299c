"""Records in segment files: length-prefixed, checksummed, append-only.

A segment starts with 16 bytes, ``FEDMQLOG`` and the format version. A record is::

    head length  u32 LE
    data length  u32 LE
    check        u32 LE    XXH32 over both lengths
    checksum     u64 LE    XXH3-64 over head and data
    head         a msgpack map
    data         raw bytes, possibly none

A crash can truncate the last record, or leave zeros from within it to the end of the file: a *torn
tail*, which is removed when the segment is opened for writing. An invalid record that others follow
is *damage*, and is reported with segment and offset. (The lengths have a checksum of their own, so
that a damaged length is not mistaken for a truncated record.) `scan` stops there; `walk` finds the
next whole record after it.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import xxhash

from fedmq.broker.errors import LedgerDamage, LedgerError, io_error
from fedmq.broker.ledger.disk import LOCAL_DISK, Disk
from fedmq.broker.wire.schema import CHUNK_BYTES, MAX_HEADER_BYTES, Buffer

MAGIC = b"FEDMQLOG" + struct.pack("<II", 1, 0)
_PREFIX = struct.Struct("<IIIQ")
_LENGTHS = struct.Struct("<II")
# A head holds a whole message and a few fields of the ledger.
_MAX_HEAD = 2 * MAX_HEADER_BYTES
_MAX_DATA = CHUNK_BYTES
_BLOCK = 1 << 20
"""Bytes that are read at a time while searching for the next record."""
READ_ATTEMPTS = 3
"""Bytes that are invalid are read again before they count as damaged: the error may be one of
reading."""
_SECTOR = 512
"""A device writes this many bytes as a whole, or not at all."""

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class Record:
    """The position and the head of a record; the data are not read."""

    offset: int
    head: bytes
    data_offset: int
    data_length: int

    @property
    def end(self) -> int:
        """Return the offset of the byte after this record."""
        return self.data_offset + self.data_length


def pack(head: bytes, data: Buffer = b"") -> bytes:
    """Return the bytes of a record up to its data: lengths, checksums and head.

    Raises:
        LedgerError: the head is larger than the limit of readers.
    """
    if len(head) > _MAX_HEAD:
        raise LedgerError(f"expected a head of at most {_MAX_HEAD} bytes, got {len(head)}")
    length = memoryview(data).nbytes if data else 0
    check = xxhash.xxh32_intdigest(_LENGTHS.pack(len(head), length))
    return _PREFIX.pack(len(head), length, check, _checksum(head, data)) + head


class DamageKind(StrEnum):
    """What is wrong with bytes that are not a valid record."""

    TORN = "torn"
    """The end of a segment after a crash: a truncated record, or zeros to the end."""
    LAST = "last"
    """The last record has its full length and does not end in zeros, but its checksum does not
    match. A killed broker does not leave this behind."""
    LENGTHS = "lengths"
    CHECKSUM = "checksum"
    FORMAT = "format"


_SENTENCES = {
    DamageKind.TORN: "incomplete record: truncated, or zeros to the end",
    DamageKind.LAST: "damaged record: the checksum of the last record does not match",
    DamageKind.LENGTHS: "damaged record: its lengths are wrong",
    DamageKind.CHECKSUM: "damaged record: its checksum does not match",
    DamageKind.FORMAT: "not a ledger segment of this format",
}


@dataclass(frozen=True, slots=True)
class DamagedRange:
    """Bytes of a segment that are not a valid record, from ``offset`` up to ``end``.

    full_length: whether the record's lengths are valid and all of its bytes exist.
    """

    fault: DamageKind
    offset: int
    end: int
    full_length: bool = False

    @property
    def at_end(self) -> bool:
        """Return whether a reader stops here without an error: the record may be being written."""
        return self.fault in (DamageKind.TORN, DamageKind.LAST)

    def error(self, path: Path) -> LedgerDamage:
        """Return the exception for this damage."""
        return LedgerDamage(_SENTENCES[self.fault], path.name, self.offset)


def scan(
    path: Path,
    start: int = len(MAGIC),
    *,
    verify_data: bool = True,
    disk: Disk = LOCAL_DISK,
) -> Iterator[Record]:
    """Yield the whole records of a segment from byte ``start`` on.

    Stops without an error at a torn tail, which begins at `Record.end` of the last record. Without
    ``verify_data``, the data are skipped, so that an index is built without reading all payload.

    Raises:
        LedgerDamage: the file is not a segment, or has an invalid record before its tail.
        LedgerError: the file cannot be read.
    """
    for found in walk(path, start, verify_data=verify_data, resync=False, disk=disk):
        if isinstance(found, Record):
            yield found
        elif found.at_end:
            return
        else:
            raise found.error(path)


def walk(
    path: Path,
    start: int = len(MAGIC),
    *,
    verify_data: bool = True,
    resync: bool = True,
    disk: Disk = LOCAL_DISK,
) -> Iterator[Record | DamagedRange]:
    """Yield all of a segment from byte ``start`` on: whole records, and the damage between them.

    Args:
        path: the segment.
        start: offset of a record.
        verify_data: as for `scan`.
        resync: search for the next whole record after damage; otherwise the first damage extends
            to the end of the segment, and is the last item.
        disk: holds the file.

    Raises:
        LedgerDamage: the file is not a segment, and no record begins where the first one should.
        LedgerError: the file cannot be read.
    """
    offset = start
    try:
        with disk.reader(path) as file:
            size = file.seek(0, os.SEEK_END)
            head = _check_magic(file, size)
            if head is not None:
                head = _confirmed(head, lambda again: _check_magic(again, size), path, disk)
            if head is not None:
                if head.fault is DamageKind.FORMAT and not (
                    resync and _whole(file, head.end, size)
                ):
                    raise head.error(path)
                yield head
            offset = max(start, len(MAGIC) if head is None else head.end)
            while offset < size:
                found = _record(file, offset, size, verify_data=verify_data)
                if isinstance(found, DamagedRange):
                    read = functools.partial(
                        _record, offset=offset, size=size, verify_data=verify_data
                    )
                    found = _confirmed(found, read, path, disk)
                if found is None:
                    return  # the writer has truncated an incomplete write
                if isinstance(found, DamagedRange) and found.fault is DamageKind.LENGTHS:
                    end = _next_whole(file, offset + 1, size) if resync else size
                    found = DamagedRange(found.fault, offset, end)
                yield found
                offset = found.end
                if isinstance(found, DamagedRange) and not resync:
                    return
    except OSError as error:
        raise io_error("cannot read", error, path.name, offset) from None


def _confirmed(
    found: DamagedRange, read: Callable[[BinaryIO], _Found], path: Path, disk: Disk
) -> _Found | DamagedRange:
    """Read damaged bytes again, from the disk instead of the buffer of an open file.

    Returns:
        What was ``found`` if each reading finds the same damage; or what is there if the damage was
        an error of reading.

    Raises:
        LedgerError: the readings find different damage. To act on the wrong one could lose records:
            after a torn one that was not truncated, the next is not found again.
    """
    for _ in range(READ_ATTEMPTS - 1):
        with disk.reader(path) as file:
            again = read(file)
        if again != found:
            if isinstance(again, DamagedRange):
                raise LedgerError("read again with different results", path.name, again.offset)
            return again
    return found


def _check_magic(file: BinaryIO, size: int) -> DamagedRange | None:
    """Return what is wrong with the first bytes of a segment, or None."""
    file.seek(0)
    magic = file.read(len(MAGIC))
    if magic == MAGIC[: len(magic)]:
        return DamagedRange(DamageKind.TORN, 0, size) if 0 < size < len(MAGIC) else None
    written = magic.rstrip(b"\0")
    if written == MAGIC[: len(written)] and _is_zero(file, len(written), size):
        return DamagedRange(DamageKind.TORN, 0, size)
    return DamagedRange(DamageKind.FORMAT, 0, min(size, len(MAGIC)))


def _record(
    file: BinaryIO, offset: int, size: int, *, verify_data: bool
) -> Record | DamagedRange | None:
    """Return the record or damage at an offset of a file of this size; None if it has shrunk."""
    file.seek(offset)
    if offset + _PREFIX.size > size:
        return DamagedRange(DamageKind.TORN, offset, size)
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        return None
    head_length, data_length, check, checksum = _PREFIX.unpack(prefix)
    data_offset = offset + _PREFIX.size + head_length
    end = data_offset + data_length
    if check != xxhash.xxh32_intdigest(_LENGTHS.pack(head_length, data_length)) or not (
        0 < head_length <= _MAX_HEAD and data_length <= _MAX_DATA
    ):
        torn = _is_zero(file, offset + _PREFIX.size, size)
        return DamagedRange(DamageKind.TORN if torn else DamageKind.LENGTHS, offset, size)
    if end > size:
        return DamagedRange(DamageKind.TORN, offset, size)
    head = file.read(head_length)
    if verify_data or not data_length:
        data = file.read(data_length)
        if _checksum(head, data) != checksum:
            if not _is_zero(file, end, size):
                return DamagedRange(DamageKind.CHECKSUM, offset, end, full_length=True)
            lost = _is_lost_sector(prefix + head + data, offset, size)
            fault = DamageKind.TORN if lost else DamageKind.LAST
            return DamagedRange(fault, offset, size, full_length=True)
    return Record(offset, head, data_offset, data_length)


def _is_lost_sector(record: bytes, offset: int, size: int) -> bool:
    """Return whether the end of the last record, which is invalid, is in a sector of zeros.

    A power failure leaves that. A single zero at the end is the last byte of many a record.
    """
    end = offset + len(record)
    if not record.endswith(b"\0"):
        return False
    if end < size:
        return True  # zeros follow
    start = (end - 1) // _SECTOR * _SECTOR
    return offset < start and not any(record[start - offset :])


def read_record(disk: Disk, fd: int, path: Path, offset: int, end: int) -> bytes:
    """Return the bytes of a whole record, of which the position is known.

    Args:
        disk: holds the segment.
        fd: of the segment.
        path: of the segment, for errors.
        offset: of the record.
        end: of the record.

    Raises:
        LedgerDamage: the segment ends earlier, or the record's checksum does not match.
        OSError: the segment cannot be read.
    """
    for _ in range(READ_ATTEMPTS):
        record = disk.pread(fd, end - offset, offset)
        if len(record) != end - offset:
            raise LedgerDamage("the segment is shorter than its index", path.name, offset)
        if _is_valid(record):
            return record
    raise LedgerDamage(_SENTENCES[DamageKind.CHECKSUM], path.name, offset)


def _is_valid(record: bytes) -> bool:
    """Return whether bytes are one whole record."""
    head_length, data_length, check, checksum = _PREFIX.unpack_from(record)
    if _PREFIX.size + head_length + data_length != len(record):
        return False
    actual = (
        xxhash.xxh32_intdigest(_LENGTHS.pack(head_length, data_length)),
        xxhash.xxh3_64_intdigest(memoryview(record)[_PREFIX.size :]),
    )
    return actual == (check, checksum)


def _whole(file: BinaryIO, offset: int, size: int) -> bool:
    return isinstance(_record(file, offset, size, verify_data=True), Record)


def _next_whole(file: BinaryIO, start: int, size: int) -> int:
    """Return the offset of the next whole record, or ``size`` if there is none."""
    while start < size:
        file.seek(start)
        block = np.frombuffer(file.read(_BLOCK), np.uint8)
        # Valid lengths have small high bytes; few other bytes look like this.
        count = max(0, len(block) - 7)
        byte = [block[at : at + count] for at in range(8)]
        likely = (byte[3] == 0) & (byte[2] <= _MAX_HEAD >> 16)
        likely &= (byte[7] == 0) & (byte[6] <= _MAX_DATA >> 16)
        likely &= (byte[0] | byte[1] | byte[2]) != 0
        for index in np.flatnonzero(likely):
            if _whole(file, start + int(index), size):
                return start + int(index)
        if len(block) < _BLOCK:
            break
        start += _BLOCK - 7
    return size


def _checksum(head: bytes, data: Buffer) -> int:
    if not data:
        return xxhash.xxh3_64_intdigest(head)
    hasher = xxhash.xxh3_64(head)
    hasher.update(data)
    return int(hasher.intdigest())


def _is_zero(file: BinaryIO, start: int, end: int) -> bool:
    file.seek(start)
    while start < end:
        block = file.read(min(1 << 16, end - start))
        if block.strip(b"\0"):
            return False
        if not block:
            return True  # it has shrunk
        start += len(block)
    return True
