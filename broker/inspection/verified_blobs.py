"""Reading blobs from payload that may be damaged.

The broker's own `BlobStore` trusts what it wrote. Here each piece is held against the
checksum of its record, and each blob against its digest. Where one copy of a piece is
damaged, another serves as well; where none is left, the damage is found.
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
    """Where a piece lies, as the head of its record says: that is not verified yet."""

    segment: int
    offset: int
    end: int
    start: int
    length: int


class _Attempt(NamedTuple):
    """What came of putting a blob together.

    data: the blob, or None. damage: a piece that is there, but is not what was written.
    last: the last piece that is whole.
    """

    data: Buffer | None = None
    damage: LedgerError | None = None
    last: _StoredChunk | None = None


class VerifiedBlobReader:
    """Finds blobs in the payload segments of a folder, and reads them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # By blob and its size: the places of its pieces, by where they start in it. The
        # broker may give a blob up and store it again; then another dict is begun.
        self._chunks: dict[tuple[BlobName, int], list[dict[int, list[_StoredChunk]]]] = {}
        self._last = 0
        self._end = len(MAGIC)
        self._checked: dict[tuple[int, int, int], LedgerError | None] = {}

    def read(self, name: BlobName, size: int, what: str) -> Buffer:
        """Return a blob that an accepted message names; an error calls it ``what``.

        Raises:
            LedgerError: it is damaged or lost, with segment and offset; or retention did not
                keep it, with neither.
        """
        found = self._put_together(name, size)
        if found.data is None:  # it may have been written since
            self._catch_up()
            found = self._put_together(name, size)
        if found.data is None:
            raise found.damage or self._loss(what, found.last)
        return found.data

    def _catch_up(self) -> None:
        """Note where the pieces lie that are new, by the heads of their records."""
        for number in segment_numbers(self._folder, PAYLOAD):
            if number < self._last:
                continue
            if number > self._last:
                self._last, self._end = number, len(MAGIC)
            path = segment_path(self._folder, PAYLOAD, number)
            # Damage is told when a blob is missed for it, and other blobs are not.
            with contextlib.suppress(LedgerError):
                for found in walk(path, self._end, verify_data=False):
                    if isinstance(found, Record):
                        self._note(number, found, path)
                        self._end = found.end

    def _note(self, number: int, record: Record, path: Path) -> None:
        try:
            piece = decode_chunk(record, path)
        except LedgerError:
            return  # as in `_catch_up`; by its lengths, the records behind it are found
        name = BlobName(piece.run, piece.owner, piece.digest)
        attempts = self._chunks.setdefault((name, piece.size), [{}])
        if record.data_length:
            length = record.data_length
            place = _StoredChunk(number, record.offset, record.end, piece.start, length)
            attempts[-1].setdefault(piece.start, []).append(place)
        elif attempts[-1]:
            attempts.append({})

    def _put_together(self, name: BlobName, size: int) -> _Attempt:
        """Try what was stored last first: what the broker gave up is rarely whole."""
        damage, last = None, None
        for places in reversed(self._chunks.get((name, size), [])):
            if not places:
                continue
            found = self._attempt(places, size)
            if found.data is not None:
                if digest(found.data) == name.digest:
                    return found
                first = places[0][0]
                path = segment_path(self._folder, PAYLOAD, first.segment)
                wrong = f"blob {name.digest.hex()} is not the bytes that its name says"
                damage = damage or LedgerError(wrong, path.name, first.offset)
            damage, last = damage or found.damage, last or found.last
        return _Attempt(None, damage, last)

    def _attempt(self, places: dict[int, list[_StoredChunk]], size: int) -> _Attempt:
        parts: list[Buffer] = []
        have, damage, last = 0, None, None
        while have < size:
            for place in places.get(have, []):
                try:
                    part = self._chunk(place)
                except LedgerError as error:
                    # What the broker has deleted in the meantime is not damaged.
                    if segment_path(self._folder, PAYLOAD, place.segment).exists():
                        damage = damage or error
                    continue
                parts.append(part)
                have, last = have + place.length, place
                break
            else:
                return _Attempt(None, damage, last)
        if have > size:
            return _Attempt(None, damage, last)
        return _Attempt(parts[0] if len(parts) == 1 else b"".join(parts))

    def _chunk(self, place: _StoredChunk) -> Buffer:
        """Return a piece that is what was written.

        Raises:
            LedgerError: it is not.
        """
        path = segment_path(self._folder, PAYLOAD, place.segment)
        # What is wrong before it, in the first bytes of the file, is not wrong with it.
        at = (each for each in walk(path, place.offset) if each.offset >= place.offset)
        record = next(at, None)
        if isinstance(record, DamagedRange) and not record.at_end:
            raise record.error(path)
        if not isinstance(record, Record):  # the last of its segment: it could be a torn tail
            raise LedgerDamage("damaged record: it is not whole", path.name, place.offset)
        try:
            with path.open("rb") as file:
                file.seek(record.data_offset)
                return file.read(record.data_length)
        except OSError as error:
            raise io_error("cannot read", error, path.name, place.offset) from None

    def _loss(self, what: str, last: _StoredChunk | None) -> LedgerError:
        """Say why a blob is not there, although it was written before its message.

        A missing segment was deleted by the retention policy, which leaves the last one.
        (It cannot be told from one that was lost.) Where none is missing, there is damage; if
        none is to be seen, a segment was cut where a record ends, maybe not the last one.
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
                either = f"{what} was not kept, or it was lost with a damaged record"
                return NotKept(either, damage.segment, damage.offset)
        if not complete:
            return NotKept(f"{what} is not in the ledger: its payload was not kept")
        if last is not None:
            path = segment_path(self._folder, PAYLOAD, last.segment)
            return LedgerError(f"{what} is cut short: it goes on nowhere", path.name, last.end)
        path = segment_path(self._folder, PAYLOAD, numbers[-1] if numbers else 0)
        end = _size(path) if numbers else 0
        return LedgerError(f"{what} is lost: the payload ends without it", path.name, end)

    def _check(self, number: int, start: int) -> LedgerError | None:
        """Return the first damage in a segment from a record on; each is read through once."""
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
    """Read a segment of payload from a record on; yield the size of each piece.

    Raises:
        LedgerError: damage, or a tail that is no whole record; all before has been yielded.
    """
    end = start
    for record in scan(path, start):
        decode_chunk(record, path)
        end = record.end
        yield record.data_length
    tail = tail_of(path, end)
    if tail is not None:
        name, offset, size = tail
        raise LedgerError(f"no whole record: {size} bytes of a torn tail", name, offset)
