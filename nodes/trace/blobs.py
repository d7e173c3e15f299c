"""Read all payload of a ledger and check that it is intact."""

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
    """The chunks of one run in the payload segments.

    damage: errors, one for each segment that cannot be read to its end.
    torn: incomplete last records: (segment, offset, bytes).
    complete: whether no segment is missing; a retention policy deletes the oldest.
    """

    chunks: int = 0
    nbytes: int = 0
    damage: list[LedgerError] = field(default_factory=list)
    torn: list[TornTail] = field(default_factory=list)
    complete: bool = True
    _blobs: dict[tuple[str, bytes], tuple[int, int]] = field(default_factory=dict)
    """Size and stored bytes of each blob, by owner and digest."""

    def add(self, chunk: ChunkRecord, length: int) -> None:
        """Add the next chunk; the chunks of a blob come in order."""
        self.chunks += 1
        self.nbytes += length
        name = (chunk.owner, chunk.digest)
        _, end = self._blobs.get(name, (0, 0))
        if chunk.size and not length:
            self._blobs.pop(name, None)  # an empty chunk discards the earlier ones
        elif chunk.start == end:
            self._blobs[name] = (chunk.size, end + length)

    def missing(self, names: Iterable[tuple[str, bytes]]) -> int:
        """Return how many of these blobs, by owner and digest, are not stored completely."""
        found = (self._blobs.get(name) for name in names)
        return sum(each is None or each[1] < each[0] for each in found)

    def is_damaged(self, missing: int) -> bool:
        """Return whether payload is damaged or lost; an incomplete last record is neither."""
        return bool(self.damage) or (missing > 0 and self.complete)

    def lines(self, missing: int) -> Iterator[str]:
        """Yield the lines of the report; ``missing``: blobs of messages that are not stored."""
        intact = "" if self.damage or missing else ", all intact"
        yield f"payload: {plural(self.chunks, 'chunk')}, {count(self.nbytes)} bytes{intact}"
        for error in self.damage:
            yield f"  damaged: {plain(error)}; earlier chunks of this segment are intact"
        for segment, offset, size in self.torn:
            yield f"  incomplete last record: {size} bytes (at {segment}, byte {offset})"
        if missing:
            why = "lost" if self.complete else "deleted by the retention policy, or lost"
            yield f"  {plural(missing, 'blob')} of accepted messages: {why}"


def read_payload(trace: Trace) -> StoredBlobs:
    """Read all payload segments, also those after a damaged one.

    Payload of other runs is checked, too, but not counted.
    """
    numbers = segment_numbers(trace.folder, PAYLOAD)
    found = StoredBlobs(complete=numbers == list(range(len(numbers))))
    for number in numbers:
        path = segment_path(trace.folder, PAYLOAD, number)
        end = len(MAGIC)
        try:
            for record in scan(path):
                chunk = decode_chunk(record, path)
                end = record.end
                if chunk.run == trace.run:
                    found.add(chunk, record.data_length)
        except LedgerError as error:
            found.damage.append(error)
            continue
        tail = tail_of(path, end)
        if tail is not None:
            found.torn.append(tail)
    return found
