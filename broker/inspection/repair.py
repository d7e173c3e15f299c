"""Repair a damaged ledger so that a broker can continue: `plan` lists steps, `repair` does them.

Nothing is destroyed. Bytes cut from a segment are kept in a file beside it, and a removed segment
is renamed.

- The entries are truncated at their first damage, or before the newest checkpoint if that lacks
  bytes. Later segments are set aside.
- Damaged payload is removed from its segment. The broker then rejects unfinished messages that need
  it.
- Missing segments are recorded as gone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fedmq.broker.errors import LedgerDamage, LedgerError, io_error
from fedmq.broker.file_modes import open_private, write_private
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
from fedmq.broker.ledger.segment_writer import blocks, set_aside, sync_folder, unused_name
from fedmq.broker.ledger.sync_point import SYNC_POINT_FILE


class RepairAction(StrEnum):
    """What a step does to a segment."""

    CUT = "cut"
    """Move everything from an offset on to a file beside it."""
    TAKE_OUT = "take-out"
    """Move the damaged ranges of a payload segment to files beside it."""
    RENAME = "rename"
    """Rename the segment, so that no broker reads it."""
    HEADER = "header"
    """Rewrite the first bytes; the rest is sound."""
    FORGET = "forget"
    """Record a missing segment as gone."""
    GIVE_UP = "give-up"
    """Record lost blobs as gone; the broker rejects unfinished messages that need them."""


@dataclass(frozen=True)
class RepairStep:
    """A step of a repair.

    segment: name of the file. offset, size: the bytes that are set aside. count: number of blobs.
    """

    action: RepairAction
    segment: str
    offset: int = 0
    size: int = 0
    count: int = 0

    def __str__(self) -> str:
        """Return the step as a sentence."""
        match self.action:
            case RepairAction.CUT:
                return (
                    f"truncate {self.segment} at byte {self.offset:,}: move {self.size:,} bytes "
                    "to a file beside it"
                )
            case RepairAction.TAKE_OUT:
                return f"move {self.size:,} damaged bytes of {self.segment} to a file beside it"
            case RepairAction.RENAME:
                return f"rename {self.segment} ({self.size:,} bytes)"
            case RepairAction.HEADER:
                return f"rewrite the first {len(MAGIC)} bytes of {self.segment}"
            case RepairAction.FORGET:
                return f"record that {self.segment} is gone"
            case RepairAction.GIVE_UP:
                return f"give up {self.count:,} lost blob{'' if self.count == 1 else 's'}"


def plan(report: Report) -> list[RepairStep]:
    """Return the steps after which a broker can continue; none for a sound ledger.

    Raises:
        LedgerError: a file cannot be read: fix the device or the permissions first.
    """
    for finding in report.findings:
        if finding.kind is FindingKind.READING:
            raise LedgerError(
                f"{finding.reason}; fix the device or the permissions first",
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
            # After a damaged header, records are readable; in another kind of file, none are.
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
        # Without any entry, no message names the payload.
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
    """Do the steps of `plan`; return the steps done.

    Args:
        folder: of the ledger.
        now: in seconds since 1970, recorded with the repair.

    Raises:
        LedgerError: a broker is writing there, or a file cannot be read or written.
    """
    lock = FolderLock(folder)
    try:
        done: list[RepairStep] = []
        # Repaired damage may have hidden more: repeat until none is left.
        while steps := plan(report := check(folder)):
            lost = [each.name for each in report.lost]
            note_repair(folder, now, [str(step) for step in steps], lost)
            manifest = Manifest(folder)
            # It describes the segments before the repair.
            (folder / SYNC_POINT_FILE).unlink(missing_ok=True)
            sync_folder(folder)
            for step in steps:
                _do(report, manifest, step)
            _ensure_segments(folder, manifest)
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
                damage = [each for each in report.findings if each.segment == step.segment]
                _take_out(path, damage)
            case RepairAction.RENAME:
                _record_gone(manifest, step.segment)
                path.rename(unused_name(path, "set-aside"))
            case RepairAction.HEADER:
                set_aside(path, 0, len(MAGIC))
                with path.open("r+b") as file:
                    file.write(MAGIC)
                    file.flush()
                    os.fsync(file.fileno())
            case RepairAction.FORGET:
                _record_gone(manifest, step.segment)
            case RepairAction.GIVE_UP:
                pass  # `note_repair` has recorded it
    except OSError as error:
        raise io_error(f"cannot {step.action}", error, step.segment, step.offset) from None


def _take_out(path: Path, findings: Iterable[Finding]) -> None:
    """Rewrite a segment without its damaged ranges, which are kept in files beside it."""
    for finding in findings:
        set_aside(path, finding.offset, finding.offset + finding.size)
    new = unused_name(path, "new")
    try:
        _copy_whole(path, new)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _copy_whole(path: Path, new: Path) -> None:
    """Copy the whole records to another file."""
    with path.open("rb") as source, open_private(new, "xb") as target:
        target.write(MAGIC)
        for found in walk(path):
            if not isinstance(found, Record):
                continue
            try:
                decode_chunk(found, path)
            except LedgerDamage:
                continue
            target.writelines(blocks(source, found.offset, found.end))
        target.flush()
        os.fsync(target.fileno())


def _ensure_segments(folder: Path, manifest: Manifest) -> None:
    """Create a segment for a family without one: a broker refuses a folder without it."""
    present = {family: segment_numbers(folder, family) for family in (MESSAGES, PAYLOAD)}
    for family, numbers in present.items():
        if not numbers:
            path = segment_path(folder, family, 0)
            try:
                write_private(path, MAGIC)
            except OSError as error:
                raise io_error("cannot write", error, path.name) from None
    if manifest.exists:
        manifest.begin()


def _record_gone(manifest: Manifest, segment: str) -> None:
    family, _, number = segment.removesuffix(".log").partition("-")
    if manifest.exists:
        manifest.remove(family, int(number))
