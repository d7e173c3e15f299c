"""Read one run of a ledger from its files alone, verifying every byte.

Reading changes nothing and is safe while a broker writes. Damage is reported with segment and
offset. The entries before it can be read, and every blob that is complete.

Two things cannot be detected: that the messages were cut exactly between two records, or their last
segment is missing (but `fedmq.broker.inspection.check` compares the list of segments); and whether
retention or something else deleted a payload segment. If payload was cut between two records, the
messages that name it reveal the loss, but not always its position.
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
    """One run of a ledger.

    Args:
        folder: of the run, or of its ledger.
        run: id of the run; empty if the ledger has only one.

    Attributes:
        folder: of the ledger.
        opened: the run's first entry, with its configuration.
        damage: the damage that ends the readable entries, or None.
        torn: (segment, offset, bytes) of an incomplete last record of the entries, or None.

    Raises:
        LedgerError: there is no ledger, or it has no such run.
    """

    def __init__(self, folder: Path, run: str = "") -> None:
        self.folder = ledger_folder(folder)
        if not segment_numbers(self.folder, MESSAGES):
            raise LedgerError(f"expected a run's folder with a ledger in it, {folder} holds none")
        self.damage: LedgerError | None = None
        self.torn: TornTail | None = None
        self._index = EntryIndex(self.folder)
        self._tail = LedgerTail(self.folder)
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
            LedgerError: the next entry cannot be read; all entries before it were yielded.
        """
        # Until another run is opened, every message belongs to this one.
        alone_until: int | None = None
        own: set[int] = set()
        for entry in LedgerTail(self.folder).poll():
            match entry:
                case Opened(run=run, seq=seq) if run != self.run:
                    alone_until = seq if alone_until is None else alone_until
                    continue
                case Accepted(seq=seq) if alone_until is not None:
                    if entry.read().run != self.run:
                        continue
                    own.add(seq)
                case Consumed(of=of) if alone_until is not None:
                    if not any(seq < alone_until or seq in own for seq in of):
                        continue
                case Refusal(run=run) | Ended(run=run) if run != self.run:
                    continue
            yield entry

    def entry(self, seq: int) -> AnyEntry:
        """Return one entry of the ledger, of any run.

        Raises:
            LedgerError: there is no entry with this number, or it cannot be read.
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
        """Return the bytes of a message's blob, verified by its digest.

        Raises:
            LedgerError: the bytes are damaged or lost, with segment and offset; or they were
                deleted by retention, or there is no such blob, without a position.
        """
        if not 0 <= index < len(message.blobs):
            raise LedgerError(
                f"expected a blob of {message.id} below {len(message.blobs)}, got {index}"
            )
        blob = message.blobs[index]
        if not blob.size and blob.digest == EMPTY:
            return b""
        what = f"blob {index} of {message.id} ({blob.digest.hex()})"
        return self._blobs.read(blob_name(message, blob), blob.size, what)

    def check_payload(self) -> Iterator[int]:
        """Read all payload; yield the size of each chunk in bytes.

        A torn tail counts as damage here, whether a message needs it or not.

        Raises:
            LedgerError: damage, with its position; all chunks before it were yielded.
        """
        for number in segment_numbers(self.folder, PAYLOAD):
            yield from check_segment(segment_path(self.folder, PAYLOAD, number))

    def _catch_up(self) -> None:
        """Index what has been appended, up to the end or the first damage."""
        try:
            for entry in self._tail.poll():
                self._index.add(entry.seq, *self._tail.at)
                self._count = entry.seq + 1
                if isinstance(entry, Opened):
                    self._runs[entry.run] = entry
            self.torn = self._tail.torn()
        except LedgerError as error:
            self.damage, self.torn = error, None

    def _choose(self, run: str) -> Opened:
        names = ", ".join(self._runs)
        if run in self._runs:
            return self._runs[run]
        if self.damage is not None and (run or not self._runs):
            raise self.damage  # the run may come after it
        if not self._runs:
            where = self.torn[:2] if self.torn is not None else ()
            raise LedgerError(f"there is no run in {self.folder}", *where)
        if run:
            raise LedgerError(f"expected a run of this ledger ({names}), got {run!r}")
        if len(self._runs) > 1:
            raise LedgerError(f"this ledger holds several runs, choose one with --run-id: {names}")
        return next(iter(self._runs.values()))
