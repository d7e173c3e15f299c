"""Mending a damaged ledger so far that a broker goes on: `plan` says how, `repair` does it.

Nothing is destroyed. What is cut from a segment is kept in a file beside it, and a segment that
is taken out gets another name.

- The entries end where the first damage among them begins, or before the newest checkpoint, if
  that lacks bytes. What lies behind is set aside.
- Damaged payload is taken out of its segment. The broker then tells the senders of unfinished
  messages that their bytes are gone.
- Segments that are missing are missed no more.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fedmq.broker.errors import LedgerDamage, LedgerError, io_error
from fedmq.broker.inspection.check import Finding, FindingKind, Report, check
from fedmq.broker.inspection.repair_notes import note_repair
from fedmq.broker.ledger.entries import (
    MESSAGES,
    PAYLOAD,
    decode_chunk,
    segment_numbers,
    segment_path,
)
from fedmq.broker.ledger.lock import FolderLock
from fedmq.broker.ledger.manifest import Manifest
from fedmq.broker.ledger.records import MAGIC, Record, walk
from fedmq.broker.ledger.segment_writer import copy_bytes, set_aside, sync_folder, unused_name


class RepairAction(StrEnum):
    """What a step does to a segment."""

    CUT = "cut"
    """Everything from an offset on is moved into a file beside it."""
    TAKE_OUT = "take-out"
    """What is damaged in a segment of payload is moved into files beside it."""
    RENAME = "rename"
    """All of it gets another name, which no broker looks at."""
    HEADER = "header"
    """Its first bytes are written again; nothing else is wrong with it."""
    FORGET = "forget"
    """It is not there, and is not missed any more."""
    GIVE_UP = "give-up"
    """Blobs that are lost are not missed any more; senders of unfinished messages are told."""


@dataclass(frozen=True)
class RepairStep:
    """One thing that a repair does.

    segment: name of the file. offset, size: which bytes of it are set aside. count: of blobs.
    """

    action: RepairAction
    segment: str
    offset: int = 0
    size: int = 0
    count: int = 0

    def __str__(self) -> str:
        """Return what it does, as a sentence."""
        match self.action:
            case RepairAction.CUT:
                return (
                    f"cut {self.segment} at byte {self.offset:,}: {self.size:,} bytes go to a "
                    "file beside it"
                )
            case RepairAction.TAKE_OUT:
                return f"move {self.size:,} damaged bytes of {self.segment} to a file beside it"
            case RepairAction.RENAME:
                return f"set {self.segment} aside as a whole ({self.size:,} bytes)"
            case RepairAction.HEADER:
                return f"write the first {len(MAGIC)} bytes of {self.segment} again"
            case RepairAction.FORGET:
                return f"go on without {self.segment}, which is missing"
            case RepairAction.GIVE_UP:
                return f"give up what is lost: {self.count:,} blob{'' if self.count == 1 else 's'}"


def plan(report: Report) -> list[RepairStep]:
    """Return what would make a broker go on with this ledger; nothing if it does already.

    Raises:
        LedgerError: a file cannot be read: a device, or its file system, must be mended first.
    """
    for finding in report.findings:
        if finding.kind is FindingKind.READING:
            raise LedgerError(
                f"{finding.reason}; mend the device, or the permissions, first",
                finding.segment,
                finding.offset,
            )
    steps = _messages_steps(report)
    damaged: dict[str, list[Finding]] = {}
    for finding in report.findings:
        if finding.family == PAYLOAD and finding.kind is not FindingKind.MISSING:
            damaged.setdefault(finding.segment, []).append(finding)
    gone = {each.segment for each in steps if each.action is RepairAction.RENAME}
    for segment, findings in damaged.items():
        size = (report.folder / segment).stat().st_size
        if segment in gone:
            continue
        if all(each.kind is FindingKind.FORMAT for each in findings):
            # The records behind a header that is wrong are read; of another kind of file, none.
            whole = findings[0].size > len(MAGIC)
            action = RepairAction.RENAME if whole else RepairAction.HEADER
            steps.append(RepairStep(action, segment, 0, size if whole else 0))
        else:
            steps.append(
                RepairStep(RepairAction.TAKE_OUT, segment, 0, sum(each.size for each in findings))
            )
    for finding in report.findings:
        if finding.kind is FindingKind.MISSING and not finding.breaks:
            steps.append(RepairStep(RepairAction.FORGET, finding.segment))
    if report.lost:
        steps.append(RepairStep(RepairAction.GIVE_UP, "", count=len(report.lost)))
    return steps


def _messages_steps(report: Report) -> list[RepairStep]:
    folder = report.folder
    steps = [
        RepairStep(RepairAction.HEADER, each.segment)
        for each in report.findings
        if each.family == MESSAGES and each.kind is FindingKind.FORMAT and not each.breaks
    ]
    breaking = report.breaking
    if breaking is None:
        return steps
    names = [segment_path(folder, MESSAGES, n).name for n in segment_numbers(folder, MESSAGES)]
    if not names or breaking.kind is FindingKind.EMPTY:
        # Without any entry, payload is bytes that nobody names.
        forget = [] if names else [RepairStep(RepairAction.FORGET, breaking.segment)]
        names += [segment_path(folder, PAYLOAD, n).name for n in segment_numbers(folder, PAYLOAD)]
        aside = [
            RepairStep(RepairAction.RENAME, name, 0, (folder / name).stat().st_size)
            for name in names
        ]
        return aside + forget
    whole = breaking.kind in (FindingKind.FORMAT, FindingKind.NUMBER) and breaking.offset == 0
    if breaking.kind is FindingKind.MISSING:
        steps.append(RepairStep(RepairAction.FORGET, breaking.segment))
    elif whole:
        steps.append(RepairStep(RepairAction.RENAME, breaking.segment, 0, breaking.size))
    else:
        size = (folder / breaking.segment).stat().st_size - breaking.offset
        steps.append(RepairStep(RepairAction.CUT, breaking.segment, breaking.offset, size))
    steps += [
        RepairStep(RepairAction.RENAME, name, 0, (folder / name).stat().st_size)
        for name in names
        if name > breaking.segment
    ]
    return steps


def repair(folder: Path, now: float) -> list[RepairStep]:
    """Do what `plan` says; return what was done.

    Args:
        folder: of the ledger.
        now: in seconds since 1970, for the note of what was done.

    Raises:
        LedgerError: a broker is writing there, or the operating system refuses something.
    """
    lock = FolderLock(folder)
    try:
        done: list[RepairStep] = []
        # What was behind the damage may have hidden more of it: each round leaves less.
        while steps := plan(report := check(folder)):
            lost = [each.name for each in report.lost]
            note_repair(folder, now, [str(step) for step in steps], lost)
            manifest = Manifest(folder)
            for step in steps:
                _do(report, manifest, step)
            _leave_a_beginning(folder, manifest)
            sync_folder(folder)
            done += steps
    finally:
        lock.release()
    return done


def _do(report: Report, manifest: Manifest, step: RepairStep) -> None:
    path = report.folder / step.segment
    try:
        match step.action:
            case RepairAction.CUT:
                set_aside(path, step.offset, step.offset + step.size)
                os.truncate(path, step.offset)
            case RepairAction.TAKE_OUT:
                gaps = [each for each in report.findings if each.segment == step.segment]
                _take_out(path, gaps)
            case RepairAction.RENAME:
                _forget(manifest, step.segment)
                path.rename(unused_name(path, "set-aside"))
            case RepairAction.HEADER:
                set_aside(path, 0, len(MAGIC))
                with path.open("r+b") as file:
                    file.write(MAGIC)
                    file.flush()
                    os.fsync(file.fileno())
            case RepairAction.FORGET:
                _forget(manifest, step.segment)
            case RepairAction.GIVE_UP:
                pass  # it is in the note of this repair
    except OSError as error:
        raise io_error(f"cannot {step.action}", error, step.segment, step.offset) from None


def _take_out(path: Path, findings: Iterable[Finding]) -> None:
    """Write a segment again without what is damaged; that is kept beside it."""
    for finding in findings:
        set_aside(path, finding.offset, finding.offset + finding.size)
    fresh = unused_name(path, "new")
    try:
        _copy_whole(path, fresh)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _copy_whole(path: Path, fresh: Path) -> None:
    """Copy the pieces that are whole to another file."""
    with path.open("rb") as source, fresh.open("xb") as target:
        target.write(MAGIC)
        for found in walk(path):
            if not isinstance(found, Record):
                continue
            try:
                decode_chunk(found, path)
            except LedgerDamage:
                continue
            copy_bytes(source, target, found.offset, found.end)
        target.flush()
        os.fsync(target.fileno())


def _leave_a_beginning(folder: Path, manifest: Manifest) -> None:
    """See to it that each family has a segment: a folder with one of them alone is refused."""
    present = {family: segment_numbers(folder, family) for family in (MESSAGES, PAYLOAD)}
    for family, numbers in present.items():
        if not numbers:
            path = segment_path(folder, family, 0)
            try:
                path.write_bytes(MAGIC)
            except OSError as error:
                raise io_error("cannot write", error, path.name) from None
    if manifest.exists:
        manifest.begin()


def _forget(manifest: Manifest, segment: str) -> None:
    family, _, number = segment.removesuffix(".log").partition("-")
    if manifest.exists:
        manifest.remove(family, int(number))
