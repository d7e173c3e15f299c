"""``fedmq trace ls``: one line per entry, and the filter."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import AnyEntry, Consumed, Ended, Opened, Refusal
from fedmq.broker.wire.addresses import BROKER, CONTINUED
from fedmq.broker.wire.schema import Message
from fedmq.nodes.errors import NodeError
from fedmq.nodes.history.facts import Facts
from fedmq.nodes.history.tracker import TaskTracker
from fedmq.nodes.process.terminal import (
    figure,
    fitted,
    guess,
    literal,
    plain,
    plural,
    seconds,
    spans,
    word,
)
from fedmq.nodes.trace.overview import Overview, before_damage

_WIDEST = 60
_NAMED = 30
KINDS = frozenset(
    {"opened", "consumed", "refusal", "ended"}
    | {"joined", "left", "tick", "refused", CONTINUED}
    | {"run", "task", "evaluate", "version", "finished", "timer"}
    | {"result", "failed", "score", "availability"}
)
"""Kinds of entries and of the messages of broker, aggregator and workers."""


@dataclass(frozen=True)
class Row:
    """One entry in the list.

    at: seconds since the run's start.
    version: of the model that it refers to.
    answers: number of the entry that it answers; the message's id if the number is unknown.
    client, nodes: that it concerns.
    refused: whether it is a rejected message.
    """

    seq: int
    at: float
    kind: str
    path: str = ""
    version: int | None = None
    id: str = ""
    answers: str = ""
    nbytes: int | None = None
    note: str = ""
    client: int | None = None
    nodes: tuple[str, ...] = ()
    refused: bool = False

    def lines(self, widths: Columns, width: int | None) -> list[str]:
        """Return the row as one line, or as several that are at most ``width`` wide."""
        line = self.line(widths)
        if width is None or len(line) <= width:
            return [line]
        answers = f"re {self.answers}" if self.answers else ""
        nbytes = f"{self.nbytes} bytes" if self.nbytes else ""
        rest = [each for each in (self.id, answers, nbytes, self.note) if each]
        return widths.wrapped((*self._front(), "  ".join(rest)), width)

    def _front(self) -> tuple[str, str, str, str, str]:
        version = "-" if self.version is None else f"v{self.version}"
        return str(self.seq), seconds(self.at), self.kind, self.path or "-", version

    def line(self, widths: Columns) -> str:
        """Return the row as one line."""
        nbytes = str(self.nbytes) if self.nbytes else "-"
        return widths.line(*self._front(), self.id or "-", self.answers or "-", nbytes, self.note)


class Columns(NamedTuple):
    """Widths of the columns that depend on the run."""

    number: int
    kind: int
    path: int
    id: int

    @classmethod
    def of(cls, overview: Overview) -> Columns:
        """Return columns that align nearly all rows of a run."""
        widths = overview.widths
        return cls(
            max(5, len(str(overview.history.entries))),
            max(8, min(widths.kind, 20)),
            max(10, min(widths.path, _WIDEST)),
            max(2, min(widths.id, _WIDEST)),
        )

    def head(self, width: int | None = None) -> list[str]:
        """Return the names of the columns, wrapped like `Row.lines`."""
        names = ("entry", "time", "kind", "from -> to", "model", "id", "re", "bytes", "note")
        line = self.line(*names)
        if width is None or len(line) <= width:
            return [line]
        return self.wrapped((*names[:5], "  ".join(names[5:])), width)

    def wrapped(self, cells: tuple[str, str, str, str, str, str], width: int) -> list[str]:
        """Return the lines of a row with the cells after the version on lines of their own."""
        number, at, kind, path, version, rest = cells
        indent = self.number + 12
        spare = max(width - indent - self.kind - 9, 10)
        front = (
            f"{number:>{self.number}} {at:>9}  {kind:<{self.kind}}  "
            f"{path:<{min(self.path, spare)}}  {version:>5}"
        )
        first = [front] if len(front) <= width else fitted(front, " " * indent, width)
        return [*first, *(" " * indent + each for each in fitted(rest, "", width - indent))]

    def line(self, *cells: str) -> str:
        """Return one line of nine cells."""
        number, at, kind, path, version, name, answers, nbytes, note = cells
        return (
            f"{number:>{self.number}} {at:>9}  {kind:<{self.kind}}  {path:<{self.path}}  "
            f"{version:>5}  {name:<{self.id}}  {answers:>{self.number}} {nbytes:>10}  {note}"
        ).rstrip()


@dataclass(frozen=True)
class Filter:
    """Which entries to list; a field that is empty or None accepts all.

    versions, times: first and last, both included.
    everything: include entries on consumed messages.
    """

    kinds: frozenset[str] = frozenset()
    node: str | None = None
    client: int | None = None
    versions: tuple[int, float] | None = None
    times: tuple[float, float] = (-math.inf, math.inf)
    refused: bool = False
    everything: bool = False

    def check(self, trace: Trace, overview: Overview) -> None:
        """Check that entries may match.

        Raises:
            NodeError: the run has no such kind, node, client or version; names the choices.
        """
        kinds = KINDS | set(map(word, overview.kinds))
        for kind in sorted(self.kinds - kinds) if overview.has_all_names else ():
            raise NodeError(f"--kind: {expected('kind', kind, kinds)}")
        clients = trace.opened.total_clients
        if self.client is not None and self.client >= clients:
            raise NodeError(
                f"--client: expected a client of this run, 0 to {clients - 1}, got {self.client}"
            )
        if trace.damage is not None or not overview.has_all_names:
            return  # matching entries may follow after the damage
        nodes = set(map(word, {*overview.history.nodes, *overview.senders}))
        if self.node is not None and word(self.node) not in nodes:
            raise NodeError(f"--node: {expected('node of this run', self.node, nodes)}")
        if self.versions is not None and self.versions[0] > overview.history.version:
            raise NodeError(
                f"--versions: expected versions of this run, 0 to {overview.history.version}, "
                f"got {self.versions[0]} or higher"
            )

    def takes(self, row: Row) -> bool:
        """Return whether to list a row."""
        if row.kind == "consumed" and not (self.everything or "consumed" in self.kinds):
            return False
        return (
            (not self.kinds or row.kind in self.kinds)
            and (self.node is None or word(self.node) in row.nodes)
            and (self.client is None or row.client == self.client)
            and (self.versions is None or _within(row.version, self.versions))
            and self.times[0] <= row.at <= self.times[1]
            and (row.refused or not self.refused)
        )


def expected(what: str, word: str, choices: Collection[str]) -> str:
    """Return the error on a word that is none of the choices, with the nearest of them."""
    some = ", ".join(sorted(choices)[:_NAMED])
    more = f" and {len(choices) - _NAMED} others" if len(choices) > _NAMED else ""
    return f"expected a {what} ({some}{more}), got {word!r}{guess(word, choices)}"


def rows(trace: Trace, overview: Overview) -> Iterator[Row]:
    """Yield a row for each entry of a run, up to its end or to damage."""
    tracker = TaskTracker()
    for entry in before_damage(trace):
        facts = tracker.feed(entry)
        at = entry.at - trace.opened.at
        if facts.message is not None:
            yield _message_row(at, facts, facts.message, overview)
        else:
            yield _other_row(entry, at)


def parse_versions(text: str) -> tuple[int, float]:
    """Read a range of versions: ``412``, ``400-420``, or ``400-``.

    Raises:
        NodeError: the text is not of that form.
    """
    match = re.fullmatch(r"([0-9]{1,18})(?:(-)([0-9]{1,18})?)?", text)
    if match is None:
        raise NodeError(f"--versions: expected A-B, A- or A, such as 400-420, got {text!r}")
    low = int(match[1])
    high = int(match[3]) if match[3] else math.inf if match[2] else low
    if high < low:
        raise NodeError(f"--versions: expected the lower version first, got {text!r}")
    return low, high


def at_host(address: str, host: str | None) -> str:
    """Return an address with the node that hosts it, unless it names that node itself."""
    if host is None or address in (host, f"node/{host}"):
        return word(address)
    return f"{word(address)}@{word(host)}"


def _message_row(at: float, facts: Facts, message: Message, overview: Overview) -> Row:
    seq, host, sender = facts.entry.seq, facts.host, message.sender
    client, base = facts.client, facts.version
    by_client = facts.is_answer and client is not None
    source = at_host(f"client/{client}", sender) if by_client else word(sender)
    note = plain(_note(message))
    if message.kind == "result" and base is not None:
        stale = f"staleness {overview.history.outcomes.staleness_at(seq, base)}"
        note = f"{stale}, {note}" if note else stale
    refusal = overview.rejections.get(seq)
    if refusal is not None:
        why = f"{rejection_verb(refusal)} by {word(refusal.node)}: {plain(refusal.reason)}"
        note = f"{why}; {note}" if note else why
    subject = message.body.get("node") if sender == BROKER else None
    return Row(
        seq=seq,
        at=at,
        kind=word(message.kind),
        path=f"{source} -> {at_host(message.to, host)}",
        version=base,
        id=word(message.id),
        answers=_answers(facts, message, overview),
        nbytes=sum(blob.size for blob in message.blobs),
        note=note,
        client=client if message.kind in ("task", "result", "failed") else None,
        nodes=tuple(word(each) for each in (sender, host, subject) if each is not None),
        refused=refusal is not None,
    )


def rejection_verb(refusal: Refusal) -> str:
    """Return whether a message was rejected or dead-lettered, as text."""
    return "dead-lettered" if refusal.dead_lettered else "rejected"


def _other_row(entry: AnyEntry, at: float) -> Row:
    match entry:
        case Opened(run=run, total_clients=total):
            return Row(entry.seq, at, "opened", note=f"run {word(run)}, {plural(total, 'client')}")
        case Consumed(node=node, of=of):
            name = word(node)
            return Row(entry.seq, at, "consumed", name, note=plain(spans(of)), nodes=(name,))
        case Refusal(node=node, id=name, reason=reason, of=of):
            what = "before it was accepted" if of is None else f"entry {of}"
            note = f"{rejection_verb(entry)} {what}: {plain(reason)}"
            by = word(node)
            # The refusal of an accepted message is on that message's own row.
            return Row(
                entry.seq,
                at,
                "refusal",
                by,
                id=word(name),
                note=note,
                nodes=(by,),
                refused=of is None,
            )
        case Ended(reason=reason):
            return Row(entry.seq, at, "ended", note=plain(reason))
        case _:
            return Row(entry.seq, at, word(type(entry).__name__.lower()))


def _answers(facts: Facts, message: Message, overview: Overview) -> str:
    if message.re is None:
        return ""
    found = facts.task.seq if facts.task is not None else overview.numbers.get(message.re)
    return word(message.re) if found is None else str(found)


def _within(value: int | None, limits: tuple[int, float]) -> bool:
    return value is not None and limits[0] <= value <= limits[1]


def _note(message: Message) -> str:
    """Return a summary of a message's body."""
    note = _NOTES.get(message.kind)
    try:
        return note(message.body) if note else ""
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return ""  # the body is not valid for this kind of message


def _joined(body: Mapping[str, Any]) -> str:
    clients = ",".join(f"{low}-{high}" for low, high in body["clients"])
    role = "" if body["role"] == body["node"] else f", {body['role']}"
    return f"{body['node']}{role}" + (f" of clients {clients}" if clients else "")


def _availability(body: Mapping[str, Any]) -> str:
    counts = {name: sum(high - low + 1 for low, high in body[name]) for name in ("back", "away")}
    return ", ".join(f"{number:,} clients {name}" for name, number in counts.items() if number)


def _version_note(body: Mapping[str, Any]) -> str:
    mean, most = float(body["mean_staleness"]), int(body["max_staleness"])
    stale = f"staleness mean {mean:.2f}, max {most}" if body["results"] else "no staleness"
    results = plural(int(body["results"]), "result")
    if "cohort" in body:
        late = int(body["late"])
        results = f"{int(body['results']) - late} of {int(body['cohort'])} results"
        results += f" and {late} late" if late else ""
    return f"{results}, {stale}, model {body['model_digest'][:12]}"


def _result(body: Mapping[str, Any]) -> str:
    known = {**body["numbers"], "elapsed": f"{float(body['elapsed_s']):.3f} s"}
    return _numbers({key: value for key, value in known.items() if key != "reply"})


def _numbers(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {figure(value) if isinstance(value, float) else value}"
        for key, value in values.items()
        if isinstance(value, int | float | str)
    )


_NOTES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "joined": _joined,
    "availability": _availability,
    "continued": lambda body: "run extended" if body["further"] else "run resumed",
    "left": lambda body: f"{body['node']}: {body['reason']}",
    "version": _version_note,
    "result": _result,
    "score": lambda body: _numbers(body["metrics"]),
    "failed": lambda body: str(body["reason"]),
    "finished": lambda body: str(body["reason"]),
    "refused": lambda body: f"by {body['by']}: {body['reason']}",
    "timer": lambda body: f"{literal(body['token'])} in {figure(float(body['after_s']))} s",
    "tick": lambda body: literal(body["token"]),
}
