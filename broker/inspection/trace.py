"""A ledger as a trace: one run in it, read from the files alone, and nothing taken on trust.

Reading changes nothing, and may go on while a broker writes. Whatever is damaged is said
with segment and offset, and what lies before it can be read; blobs that lie behind it, too,
as far as they are whole.

What cannot be seen: that the messages end early where a record ends, or that their last
segment is gone (a ledger may end there, and no later record says otherwise;
`fedmq.broker.inspection.check` looks into the list of segments, too); and whether it was the
retention policy that deleted a payload segment. Payload that ends early where a record ends is
found by the messages that name it; where the cut was, is then not always known.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedmq.broker.errors import LedgerError
from fedmq.broker.inspection.verified_blobs import VerifiedBlobReader, check_segment
from fedmq.broker.ledger.entries import (
    MESSAGES,
    PAYLOAD,
    Accepted,
    AnyEntry,
    Consumed,
    Ended,
    Opened,
    Refusal,
    blob_name,
    ledger_folder,
    segment_numbers,
    segment_path,
)
from fedmq.broker.ledger.reader import EntryIndex, LedgerTail, TornTail
from fedmq.broker.wire.schema import EMPTY, Buffer, Message


class Trace:
    """What a ledger tells of one run.

    Args:
        folder: of the run, or of its ledger.
        run: id of the run; empty for the only one there is.

    Attributes:
        folder: of the ledger.
        opened: what the aggregator brought.
        damage: what stops the reading of entries before the end, or None.
        torn: a tail of the entries that is no whole record: (segment, offset, bytes), or None.

    Raises:
        LedgerError: there is no ledger, or no such run in it.
    """

    def __init__(self, folder: Path, run: str = "") -> None:
        self.folder = ledger_folder(folder)
        if not segment_numbers(self.folder, MESSAGES):
            raise LedgerError(f"expected a run's folder with a ledger in it, {folder} holds none")
        self.damage: LedgerError | None = None
        self.torn: TornTail | None = None
        self._index = EntryIndex(self.folder)
        self._follower = LedgerTail(self.folder)
        self._count = 0
        self._runs: dict[str, Opened] = {}
        self._blobs = VerifiedBlobReader(self.folder)
        self._catch_up()
        self.opened = self._choose(run)

    @property
    def run(self) -> str:
        """Return the id of the run."""
        return self.opened.run

    def entries(self) -> Iterator[AnyEntry]:
        """Yield the entries of the run, in order; stops at a torn tail.

        Raises:
            LedgerError: what lies behind cannot be read; all before it has been yielded.
        """
        # Before another run was opened, every message was of this one.
        alone_until: int | None = None
        mine: set[int] = set()
        for entry in LedgerTail(self.folder).poll():
            match entry:
                case Opened(run=run, seq=seq) if run != self.run:
                    alone_until = seq if alone_until is None else alone_until
                    continue
                case Accepted(seq=seq) if alone_until is not None:
                    if entry.read().run != self.run:
                        continue
                    mine.add(seq)
                case Consumed(of=of) if alone_until is not None:
                    if not any(seq < alone_until or seq in mine for seq in of):
                        continue
                case Refusal(run=run) | Ended(run=run) if run != self.run:
                    continue
            yield entry

    def entry(self, seq: int) -> AnyEntry:
        """Return one entry of the ledger, of whatever run.

        Raises:
            LedgerError: there is none of this number, or it cannot be read.
        """
        if seq >= self._count and self.damage is None:
            self._catch_up()
        if seq >= self._count and self.damage is not None:
            raise self.damage
        if seq >= self._count > 0:
            raise LedgerError(
                f"entry {seq} is not in the ledger: the last one is entry {self._count - 1}"
            )
        return self._index.read(seq)

    def blob(self, message: Message, index: int) -> Buffer:
        """Return the bytes of a message's blob; they are those that it names.

        Raises:
            LedgerError: they are damaged or lost, with segment and offset; or they were not
                kept, or there is no such blob, with neither.
        """
        if not 0 <= index < len(message.blobs):
            raise LedgerError(f"{message.id} has {len(message.blobs)} blobs, there is no {index}")
        blob = message.blobs[index]
        if not blob.size and blob.digest == EMPTY:
            return b""
        what = f"blob {index} of {message.id} ({blob.digest.hex()})"
        return self._blobs.read(blob_name(message, blob), blob.size, what)

    def check_payload(self) -> Iterator[int]:
        """Read all payload there is; yield the size of each piece.

        A torn tail counts as damage here: whether a message misses it, `blob` tells.

        Raises:
            LedgerError: damage, located; all before it in this segment has been yielded.
        """
        for number in segment_numbers(self.folder, PAYLOAD):
            yield from check_segment(segment_path(self.folder, PAYLOAD, number))

    def _catch_up(self) -> None:
        """Note what has been appended, up to the end or to the first damage."""
        try:
            for entry in self._follower.poll():
                self._index.add(entry.seq, *self._follower.at)
                self._count = entry.seq + 1
                if isinstance(entry, Opened):
                    self._runs[entry.run] = entry
            self.torn = self._follower.torn()
        except LedgerError as error:
            self.damage, self.torn = error, None

    def _choose(self, run: str) -> Opened:
        names = ", ".join(self._runs)
        if run in self._runs:
            return self._runs[run]
        if self.damage is not None and (run or not self._runs):
            raise self.damage  # what is looked for may lie behind it
        if not self._runs:
            where = self.torn[:2] if self.torn is not None else ()
            raise LedgerError(f"no run was ever opened in {self.folder}", *where)
        if run:
            raise LedgerError(f"expected a run of this ledger ({names}), got {run!r}")
        if len(self._runs) > 1:
            raise LedgerError(f"this ledger holds several runs, name one with --run-id: {names}")
        return next(iter(self._runs.values()))
