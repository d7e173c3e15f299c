"""Digests of an aggregator's state after each message, to find the first difference.

A difference in the code changes the state at the very message that it affects; the actions may
change much later. ``--save`` writes the digests of a replay to a file; ``--compare`` compares them
with those of another replay of the same inbox, with other code.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec
from msgspec import Struct

from fedmq.broker.file_modes import make_private_folder, open_private
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.link.events import Delivery
from fedmq.broker.wire.schema import Message
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.errors import NodeError
from fedmq.nodes.replay.fold import Replay, ReplayStep
from fedmq.nodes.replay.record import Diverged, describe
from fedmq.nodes.run.digests import digest_of
from fedmq.nodes.trace.differ import Operand, differences
from fedmq.nodes.trace.differences import Difference, DifferenceKind, Field

FILE = "steps.jsonl"
"""Name of the file; unchanged since 0.1.0, so that files of older releases are found."""
_SHORT = 200
Parts = dict[str, int | float | str]


class _Header(Struct):
    """First line of the file."""

    run: str
    opened: float
    """Time of the run's first entry; together with the id it identifies the run."""


class _Line(Struct):
    """One step: the number of the message, -1 for the start, and the state after it."""

    seq: int
    parts: Parts


class Digester:
    """Computes digests of a core's state; caches that of the algorithm's state."""

    def __init__(self) -> None:
        self._state: object = None
        self._digest = ""

    def state_digests(self, core: Aggregator) -> Parts:
        """Return the state by name: short values as text, others as digests."""
        found: Parts = {}
        for name, value in core.state_snapshot().items():
            if isinstance(value, int | float):
                found[name] = value
            elif isinstance(value, list | Struct) and len(text := repr(value)) <= _SHORT:
                found[name] = text
            elif name == "state":
                if value is not self._state:
                    self._state, self._digest = value, digest_of(value)
                found[name] = self._digest
            else:
                found[name] = digest_of(value)
        return found


def save_state_digests(
    replay: Replay, folder: Path, until: int | None = None
) -> Iterator[ReplayStep]:
    """Yield the steps of a replay, and write each to a new file in the folder.

    Raises:
        NodeError: the file exists already, or cannot be written.
    """
    digester = Digester()
    path, fresh = folder / FILE, folder / f"{FILE}.new"
    with _create(path, fresh) as file:
        opened = replay.trace.opened
        file.write(msgspec.json.encode(_Header(opened.run, opened.at)) + b"\n")
        for step in replay.steps(until):
            line = _Line(_number(step), digester.state_digests(replay.core))
            file.write(msgspec.json.encode(line) + b"\n")
            yield step
    fresh.replace(path)  # an incomplete file is never read


def compare_state_digests(
    replay: Replay, folder: Path, until: int | None = None
) -> Iterator[ReplayStep]:
    """Yield the steps of a replay while its states are equal to those in a file.

    Raises:
        Diverged: the state after a message differs.
        NodeError: the file belongs to another run, or cannot be read.
    """
    digester = Digester()
    lines = _read(folder, replay.trace)
    for step in replay.steps(until):
        saved = next(lines, None)
        if saved is None:
            return
        parts = digester.state_digests(replay.core)
        if saved.seq != _number(step) or not _same(saved.parts, parts):
            found = [
                f"{name}: {saved.parts[name]} saved, {parts[name]} now"
                for name in saved.parts
                if name in parts and repr(saved.parts[name]) != repr(parts[name])
            ]
            raise Diverged("\n  ".join([f"state diverges {_where(step)}", *found]))
        yield step


def compare_runs(replay: Replay, other: Replay, until: int | None = None) -> Iterator[ReplayStep]:
    """Yield the steps of a replay while another run has equal messages and states.

    Raises:
        Diverged: a message, or the state after it, differs.
    """
    ours, theirs = Digester(), Digester()
    pairs = itertools.zip_longest(_named("this run", replay, until), _named("the other run", other))
    for mine, other_step in pairs:
        if mine is None and until is not None:
            return
        if mine is None or other_step is None:
            which = "the other run" if mine is None else "this run"
            raise Diverged(f"only {which} continues {_where(mine or other_step)}")
        if isinstance(mine.event, Delivery) and isinstance(other_step.event, Delivery):
            found = _differences(mine.event, other_step.event)
            if found:
                lines = [
                    "the runs differ in this message; their states before it are equal",
                    f"this run: {mine.event.seq} {_summary(mine.event.message)}",
                    f"the other run: {other_step.event.seq} {_summary(other_step.event.message)}",
                    *(str(each) for each in found if each.kind is not DifferenceKind.MESSAGE),
                ]
                raise Diverged("\n  ".join(lines))
        a, b = ours.state_digests(replay.core), theirs.state_digests(other.core)
        a.pop("position"), b.pop("position")  # entry numbers differ between runs
        if not _same(a, b):
            parts = [
                f"{k}: {a[k]} in this run, {b[k]} in the other"
                for k in a
                if repr(a[k]) != repr(b[k])
            ]
            raise Diverged("\n  ".join([f"state diverges {_where(mine)}", *parts]))
        yield mine


def _named(which: str, replay: Replay, until: int | None = None) -> Iterator[ReplayStep]:
    """Yield a run's steps; an error says which run does not replay with this code."""
    try:
        yield from replay.steps(until)
    except Diverged as error:
        raise Diverged(f"{which} does not replay with this code: {error}") from None


def _differences(mine: Delivery, other: Delivery) -> list[Difference]:
    ours, theirs = mine.message, other.message
    names = ("this run", "the other")
    ids = f"{ours.sender} {ours.id}", f"{theirs.sender} {theirs.id}"
    if ids[0] != ids[1]:
        return [Difference(DifferenceKind.MESSAGE, Field(("id",)), ids, names)]
    return differences(Operand(ours, mine.read), Operand(theirs, other.read), names=names)


def _summary(message: Message) -> str:
    return f"{describe(message)}, from {message.sender}"


def _number(step: ReplayStep) -> int:
    return step.event.seq if isinstance(step.event, Delivery) else -1


def _where(step: ReplayStep) -> str:
    event = step.event
    if isinstance(event, Delivery):
        return f"at message {event.seq}: {_summary(event.message)}"
    return "at the start"


def _same(a: Parts, b: Parts) -> bool:
    """Return whether all parts that both have are equal; NaN equals NaN."""
    return all(repr(a[name]) == repr(b[name]) for name in a if name in b)


def _create(path: Path, fresh: Path) -> IO[bytes]:
    try:
        if path.exists():
            raise NodeError(f"--save: {path} exists already")
        if path.parent.is_file():
            raise NodeError(f"--save: expected a folder, got the file {path.parent}")
        make_private_folder(path.parent)
        return open_private(fresh, "wb")
    except OSError as error:
        raise NodeError(f"--save: cannot write {path}: {error.strerror}") from None


def _read(folder: Path, trace: Trace) -> Iterator[_Line]:
    path = folder / FILE
    try:
        with path.open("rb") as file:
            header = msgspec.json.decode(file.readline(), type=_Header)
            if (header.run, header.opened) != (trace.opened.run, trace.opened.at):
                raise NodeError(
                    f"--compare: expected the digests of run {trace.run}, "
                    f"got those of another run, {header.run}"
                )
            for line in file:
                yield msgspec.json.decode(line, type=_Line)
    except OSError as error:
        raise NodeError(f"--compare: cannot read {path}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise NodeError(f"--compare: expected a file of --save, got {path}: {error}") from None
