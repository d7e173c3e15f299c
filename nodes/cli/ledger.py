"""``fedmq ledger``: find damage in a ledger, and repair it so that a broker can use it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from fedmq.broker.errors import LedgerError
from fedmq.broker.ledger.entries import Accepted, AnyEntry
from fedmq.nodes.cli.options import LONGEST_TEXT, Commands, folder_argument
from fedmq.nodes.process.terminal import count, plain, plural

if TYPE_CHECKING:
    from fedmq.broker.inspection.check import Finding, LostBlob, Report
    from fedmq.broker.inspection.repair import RepairStep

_SHOWN = 10
"""Blobs that are printed for each damaged place, at most; the JSON has all."""

_json = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead of text."
)


@click.group(cls=Commands)
def ledger() -> None:
    """Check a ledger for damage, or repair it.

    DIR is the folder of the run or of its ledger.
    """


@ledger.command()
@folder_argument
@_json
def check(folder: Path, as_json: bool) -> None:  # noqa: FBT001 - click's
    """Read a whole ledger; list the damage and what it affects.

    Changes nothing. Exit code 0: sound (an incomplete last record, which the broker truncates, is
    no damage); 1: damaged; 2: no ledger found. Only runs that have not ended have unfinished
    messages.
    """
    report = _checked(folder)
    if as_json:
        click.echo(json.dumps(facts(report), indent=2))
    else:
        for line in lines(report):
            click.echo(line)
        if not report.sound:
            shown = plain(folder, LONGEST_TEXT)
            click.echo(f"`fedmq ledger repair {shown}` lists the changes that repair it")
    sys.exit(0 if report.sound else 1)


@ledger.command()
@folder_argument
@click.option("--yes", is_flag=True, help="Make the changes.")
@_json
def repair(folder: Path, yes: bool, as_json: bool) -> None:  # noqa: FBT001 - click's
    """Repair a damaged ledger so that a broker can use it.

    Without --yes, list the changes and the losses. Removed bytes stay in files beside the
    segments. Exit code 0: repaired, or nothing to repair; 1: there are changes to make; 2: it
    cannot be repaired; the error gives the reason.
    """
    from fedmq.broker.inspection.repair import plan
    from fedmq.broker.inspection.repair import repair as do

    report = _checked(folder)
    try:
        steps = plan(report)
        if yes and steps:
            steps = do(report.folder, time.time())
    except LedgerError as error:
        _fail(error)
    states = _later_states(report) if steps else []
    if as_json:
        done = {"steps": [_step(each) for each in steps], "done": yes}
        click.echo(json.dumps({**facts(report), **done, "states": [*map(str, states)]}, indent=2))
    else:
        for line in lines(report):
            click.echo(line)
        click.echo(
            ("changes made:" if yes else "changes to make:") if steps else "nothing to repair"
        )
        for step in steps:
            click.echo(f"  {step}")
        for path in states:
            click.echo(f"  set aside {plain(path, LONGEST_TEXT)}: it belongs to a later task")
        if steps and not yes:
            click.echo("nothing was changed; add --yes to make these changes")
    if yes:
        _set_aside(states)
    sys.exit(1 if steps and not yes else 0)


def _checked(folder: Path) -> Report:
    from fedmq.broker.inspection.check import check

    try:
        return check(folder)
    except LedgerError as error:
        _fail(error)


def _fail(error: LedgerError) -> NoReturn:
    click.echo(f"fedmq: {plain(error, LONGEST_TEXT)}", err=True)
    sys.exit(2)


def lines(report: Report) -> Iterator[str]:
    """Yield the lines of the report."""
    segments = plural(len(report.segments), "segment")
    size = sum(nbytes for _, nbytes, _ in report.segments)
    yield f"ledger {plain(report.folder, LONGEST_TEXT)}: {segments}, {count(size)} bytes"
    runs = ", ".join(plain(each) for each in report.runs) or "none"
    yield (
        f"{count(report.entries)} usable entries, "
        f"{plural(report.unfinished, 'unfinished message')}; runs: {runs}"
    )
    deleted = f", {count(report.not_kept)} deleted by the retention policy" * bool(report.not_kept)
    given_up = f", {count(report.given_up)} given up by a repair" if report.given_up else ""
    yield f"{plural(report.blobs, 'blob')} of messages{deleted}{given_up}"
    for tail in report.tails:
        yield (
            f"incomplete last record: {tail.segment}, byte {count(tail.offset)}: "
            f"{count(tail.size)} bytes; the broker truncates it"
        )
    placed = {(each.segment, each.offset) for each in report.findings}
    for finding in report.findings:
        reason = plain(finding.reason, LONGEST_TEXT)
        yield f"damaged: {finding.segment}, {_bytes(finding)}: {reason}"
        if finding.breaks:
            yield from _lost_entries(finding, report)
        here = [
            each
            for each in report.lost
            if (each.segment, each.offset) == (finding.segment, finding.offset)
        ]
        yield from _blobs(here)
        if finding.family == "payload" and not here:
            yield "  no message needs it"
    others = [each for each in report.lost if (each.segment, each.offset) not in placed]
    if others:
        yield "lost, but not in a damaged record:"
        yield from _blobs(others)
    if report.sound:
        yield "sound"
        return
    needed = sum(each.needed for each in report.lost)
    yield (
        f"{plural(len(report.findings), 'damaged place')}, {plural(len(report.lost), 'lost blob')}"
        f", {count(needed)} of them needed by unfinished messages"
    )


def _bytes(finding: Finding) -> str:
    if not finding.size:
        return "the whole file"
    return f"bytes {count(finding.offset)} to {count(finding.offset + finding.size - 1)}"


def _lost_entries(finding: Finding, report: Report) -> Iterator[str]:
    """Yield which entries are lost, and whether a run needs them."""
    if finding.entries is not None:
        first, last = finding.entries
        which = (
            f"entry {count(first)}" if first == last else f"entries {count(first)} to {count(last)}"
        )
        yield f"  lost: {which}"
    if report.behind:
        kinds = ", ".join(f"{plain(kind)} {n:,}" for kind, n in report.kinds_behind().most_common())
        first, last = report.behind[0].seq, report.behind[-1].seq
        yield (
            f"  unusable after it: {count(len(report.behind))} intact entries, {count(first)} to "
            f"{count(last)} ({kinds})"
        )
    for run in report.runs:
        if run in report.ended:
            yield f"  run {plain(run)} ended before and does not need them"
        else:
            yield f"  run {plain(run)} needs them; it would resume from entry {report.entries - 1}"
    if not report.runs:
        yield "  no run remains: a broker would start with an empty ledger"


def _blobs(lost: list[LostBlob]) -> Iterator[str]:
    for each in lost[:_SHOWN]:
        by = ", ".join(map(str, each.named_by[:3])) + (", ..." if len(each.named_by) > 3 else "")
        use = "needed by an unfinished message" if each.needed else "no unfinished message needs it"
        yield (
            f"  lost: blob {each.name.digest.hex()} of {plain(each.name.owner)} "
            f"({count(each.size)} bytes, message {by}); {use}"
        )
    if len(lost) > _SHOWN:
        yield f"  ... and {count(len(lost) - _SHOWN)} more blobs"


def facts(report: Report) -> dict[str, Any]:
    """Return the report for programs."""
    return {
        "ledger": str(report.folder),
        "sound": report.sound,
        "entries": report.entries,
        "unfinished": report.unfinished,
        "runs": {run: {"ended": run in report.ended} for run in report.runs},
        "segments": [
            {"name": name, "bytes": nbytes, "records": records}
            for name, nbytes, records in report.segments
        ],
        "damage": [_finding(each) for each in report.findings],
        "tails": [_finding(each) for each in report.tails],
        "behind": {
            "entries": [_entry(each) for each in report.behind],
            "kinds": dict(report.kinds_behind()),
        },
        "blobs": {
            "named": report.blobs,
            "not_kept": report.not_kept,
            "given_up": report.given_up,
            "lost": [
                {
                    "run": each.name.run,
                    "owner": each.name.owner,
                    "digest": each.name.digest.hex(),
                    "bytes": each.size,
                    "messages": each.named_by,
                    "needed": each.needed,
                    "reason": each.reason,
                    "segment": each.segment,
                    "offset": each.offset,
                }
                for each in report.lost
            ],
        },
    }


def _entry(entry: AnyEntry) -> dict[str, Any]:
    if not isinstance(entry, Accepted):
        return {"entry": entry.seq, "kind": type(entry).__name__.lower()}
    message = entry.read()
    return {"entry": entry.seq, "kind": message.kind, "id": message.id, "from": message.sender}


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "kind": finding.kind.value,
        "segment": finding.segment,
        "offset": finding.offset,
        "bytes": finding.size,
        "reason": finding.reason,
        "entries": finding.entries,
        "breaks": finding.breaks,
    }


def _step(step: RepairStep) -> dict[str, Any]:
    return {
        "action": step.action.value,
        "segment": step.segment,
        "offset": step.offset,
        "bytes": step.size,
        "blobs": step.count,
        "text": str(step),
    }


def _later_states(report: Report) -> list[Path]:
    """Return the files of clients' states from tasks that the repaired ledger does not contain.

    The numbers of these tasks, which the files have, will be given to other tasks.
    """
    if report.breaking is None or report.folder.name != "ledger":
        return []
    found = (report.folder.parent / "clients").glob("*/*/client-*/*.state")
    return sorted(p for p in found if p.stem.isdecimal() and int(p.stem) >= report.entries)


def _set_aside(states: list[Path]) -> None:
    for path in states:
        try:
            path.rename(path.with_name(f"{path.name}.set-aside"))
        except OSError as error:
            click.echo(f"fedmq: cannot set aside {plain(path)}: {error.strerror}", err=True)
            sys.exit(2)
