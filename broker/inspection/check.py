"""Check a whole ledger: find the damage, and what would be lost with it. Changes nothing.

Entries form a chain: none after the first damaged one can be used. Damaged payload affects only
the blobs in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from fedmq.broker.core.mailboxes import Mailboxes
from fedmq.broker.errors import LedgerDamage, LedgerError, NotKept
from fedmq.broker.inspection.repair_notes import accepted_losses
from fedmq.broker.inspection.verified_blobs import VerifiedBlobReader
from fedmq.broker.ledger.entries import (
    MESSAGES,
    PAYLOAD,
    Accepted,
    AnyEntry,
    BlobName,
    blob_name,
    decode_chunk,
    decode_entries,
    ledger_folder,
    segment_numbers,
    segment_path,
)
from fedmq.broker.ledger.manifest import Manifest
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.records import MAGIC, DamageKind, Record, walk
from fedmq.broker.recovery import Restorer
from fedmq.broker.wire.addresses import CHECKPOINT
from fedmq.broker.wire.schema import EMPTY


class FindingKind(StrEnum):
    """What is wrong in a ledger; the first five are those of `records.DamageKind`."""

    TORN = "torn"
    LAST = "last"
    LENGTHS = "lengths"
    CHECKSUM = "checksum"
    FORMAT = "format"
    CONTENT = "content"
    """A whole record whose content is not valid."""
    NUMBER = "number"
    """An entry or a segment with another number than expected."""
    MISSING = "missing"
    """A segment that is missing."""
    CHECKPOINT = "checkpoint"
    """A run's newest checkpoint, a whole entry, lacks bytes; the one before it may be complete."""
    READING = "reading"
    """The operating system cannot read it."""
    EMPTY = "empty"
    """There is payload, but no whole entry."""


@dataclass
class LostBlob:
    """An incomplete blob that a message names.

    Attributes:
        name: of the blob.
        size: in bytes.
        named_by: numbers of the messages that name it.
        needed: whether one of them is unfinished.
        reason: what is wrong with the blob.
        segment, offset: position of the damage, if known.
    """

    name: BlobName
    size: int
    named_by: list[int]
    needed: bool
    reason: str
    segment: str = ""
    offset: int = 0


@dataclass
class Finding:
    """Damage in a ledger.

    Attributes:
        kind: what is wrong.
        segment: name of the file.
        offset, size: the damaged bytes; size 0 if the whole segment is missing.
        reason: what is wrong, for people.
        entries: numbers of the first and the last entry that it affects, if known.
        breaks: whether no entry after it can be used.
    """

    kind: FindingKind
    segment: str
    offset: int
    size: int
    reason: str
    entries: tuple[int, int] | None = None
    breaks: bool = False

    @property
    def family(self) -> str:
        """Return the family of its segment."""
        return MESSAGES if self.segment.startswith(MESSAGES) else PAYLOAD


@dataclass
class Report:
    """The result of a check.

    Attributes:
        folder: of the ledger.
        segments: (name, bytes, records) of each segment.
        entries: number of usable entries; a broker would continue with this number.
        findings: the damage, in order.
        tails: incomplete last records after a crash: the broker truncates them by itself.
        behind: whole entries that are lost because they come after damage.
        lost: incomplete blobs that a message names.
        blobs: number of different blobs that messages name.
        not_kept: number of these that retention has deleted.
        given_up: number of these that an earlier repair has given up.
        unfinished: number of unfinished messages before the damage.
        runs, ended: ids of all runs before the damage, and of those that have ended.
    """

    folder: Path
    segments: list[tuple[str, int, int]] = field(default_factory=list)
    entries: int = 0
    findings: list[Finding] = field(default_factory=list)
    tails: list[Finding] = field(default_factory=list)
    behind: list[AnyEntry] = field(default_factory=list)
    lost: list[LostBlob] = field(default_factory=list)
    blobs: int = 0
    not_kept: int = 0
    given_up: int = 0
    unfinished: int = 0
    runs: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Return whether nothing is damaged or lost; a torn tail is not damage."""
        return not (self.findings or self.lost)

    @property
    def breaking(self) -> Finding | None:
        """Return the damage after which no entry can be used, or None."""
        return next((each for each in self.findings if each.breaks), None)

    def kinds_behind(self) -> Counter[str]:
        """Return the number of entries after the damage, by kind."""
        return Counter(
            each.read().kind if isinstance(each, Accepted) else type(each).__name__.lower()
            for each in self.behind
        )


def check(folder: Path) -> Report:
    """Read and check all of a ledger.

    Args:
        folder: of the ledger, or of its run.

    Raises:
        LedgerError: there is no ledger, or the folder cannot be read.
    """
    report = Report(ledger_folder(folder))
    manifest = Manifest(report.folder)
    messages = segment_numbers(report.folder, MESSAGES)
    payload = segment_numbers(report.folder, PAYLOAD)
    if not (messages or payload or manifest.expected):
        raise LedgerError(f"expected a run's folder with a ledger in it, {folder} holds none")
    restorer = Restorer(Mailboxes())
    chain = _Chain(report, restorer)
    named = chain.read(messages)
    if not messages:
        reason = "there are no messages-*.log: the payload cannot be assigned to messages"
        name = segment_path(report.folder, MESSAGES, 0).name
        report.findings.append(Finding(FindingKind.MISSING, name, 0, 0, reason, breaks=True))
    for number in payload:
        _read_payload(report, number, last=number == payload[-1])
    if messages and not report.entries and report.breaking is None:
        _check_begun(report)
    known = {each.segment for each in report.findings}
    for missing in manifest.missing():
        name = segment_path(report.folder, *missing).name
        if name not in known:
            reason = "the segment is missing"
            report.findings.append(Finding(FindingKind.MISSING, name, 0, 0, reason))
    report.runs = list(restorer.mailboxes.runs)
    report.ended = [name for name, run in restorer.mailboxes.runs.items() if run.over]
    report.unfinished = len(restorer.unfinished)
    newest = [
        run.checkpoint
        for run in restorer.mailboxes.runs.values()
        if run.checkpoint is not None and not run.over
    ]
    needed, vital = (
        {blob_name(message, blob) for message in messages for blob in message.blobs}
        for messages in (
            restorer.unfinished.values(),
            [restorer.unfinished[seq] for seq in newest if seq in restorer.unfinished],
        )
    )
    payload_missing = any(family == PAYLOAD for family, _ in manifest.missing())
    given_up = accepted_losses(report.folder) - vital
    _read_blobs(report, named, needed, given_up, kept_all=payload_missing or not payload)
    _check_checkpoints(report, newest, chain)
    return report


def _check_begun(report: Report) -> None:
    """Report message segments without an entry, if there is payload."""
    name = next(name for name, _, _ in report.segments if name.startswith(MESSAGES))
    if any(records for other, _, records in report.segments if other.startswith(PAYLOAD)):
        reason = "there is no whole entry: the payload cannot be assigned to messages"
        size = _size(report.folder / name)
        report.findings.append(Finding(FindingKind.EMPTY, name, 0, size, reason, breaks=True))
        report.tails = [each for each in report.tails if each.segment != name]


def _check_checkpoints(report: Report, newest: list[int], chain: _Chain) -> None:
    """Report the first of the newest checkpoints that lacks bytes."""
    lost = {seq for blob in report.lost if blob.needed for seq in blob.named_by}
    bad = sorted(lost & set(newest))
    if not bad or report.breaking is not None:
        return
    path, record = chain.checkpoints[bad[0]]
    reason = f"the newest checkpoint, entry {bad[0]}, lacks bytes"
    size = record.end - record.offset
    found = Finding(
        FindingKind.CHECKPOINT,
        path.name,
        record.offset,
        size,
        reason,
        (bad[0], bad[0]),
        breaks=True,
    )
    report.findings.append(found)
    report.behind = [each for each in read_entries(report.folder) if each.seq > bad[0]]
    report.entries = bad[0]


Named = dict[tuple[BlobName, int], list[int]]
"""Numbers of the messages that name a blob, by (name, size)."""


class _Chain:
    """Reads the entries, one segment after the other."""

    def __init__(self, report: Report, restorer: Restorer) -> None:
        self._report, self._restorer = report, restorer
        self._named: Named = {}
        self.checkpoints: dict[int, tuple[Path, Record]] = {}
        """(segment, record) of each checkpoint, by number."""
        self._open: Finding | None = None
        """Damage whose affected entries are not known yet."""

    def read(self, numbers: Sequence[int]) -> Named:
        for number in numbers:
            path = segment_path(self._report.folder, MESSAGES, number)
            self._begin(number, path)
            records = 0
            for found in _each(path, self._report, last=number == numbers[-1], chain=self):
                records += 1
                try:
                    entries = decode_entries(found, path)
                except LedgerDamage as error:
                    self.broken(FindingKind.CONTENT, path, found.offset, found.end, error.reason)
                else:
                    self._take(entries, path, found)
            self._report.segments.append((path.name, _size(path), records))
        return self._named

    def broken(self, kind: FindingKind, path: Path, offset: int, end: int, reason: str) -> None:
        """Report damage; no entry after the first damage can be used."""
        first = self._report.breaking is None
        found = Finding(kind, path.name, offset, end - offset, reason, breaks=first)
        self._report.findings.append(found)
        if first:
            self._open = found

    def _begin(self, number: int, path: Path) -> None:
        expected = self._report.entries
        if self._report.breaking is not None or number == expected:
            return
        if number > expected:
            missing = segment_path(self._report.folder, MESSAGES, expected)
            reason = f"entries {expected} to {number - 1} are missing"
            self.broken(FindingKind.MISSING, missing, 0, 0, reason)
        else:
            reason = f"expected entry {expected} as the segment's first, got {number} in its name"
            self.broken(FindingKind.NUMBER, path, 0, _size(path), reason)

    def _take(self, entries: Sequence[AnyEntry], path: Path, record: Record) -> None:
        report, first = self._report, entries[0].seq
        if self._open is not None and first > report.entries:
            self._open.entries, self._open = (report.entries, first - 1), None
        if report.breaking is None and first != report.entries:
            reason = f"expected entry {report.entries}, got {first}"
            if record.offset == len(MAGIC):
                other = segment_path(report.folder, MESSAGES, first).name
                reason += f"; the segment may be {other} under another name"
            self.broken(FindingKind.NUMBER, path, record.offset, record.end, reason)
            self._open = None
        for entry in entries:
            if report.breaking is not None:
                report.behind.append(entry)
                continue
            try:
                self._restorer.feed(entry)
            except LedgerDamage as error:
                self.broken(FindingKind.CONTENT, path, record.offset, record.end, error.reason)
                continue
            report.entries = entry.seq + 1
            if isinstance(entry, Accepted):
                message = entry.read()
                if message.to == CHECKPOINT:
                    self.checkpoints[entry.seq] = path, record
                for blob in message.blobs:
                    if blob.size or blob.digest != EMPTY:
                        key = (blob_name(message, blob), blob.size)
                        self._named.setdefault(key, []).append(entry.seq)


def _each(path: Path, report: Report, *, last: bool, chain: _Chain | None) -> Iterator[Record]:
    """Yield the whole records of a segment; report everything else."""
    try:
        for found in walk(path):
            if isinstance(found, Record):
                yield found
                continue
            kind = FindingKind(found.fault)
            reason = found.error(path).reason
            size = found.end - found.offset
            if found.fault is DamageKind.TORN and (last or chain is not None):
                # In the middle of the chain, it matters only if an entry is missing.
                report.tails.append(Finding(kind, path.name, found.offset, size, reason))
            elif chain is not None and found.fault is not DamageKind.FORMAT:
                chain.broken(kind, path, found.offset, found.end, reason)
            else:
                report.findings.append(Finding(kind, path.name, found.offset, size, reason))
    except LedgerError as error:
        kind = FindingKind.FORMAT if isinstance(error, LedgerDamage) else FindingKind.READING
        start = error.offset
        if chain is not None:
            chain.broken(kind, path, start, max(start, _size(path)), error.reason)
        else:
            size = max(0, _size(path) - start)
            report.findings.append(Finding(kind, path.name, start, size, error.reason))


def _read_payload(report: Report, number: int, *, last: bool) -> None:
    path = segment_path(report.folder, PAYLOAD, number)
    records = 0
    for record in _each(path, report, last=last, chain=None):
        records += 1
        try:
            decode_chunk(record, path)
        except LedgerDamage as error:
            size = record.end - record.offset
            found = Finding(FindingKind.CONTENT, path.name, record.offset, size, error.reason)
            report.findings.append(found)
    report.segments.append((path.name, _size(path), records))


def _read_blobs(
    report: Report, named: Named, needed: set[BlobName], given_up: set[BlobName], *, kept_all: bool
) -> None:
    """Read every blob that a message names."""
    reader = VerifiedBlobReader(report.folder)
    for (name, size), seqs in named.items():
        report.blobs += 1
        what = f"blob {name.digest.hex()} of {name.owner}"
        try:
            reader.read(name, size, what)
        except LedgerError as error:
            if name in given_up:
                report.given_up += 1
            elif isinstance(error, NotKept) and not kept_all and name not in needed:
                report.not_kept += 1
            else:
                report.lost.append(
                    LostBlob(
                        name, size, seqs, name in needed, error.reason, error.segment, error.offset
                    )
                )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
