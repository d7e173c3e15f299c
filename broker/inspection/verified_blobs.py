"""Read and verify blobs from payload that may be damaged.

The broker's own `BlobStore` trusts what it wrote. Here, each chunk is verified by the checksum of
its record, and each blob by its digest. If one copy of a chunk is damaged, another one is used; if
there is no other, the damage is located.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fedmq.broker.errors import LedgerDamage, LedgerError, NotKept, io_error
from fedmq.broker.ledger.entries import (
    PAYLOAD,
    BlobName,
    decode_chunk,
    segment_numbers,
    segment_path,
)
from fedmq.broker.ledger.reader import tail_of
from fedmq.broker.ledger.records import MAGIC, DamagedRange, Record, scan, walk
from fedmq.broker.wire.schema import Buffer, digest


class _StoredChunk(NamedTuple):
    """The position of a chunk, from the unverified head of its record."""

    segment: int
    offset: int
    end: int
    start: int
    length: int


class _Attempt(NamedTuple):
    """The result of assembling a blob.

    data: the blob, or None. damage: of a chunk that exists. last: the last undamaged chunk.
    """

    data: Buffer | None = None
    damage: LedgerError | None = None
    last: _StoredChunk | None = None


class VerifiedBlobReader:
    """Finds blobs in the payload segments of a folder, and reads them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # By (blob, size): the copies of each chunk, by its start in the blob. The broker may
        # discard a blob and store it again, which begins another dict.
        self._chunks: dict[tuple[BlobName, int], list[dict[int, list[_StoredChunk]]]] = {}
        self._last = 0
        self._end = len(MAGIC)
        self._checked: dict[tuple[int, int, int], LedgerError | None] = {}

    def read(self, name: BlobName, size: int, what: str) -> Buffer:
        """Return a blob that an accepted message names; errors call it ``what``.

        Raises:
            LedgerError: the blob is damaged or lost, with segment and offset; or retention has
                deleted it, without a position.
        """
        found = self._assemble(name, size)
        if found.data is None:  # it may be new
            self._catch_up()
            found = self._assemble(name, size)
        if found.data is None:
            raise found.damage or self._loss(what, found.last)
        return found.data

    def _catch_up(self) -> None:
        """Index new chunks, by the heads of their records."""
        for number in segment_numbers(self._folder, PAYLOAD):
            if number < self._last:
                continue
            if number > self._last:
                self._last, self._end = number, len(MAGIC)
            path = segment_path(self._folder, PAYLOAD, number)
            # Damage is reported when a blob needs the damaged chunk, not here.
            with contextlib.suppress(LedgerError):
                for found in walk(path, self._end, verify_data=False):
                    if isinstance(found, Record):
                        self._note(number, found, path)
                        self._end = found.end

    def _note(self, number: int, record: Record, path: Path) -> None:
        try:
            head = decode_chunk(record, path)
        except LedgerError:
            return  # as in `_catch_up`; later records are still found
        name = BlobName(head.run, head.owner, head.digest)
        copies = self._chunks.setdefault((name, head.size), [{}])
        if record.data_length:
            length = record.data_length
            chunk = _StoredChunk(number, record.offset, record.end, head.start, length)
            copies[-1].setdefault(head.start, []).append(chunk)
        elif copies[-1]:
            copies.append({})

    def _assemble(self, name: BlobName, size: int) -> _Attempt:
        """Try the newest copy first: one that the broker has discarded is rarely whole."""
        damage, last = None, None
        for chunks in reversed(self._chunks.get((name, size), [])):
            if not chunks:
                continue
            found = self._attempt(chunks, size)
            if found.data is not None:
                if digest(found.data) == name.digest:
                    return found
                first = chunks[0][0]
                path = segment_path(self._folder, PAYLOAD, first.segment)
                text = f"the bytes of blob {name.digest.hex()} do not match its digest"
                damage = damage or LedgerError(text, path.name, first.offset)
            damage, last = damage or found.damage, last or found.last
        return _Attempt(None, damage, last)

    def _attempt(self, chunks: dict[int, list[_StoredChunk]], size: int) -> _Attempt:
        parts: list[Buffer] = []
        have, damage, last = 0, None, None
        while have < size:
            for chunk in chunks.get(have, []):
                try:
                    part = self._chunk(chunk)
                except LedgerError as error:
                    # A segment that the broker has deleted meanwhile is not damaged.
                    if segment_path(self._folder, PAYLOAD, chunk.segment).exists():
                        damage = damage or error
                    continue
                parts.append(part)
                have, last = have + chunk.length, chunk
                break
            else:
                return _Attempt(None, damage, last)
        if have > size:
            return _Attempt(None, damage, last)
        return _Attempt(parts[0] if len(parts) == 1 else b"".join(parts))

    def _chunk(self, chunk: _StoredChunk) -> Buffer:
        """Return the verified bytes of a chunk.

        Raises:
            LedgerError: the chunk is damaged, or cannot be read.
        """
        path = segment_path(self._folder, PAYLOAD, chunk.segment)
        # Damage of the first bytes of the file does not affect the chunk.
        at = (each for each in walk(path, chunk.offset) if each.offset >= chunk.offset)
        record = next(at, None)
        if isinstance(record, DamagedRange) and not record.at_end:
            raise record.error(path)
        if not isinstance(record, Record):  # at the end of its segment: it may be a torn tail
            raise LedgerDamage("damaged record: it is incomplete", path.name, chunk.offset)
        try:
            with path.open("rb") as file:
                file.seek(record.data_offset)
                return file.read(record.data_length)
        except OSError as error:
            raise io_error("cannot read", error, path.name, chunk.offset) from None

    def _loss(self, what: str, last: _StoredChunk | None) -> LedgerError:
        """Return the reason why a blob is missing, although it was written before its message.

        A missing segment counts as deleted by retention, which leaves the last one. (It cannot be
        distinguished from a lost one.) Without a missing segment there is damage, or a segment was
        cut between two records, which may be any of them.
        """
        since = last.segment if last else 0
        numbers = [n for n in segment_numbers(self._folder, PAYLOAD) if n >= since]
        complete = numbers == list(range(since, since + len(numbers)))
        for number in numbers:
            start = last.offset if last and number == since else len(MAGIC)
            damage = self._check(number, start)
            if damage is not None and complete:
                return damage
            if damage is not None:
                either = f"{what} was deleted by retention, or lost in a damaged record"
                return NotKept(either, damage.segment, damage.offset)
        if not complete:
            return NotKept(f"{what} is not in the ledger: its payload segment was deleted")
        if last is not None:
            path = segment_path(self._folder, PAYLOAD, last.segment)
            return LedgerError(
                f"{what} is truncated: its next chunk is missing", path.name, last.end
            )
        path = segment_path(self._folder, PAYLOAD, numbers[-1] if numbers else 0)
        end = _size(path) if numbers else 0
        return LedgerError(f"{what} is lost: the payload ends before it", path.name, end)

    def _check(self, number: int, start: int) -> LedgerError | None:
        """Return the first damage in a segment from a record on; the result is cached."""
        path = segment_path(self._folder, PAYLOAD, number)
        key = (number, start, _size(path))
        if key not in self._checked:
            self._checked[key] = None
            try:
                for _ in check_segment(path, start):
                    pass
            except LedgerError as error:
                self._checked[key] = error
        return self._checked[key]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise io_error("cannot read", error, path.name) from None


def check_segment(path: Path, start: int = len(MAGIC)) -> Iterator[int]:
    """Read a payload segment from a record on; yield the size of each chunk in bytes.

    Raises:
        LedgerError: damage, or an incomplete last record; all chunks before it were yielded.
    """
    end = start
    for record in scan(path, start):
        decode_chunk(record, path)
        end = record.end
        yield record.data_length
    tail = tail_of(path, end)
    if tail is not None:
        name, offset, size = tail
        raise LedgerError(f"incomplete record: a torn tail of {size} bytes", name, offset)
