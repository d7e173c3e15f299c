"""``fedmq ledger``: what is damaged in a ledger, and how a broker can go on with it."""

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
from fedmq.nodes.cli.options import Commands
from fedmq.nodes.process.terminal import count, plain, plural

if TYPE_CHECKING:
    from fedmq.broker.inspection.check import Finding, LostBlob, Report
    from fedmq.broker.inspection.repair import RepairStep

_SHOWN = 10
"""Blobs that are printed for each place; the JSON has all."""
_SENTENCE = 2000
"""Characters of one, at most."""

_folder = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")


@click.group(cls=Commands)
def ledger() -> None:
    """Check a ledger for damage, and repair it: DIR is a run's folder, or that of its ledger."""


@ledger.command()
@_folder
@_json
def check(folder: Path, as_json: bool) -> None:  # noqa: FBT001 - click's
    """Read all of a ledger, and list what is damaged and what would be lost.

    Changes nothing. Exit code 0: sound (a torn tail, which the broker cuts by itself, is no
    damage). 1: damaged. 2: there is no ledger.
    """
    report = _checked(folder)
    if as_json:
        click.echo(json.dumps(facts(report), indent=2))
    else:
        for line in lines(report):
            click.echo(line)
        if not report.sound:
            shown = plain(folder, _SENTENCE)
            click.echo(f"`fedmq ledger repair {shown}` lists what would make a broker go on")
    sys.exit(0 if report.sound else 1)


@ledger.command()
@_folder
@click.option("--yes", is_flag=True, help="Do it; without this, nothing is changed.")
@_json
def repair(folder: Path, yes: bool, as_json: bool) -> None:  # noqa: FBT001 - click's
    """Change a damaged ledger so that a broker goes on with it.

    Without --yes, list what would be done and what would be lost. Whatever is cut is kept in
    files beside the segments. Exit code 0: there is nothing to do, or it was done. 1: there is
    something to do. 2: it cannot be done; the sentence says why.
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
        click.echo(("done:" if yes else "to do:") if steps else "there is nothing to do")
        for step in steps:
            click.echo(f"  {step}")
        for path in states:
            click.echo(f"  set {plain(path, _SENTENCE)} aside: it is of a later task")
        if steps and not yes:
            click.echo("nothing was changed; add --yes to do this")
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
    click.echo(f"fedmq: {plain(error, _SENTENCE)}", err=True)
    sys.exit(2)


def lines(report: Report) -> Iterator[str]:
    """Yield what a person is to read."""
    segments = plural(len(report.segments), "segment")
    size = sum(nbytes for _, nbytes, _ in report.segments)
    yield f"ledger {plain(report.folder, _SENTENCE)}: {segments}, {count(size)} bytes"
    runs = ", ".join(plain(each) for each in report.runs) or "none"
    yield (
        f"{count(report.entries)} usable entries, "
        f"{plural(report.unfinished, 'unfinished message')}; runs: {runs}"
    )
    kept = f", {count(report.not_kept)} not kept" if report.not_kept else ""
    given_up = f", {count(report.given_up)} given up by a repair" if report.given_up else ""
    yield f"{plural(report.blobs, 'blob')} named by messages{kept}{given_up}"
    for tail in report.tails:
        yield (
            f"torn tail: {tail.segment}, byte {count(tail.offset)}: {count(tail.size)} bytes; "
            "the broker cuts them"
        )
    placed = {(each.segment, each.offset) for each in report.findings}
    for finding in report.findings:
        yield f"damaged: {finding.segment}, {_bytes(finding)}: {plain(finding.reason, _SENTENCE)}"
        if finding.breaks:
            yield from _behind(finding, report)
        here = [
            each
            for each in report.lost
            if (each.segment, each.offset) == (finding.segment, finding.offset)
        ]
        yield from _blobs(here)
        if finding.family == "payload" and not here:
            yield "  no message misses it"
    others = [each for each in report.lost if (each.segment, each.offset) not in placed]
    if others:
        yield "lost, with no damaged record to be seen:"
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
        return "all of it"
    return f"bytes {count(finding.offset)} to {count(finding.offset + finding.size - 1)}"


def _behind(finding: Finding, report: Report) -> Iterator[str]:
    """Say which entries are lost, and whether a run needs them."""
    if finding.entries is not None:
        first, last = finding.entries
        yield f"  lost with it: entries {count(first)} to {count(last)}"
    if report.behind:
        kinds = ", ".join(f"{plain(kind)} {n:,}" for kind, n in report.kinds_behind().most_common())
        first, last = report.behind[0].seq, report.behind[-1].seq
        yield (
            f"  lost behind it: {count(len(report.behind))} whole entries, {count(first)} to "
            f"{count(last)} ({kinds})"
        )
    for run in report.runs:
        if run in report.ended:
            yield f"  run {plain(run)} has ended before it, and does not need them"
        else:
            yield f"  run {plain(run)} needs them; it would go on from entry {report.entries - 1}"
    if not report.runs:
        yield "  no run is left: a broker would start with an empty ledger"


def _blobs(lost: list[LostBlob]) -> Iterator[str]:
    for each in lost[:_SHOWN]:
        by = ", ".join(map(str, each.named_by[:3])) + (", ..." if len(each.named_by) > 3 else "")
        use = "needed by an unfinished message" if each.needed else "nothing unfinished needs it"
        yield (
            f"  lost: blob {each.name.digest.hex()} of {plain(each.name.owner)} "
            f"({count(each.size)} bytes, message {by}); {use}"
        )
    if len(lost) > _SHOWN:
        yield f"  ... and {count(len(lost) - _SHOWN)} more blobs"


def facts(report: Report) -> dict[str, Any]:
    """Return what a program is to read."""
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
    """Return clients' states that tasks left of which the mended ledger would not tell.

    They are numbered by their tasks; under such a number another task would come.
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
            click.echo(f"fedmq: cannot set {plain(path)} aside: {error.strerror}", err=True)
            sys.exit(2)
