"""``fedmq trace``: the commands. Each imports what it needs when it runs."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from fedmq.broker.errors import LedgerError
from fedmq.broker.file_modes import open_private
from fedmq.nodes.cli.options import (
    LONGEST_TEXT,
    Commands,
    Number,
    RenamedOptions,
    WholeNumber,
    folder_argument,
    run_id_option,
)
from fedmq.nodes.errors import NodeError
from fedmq.nodes.process.exception_text import reason_of
from fedmq.nodes.process.terminal import plain, word

if TYPE_CHECKING:
    from fedmq.broker.inspection.trace import Trace

_LINES = 100
"""Lines that are printed at a time."""


@click.group(cls=Commands)
def trace() -> None:
    """Inspect a recorded run.

    DIR is the folder of the run or of its ledger. If the ledger is damaged, the commands print
    everything before the damage and its position, and exit with code 1. They also report an
    incomplete last record, which a crash may leave (exit code 0).
    """


@trace.command(cls=RenamedOptions, renamed={"--refused": "--rejected"})
@folder_argument
@run_id_option
@click.option(
    "--kind", "kinds", multiple=True, help="Only this kind, such as task or result; repeatable."
)
@click.option("--node", help="Only messages from, to or about this node.")
@click.option("--client", type=WholeNumber(min=0), help="Only tasks and results of this client.")
@click.option("--versions", metavar="A-B", help="Only tasks and results of these model versions.")
@click.option("--from", "start", type=Number(), help="Start, in seconds since the run started.")
@click.option("--to", "end", type=Number(), help="End, in seconds since the run started.")
@click.option("--rejected", is_flag=True, help="Only rejected messages, with the reason.")
@click.option("--all", "everything", is_flag=True, help="Also list entries on consumed messages.")
def ls(
    folder: Path,
    run_id: str,
    kinds: tuple[str, ...],
    node: str | None,
    client: int | None,
    versions: str | None,
    start: float | None,
    end: float | None,
    rejected: bool,  # noqa: FBT001 - click's
    everything: bool,  # noqa: FBT001 - click's
) -> None:
    """List the entries, one per line.

    Columns: number; seconds since the start; kind; sender -> recipient, with the node that
    hosted the client; model version; id; number of the entry that it answers ("re"); bytes of
    its blobs; a note, with the reason if the message was rejected. In the note of a result, n is
    the number of training examples. On a terminal, long lines wrap.
    """
    from fedmq.nodes.trace.listing import Columns, Filter, parse_versions, rows
    from fedmq.nodes.trace.overview import Overview

    with _exit_2_on_error():
        times = (-float("inf") if start is None else start, float("inf") if end is None else end)
        if not times[0] <= times[1]:
            raise NodeError(f"expected --from before --to, got {times[0]:g} and {times[1]:g}")
        wanted = Filter(
            kinds=frozenset(map(word, kinds)),
            node=node,
            client=client,
            versions=parse_versions(versions) if versions is not None else None,
            times=times,
            refused=rejected,
            everything=everything,
        )
        opened = _open(folder, run_id)
        overview = Overview(opened)
        wanted.check(opened, overview)
        columns = Columns.of(overview)
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        if width is not None:
            click.secho("\n".join(columns.head(width)), dim=True)
        found = (row for row in rows(opened, overview) if wanted.takes(row))
        if not _print(line for row in found for line in row.lines(columns, width)):
            click.echo("fedmq: no entries match", err=True)
        _end(opened)


@trace.command()
@folder_argument
@click.argument("offset", type=WholeNumber(min=0))
@run_id_option
def show(folder: Path, offset: int, run_id: str) -> None:
    """Show entry number OFFSET: its fields, its outcome and its decoded tensors."""
    with _exit_2_on_error():
        opened = _open(folder, run_id)
        from fedmq.nodes.trace.show import show as lines

        _print(lines(opened, offset))


@trace.command()
@folder_argument
@run_id_option
def stats(folder: Path, run_id: str) -> None:
    """Count messages and bytes, audit the delivery, and check every payload."""
    from fedmq.nodes.trace.blobs import read_payload
    from fedmq.nodes.trace.stats import Stats

    with _exit_2_on_error():
        opened = _open(folder, run_id)
        counted = Stats(opened)
        _print(counted.lines())
        click.echo("")
        payload = read_payload(opened)
        missing = payload.missing(counted.traffic.named)
        _print(payload.lines(missing))
        _end(opened)
        if payload.is_damaged(missing) or counted.account.faults:
            sys.exit(1)


@trace.command()
@click.argument("a", metavar="A", type=click.Path(path_type=Path))
@click.argument("b", metavar="B", type=click.Path(path_type=Path))
@click.option(
    "--run-id", "run_ids", multiple=True, help="Run of A and B; if given twice, of A, then of B."
)
def diff(a: Path, b: Path, run_ids: tuple[str, ...]) -> None:
    """Find the first difference between two runs, in the order or the content of messages.

    Times, sessions and entry numbers are not compared. Exit code 0: all messages are equal;
    1: some differ.
    """
    with _exit_2_on_error():
        if len(run_ids) > 2:
            raise NodeError(f"expected --run-id at most twice, got it {len(run_ids)} times")
        first, last = (run_ids[0], run_ids[-1]) if run_ids else ("", "")
        traces = (_open(a, first), _open(b, last))
        from fedmq.nodes.trace.compare import compare

        found = compare(*traces)
        _print(found.lines())
        for opened in traces:
            _end(opened)
        if not found.equal:
            sys.exit(1)


@trace.command()
@folder_argument
@run_id_option
@click.option("--perfetto", metavar="FILE", help="Write a timeline for ui.perfetto.dev.")
@click.option(
    "--json",
    "as_json",
    metavar="FILE",
    help='Write one JSON object per line; NaN becomes "NaN", infinity "Infinity".',
)
def export(folder: Path, run_id: str, perfetto: str | None, as_json: str | None) -> None:
    """Write the trace to FILE (- for stdout) for other programs."""
    from fedmq.nodes.trace.export import json_lines
    from fedmq.nodes.trace.overview import Overview
    from fedmq.nodes.trace.timeline import timeline

    with _exit_2_on_error():
        target = as_json if perfetto is None else perfetto
        if target is None or (perfetto and as_json):
            raise NodeError("expected either --perfetto FILE or --json FILE")
        opened = _open(folder, run_id)
        texts = json_lines(opened) if perfetto is None else timeline(opened, Overview(opened))
        try:
            with _open_output(target) as file:
                file.writelines(texts)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise NodeError(f"cannot write {target}: {reason_of(error)}") from None
        _end(opened)


def _open_output(target: str) -> AbstractContextManager[IO[str]]:
    if target == "-":
        return click.open_file(target, "w", encoding="utf-8")
    return io.TextIOWrapper(open_private(Path(target), "wb"), encoding="utf-8")


def _print(lines: Iterable[str]) -> int:
    """Print lines, many at a time; return their number."""
    block: list[str] = []
    printed = 0
    for line in lines:
        block.append(line)
        if len(block) == _LINES:
            click.echo("\n".join(block))
            printed += len(block)
            block.clear()
    if block:
        click.echo("\n".join(block))
    return printed + len(block)


def _open(folder: Path, run_id: str) -> Trace:
    from fedmq.broker.inspection.trace import Trace

    return Trace(folder, run_id)


def _end(opened: Trace) -> None:
    """Report damage, with exit code 1, or an incomplete last record."""
    if opened.damage is not None:
        damage = plain(opened.damage, LONGEST_TEXT)
        click.echo(f"fedmq: damaged: {damage}; everything before it was read", err=True)
        sys.exit(1)
    if opened.torn is not None:
        segment, offset, size = opened.torn
        click.echo(
            f"fedmq: incomplete last record: {size} bytes (at {segment}, byte {offset}), "
            "as a crash leaves it",
            err=True,
        )


@contextlib.contextmanager
def _exit_2_on_error() -> Iterator[None]:
    """Print an expected error as one sentence and exit with code 2, or 1 for damage."""
    try:
        yield
    except (NodeError, LedgerError) as error:
        click.echo(f"fedmq: {plain(error, LONGEST_TEXT)}", err=True)
        sys.exit(1 if isinstance(error, LedgerError) and error.segment else 2)
