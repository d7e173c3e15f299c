"""Reading all payload of a ledger: is every byte of it what was written?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from fedmq.broker.errors import LedgerError
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import (
    PAYLOAD,
    ChunkRecord,
    decode_chunk,
    segment_numbers,
    segment_path,
)
from fedmq.broker.ledger.reader import TornTail, tail_of
from fedmq.broker.ledger.records import MAGIC, scan
from fedmq.nodes.process.terminal import count, plain, plural


@dataclass
class StoredBlobs:
    """What the payload segments hold of a run.

    damage: of each segment that cannot be read to its end.
    torn: tails that are no whole records: (segment, offset, bytes).
    complete: no segment is missing; a retention policy deletes the oldest.
    """

    pieces: int = 0
    nbytes: int = 0
    damage: list[LedgerError] = field(default_factory=list)
    torn: list[TornTail] = field(default_factory=list)
    complete: bool = True
    _blobs: dict[tuple[str, bytes], tuple[int, int]] = field(default_factory=dict)
    """Of each blob, by owner and digest: its size, and how much of it is here."""

    def add(self, piece: ChunkRecord, length: int) -> None:
        """Take one more piece; pieces of a blob come in order."""
        self.pieces += 1
        self.nbytes += length
        name = (piece.owner, piece.digest)
        _, end = self._blobs.get(name, (0, 0))
        if piece.size and not length:
            self._blobs.pop(name, None)  # it takes back all before it
        elif piece.start == end:
            self._blobs[name] = (piece.size, end + length)

    def missing(self, names: Iterable[tuple[str, bytes]]) -> int:
        """Return how many of these blobs, by owner and digest, are not here as a whole."""
        found = (self._blobs.get(name) for name in names)
        return sum(each is None or each[1] < each[0] for each in found)

    def is_damaged(self, missing: int) -> bool:
        """Tell whether something is not as it was written, besides a torn tail."""
        return bool(self.damage) or (missing > 0 and self.complete)

    def lines(self, missing: int) -> Iterator[str]:
        """Yield what there is to say; ``missing``: blobs that were named and are not here."""
        sound = "" if self.damage or missing else ", all whole"
        yield f"payload: {plural(self.pieces, 'piece')}, {count(self.nbytes)} bytes{sound}"
        for error in self.damage:
            yield f"  damaged: {plain(error)}; what lies before in this segment is whole"
        for segment, offset, size in self.torn:
            yield f"  torn tail: {size} bytes are no whole record (at {segment}, byte {offset})"
        if missing:
            why = "lost" if self.complete else "not kept, or lost"
            yield f"  {plural(missing, 'blob')} of accepted messages: {why}"


def read_payload(trace: Trace) -> StoredBlobs:
    """Read all payload, in all segments: damage in one does not hide the others.

    What belongs to other runs is checked too, but not counted.
    """
    numbers = segment_numbers(trace.folder, PAYLOAD)
    found = StoredBlobs(complete=numbers == list(range(len(numbers))))
    for number in numbers:
        path = segment_path(trace.folder, PAYLOAD, number)
        end = len(MAGIC)
        try:
            for record in scan(path):
                piece = decode_chunk(record, path)
                end = record.end
                if piece.run == trace.run:
                    found.add(piece, record.data_length)
        except LedgerError as error:
            found.damage.append(error)
            continue
        tail = tail_of(path, end)
        if tail is not None:
            found.torn.append(tail)
    return found
