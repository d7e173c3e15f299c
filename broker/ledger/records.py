"""Records in segment files: length-prefixed, checksummed, append-only.

A segment starts with 16 bytes, ``FEDMQLOG`` and the format version. A record is::

    head length  u32 LE
    data length  u32 LE
    check        u32 LE    XXH32 over both lengths
    checksum     u64 LE    XXH3-64 over head and data
    head         a msgpack map
    data         raw bytes, possibly none

A crash can cut the last record short, or leave zeros from somewhere in it to the end of the
file: a *torn tail*, which is cut off when the segment is opened for writing. A bad record that
others follow is *damage*, and is reported with segment and offset. (The lengths have a check of
their own, so that a damaged length is not taken for a record that was cut short.) `scan` stops
there; `walk` finds the next whole record behind it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from fedmq.broker.errors import LedgerDamage, LedgerError, io_error
from fedmq.broker.wire.schema import CHUNK_BYTES, MAX_HEADER_BYTES, Buffer

MAGIC = b"FEDMQLOG" + struct.pack("<II", 1, 0)
_PREFIX = struct.Struct("<IIIQ")
_LENGTHS = struct.Struct("<II")
# A head holds a whole message plus a few fields of the ledger's own.
_MAX_HEAD = 2 * MAX_HEADER_BYTES
_MAX_DATA = CHUNK_BYTES
_BLOCK = 1 << 20
"""So much is read at a time where the next record is looked for."""


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


class DamageKind(StrEnum):
    """What is wrong with bytes that are no record."""

    TORN = "torn"
    """The end of a segment, as a crash leaves it: cut short, or zeros to the end."""
    LAST = "last"
    """The last record is as long as it says and does not end in zeros, but it is not what was
    written. A broker that was killed leaves no such thing behind."""
    LENGTHS = "lengths"
    CHECKSUM = "checksum"
    FORMAT = "format"


_SENTENCES = {
    DamageKind.TORN: "no whole record: the end was cut short, or is zeros",
    DamageKind.LAST: "damaged record: its checksum does not match, and it is the last one",
    DamageKind.LENGTHS: "damaged record: its lengths are wrong",
    DamageKind.CHECKSUM: "damaged record: its checksum does not match",
    DamageKind.FORMAT: "not a ledger segment of this format",
}


@dataclass(frozen=True, slots=True)
class DamagedRange:
    """Bytes of a segment that are no record, from ``offset`` up to ``end``.

    full_length: the record's lengths are good, and all of its bytes are there.
    """

    fault: DamageKind
    offset: int
    end: int
    full_length: bool = False

    @property
    def at_end(self) -> bool:
        """Tell whether a reader of a ledger that is being written simply stops here."""
        return self.fault in (DamageKind.TORN, DamageKind.LAST)

    def error(self, path: Path) -> LedgerDamage:
        """Return what to raise about it."""
        return LedgerDamage(_SENTENCES[self.fault], path.name, self.offset)


def scan(path: Path, start: int = len(MAGIC), *, verify_data: bool = True) -> Iterator[Record]:
    """Yield the whole records of a segment from byte ``start`` on, then stop.

    It stops without an error at a torn tail; `Record.end` of the last one says where.
    Without ``verify_data``, records that carry data are taken by their lengths alone,
    which is how an index is built without reading every payload.

    Raises:
        LedgerDamage: not a segment, or a bad record that is not the torn tail.
        LedgerError: it cannot be read.
    """
    for found in walk(path, start, verify_data=verify_data, resync=False):
        if isinstance(found, Record):
            yield found
        elif found.at_end:
            return
        else:
            raise found.error(path)


def walk(
    path: Path, start: int = len(MAGIC), *, verify_data: bool = True, resync: bool = True
) -> Iterator[Record | DamagedRange]:
    """Yield all of a segment from byte ``start`` on: whole records, and what lies between them.

    Args:
        path: the segment.
        start: where a record begins.
        verify_data: as for `scan`.
        resync: look for the next whole record behind damage; otherwise damage is the last
            thing to come, and goes on to the end of the segment.

    Raises:
        LedgerDamage: the file is no segment, and no record begins where the first one should.
        LedgerError: it cannot be read.
    """
    offset = start
    try:
        with path.open("rb", buffering=1 << 16) as file:
            size = os.fstat(file.fileno()).st_size
            head = _check_magic(file, size)
            if head is not None:
                if head.fault is DamageKind.FORMAT and not (
                    resync and _whole(file, head.end, size)
                ):
                    raise head.error(path)
                yield head
            offset = max(start, len(MAGIC) if head is None else head.end)
            file.seek(offset)
            while offset < size:
                found = _record(file, offset, size, verify_data=verify_data)
                if found is None:
                    return  # a writer took back what it could not write whole
                if isinstance(found, DamagedRange) and found.fault is DamageKind.LENGTHS:
                    end = _next_whole(file, offset + 1, size) if resync else size
                    found = DamagedRange(found.fault, offset, end)
                yield found
                offset = found.end
                if isinstance(found, DamagedRange):
                    if not resync:
                        return
                    file.seek(offset)
                elif found.data_length and not verify_data:
                    file.seek(offset)
    except OSError as error:
        raise io_error("cannot read", error, path.name, offset) from None


def _check_magic(file: BinaryIO, size: int) -> DamagedRange | None:
    """Return what is wrong with the first bytes of a segment; None if nothing is."""
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
    """Return what begins at an offset of a file of this size; None if it has shrunk.

    The file is read from there on; unless it is the data of a record that are left out, it is
    read to the record's end.
    """
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
            fault = DamageKind.TORN if (data or head).endswith(b"\0") else DamageKind.LAST
            return DamagedRange(fault, offset, size, full_length=True)
    return Record(offset, head, data_offset, data_length)


def _whole(file: BinaryIO, offset: int, size: int) -> bool:
    file.seek(offset)
    return isinstance(_record(file, offset, size, verify_data=True), Record)


def _next_whole(file: BinaryIO, start: int, size: int) -> int:
    """Return where the next whole record begins, or ``size`` if none does."""
    while start < size:
        file.seek(start)
        block = np.frombuffer(file.read(_BLOCK), np.uint8)
        # The high bytes of lengths within the limits are these; hardly anything else is.
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
        piece = file.read(min(1 << 16, end - start))
        if piece.strip(b"\0"):
            return False
        if not piece:
            return True  # it has shrunk
        start += len(piece)
    return True
