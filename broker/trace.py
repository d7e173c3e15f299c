"""A ledger as a trace: one run in it, read from the files alone, and nothing taken on trust.

Reading changes nothing, and may go on while a broker writes. Whatever is damaged is said
with segment and offset, and what lies before it can be read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from fedmq.broker.entries import (
    MESSAGES,
    PAYLOAD,
    Accepted,
    AnyEntry,
    BlobName,
    Consumed,
    Ended,
    Opened,
    Refusal,
    blob_name,
    decode_piece,
    segment_numbers,
    segment_path,
)
from fedmq.broker.errors import LedgerError
from fedmq.broker.payload import PayloadIndex
from fedmq.broker.reading import EntryIndex, Follower
from fedmq.broker.records import scan
from fedmq.broker.wire import EMPTY, Buffer, Message, digest


class Trace:
    """What a ledger tells of one run.

    Args:
        folder: of the run, or of its ledger.
        run: id of the run; empty for the only one there is.

    Attributes:
        folder: of the ledger.
        opened: what the aggregator brought.
        damage: what stops the reading before the end, or None.
        torn: a tail that is no whole record: (segment, offset, bytes), or None.

    Raises:
        LedgerError: there is no ledger, or no such run in it.
    """

    def __init__(self, folder: Path, run: str = "") -> None:
        self.folder = folder / "ledger" if (folder / "ledger").is_dir() else folder
        if not segment_numbers(self.folder, MESSAGES):
            raise LedgerError(f"expected a run's folder with a ledger in it, {folder} holds none")
        self._entries = EntryIndex(self.folder)
        self.damage: LedgerError | None = None
        self._runs: dict[str, Opened] = {}
        follower = Follower(self.folder)
        try:
            for entry in follower.poll():
                self._entries.add(entry.seq, *follower.at)
                if isinstance(entry, Opened):
                    self._runs[entry.run] = entry
        except LedgerError as error:
            self.damage = error
        self.torn = follower.torn() if self.damage is None else None
        self.opened = self._choose(run)

    @property
    def run(self) -> str:
        """Return the id of the run."""
        return self.opened.run

    def entries(self) -> Iterator[AnyEntry]:
        """Yield the entries of the run, in order.

        Raises:
            LedgerError: what lies behind cannot be read; all before it has been yielded.
        """
        mine: set[int] = set()
        alone = len(self._runs) == 1
        for entry in Follower(self.folder).poll():
            match entry:
                case Accepted(seq=seq) if not alone:
                    if entry.read().run != self.run:
                        continue
                    mine.add(seq)
                case Consumed(of=of) if not alone and of[0] not in mine:
                    continue
                case Opened(run=run) | Refusal(run=run) | Ended(run=run) if run != self.run:
                    continue
            yield entry

    def entry(self, seq: int) -> AnyEntry:
        """Return one entry of the ledger, of whatever run.

        Raises:
            LedgerError: there is none of this number, or it cannot be read.
        """
        try:
            return self._entries.read(seq)
        except LedgerError:
            if self.damage is not None:
                raise self.damage from None
            raise

    def blob(self, message: Message, index: int) -> Buffer:
        """Return the bytes of a message's blob; they are those that it names.

        Raises:
            LedgerError: they are damaged, were not kept, or there is no such blob.
        """
        if not 0 <= index < len(message.blobs):
            raise LedgerError(f"{message.id} has {len(message.blobs)} blobs, there is no {index}")
        blob = message.blobs[index]
        if not blob.size and blob.digest == EMPTY:
            return b""
        name = blob_name(message, blob)
        payload, damage = self._payload
        if payload.size_of(name) != blob.size:
            what = f"blob {index} of {message.id} ({blob.digest.hex()})"
            raise damage or LedgerError(f"{what} is not in the ledger: its payload was not kept")
        data = payload.read(name, 0, blob.size)
        if digest(data) != blob.digest:
            raise self._damage_of(payload, name)
        return data

    def check_payload(self) -> Iterator[int]:
        """Read all payload there is; yield the size of each piece.

        Raises:
            LedgerError: damage, located; all before it in this segment has been yielded.
        """
        for number in segment_numbers(self.folder, PAYLOAD):
            path = segment_path(self.folder, PAYLOAD, number)
            for record in scan(path):
                decode_piece(record, path)
                yield record.data_length

    def _choose(self, run: str) -> Opened:
        names = ", ".join(self._runs)
        if run and run not in self._runs:
            raise LedgerError(f"expected a run of this ledger ({names}), got {run!r}")
        if not self._runs:
            if self.damage is not None:
                raise self.damage
            raise LedgerError(f"no run was ever opened in {self.folder}")
        if not run and len(self._runs) > 1:
            raise LedgerError(f"this ledger holds several runs, name one with --run-id: {names}")
        return self._runs[run] if run else next(iter(self._runs.values()))

    @functools.cached_property
    def _payload(self) -> tuple[PayloadIndex, LedgerError | None]:
        """What can be found of the payload, and what damage was met first."""
        index, damage = PayloadIndex(self.folder), None
        for number in segment_numbers(self.folder, PAYLOAD):
            try:
                index.add_segment(number, verify=False)
            except LedgerError as error:
                damage = damage or error
        return index, damage

    def _damage_of(self, payload: PayloadIndex, name: BlobName) -> LedgerError:
        """Find the piece of a blob that is not what was written."""
        for number in payload.segments_of(name):
            path = segment_path(self.folder, PAYLOAD, number)
            try:
                for _ in scan(path):
                    pass
            except LedgerError as error:
                return error
        return LedgerError(f"blob {name.digest.hex()} is not the bytes that its name says")
