"""The messages of a recorded run, as Python objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import AnyEntry, Consumed, Refusal
from fedmq.nodes.api.array_table import ArrayTable
from fedmq.nodes.history.facts import Facts
from fedmq.nodes.history.outcomes import ResultOutcome
from fedmq.nodes.history.tracker import TaskTracker
from fedmq.nodes.trace.bodies import shown_body
from fedmq.nodes.trace.overview import Overview, before_damage

_OUTCOMES: dict[ResultOutcome | None, str] = {
    ResultOutcome.OPEN: "unused",
    ResultOutcome.USED: "used",
    ResultOutcome.REJECTED: "rejected",
}


@dataclass(frozen=True)
class TraceEntry:
    """One entry of the ledger: a message, or a record of the broker.

    number: of the entry.
    time_s: seconds since the run's start.
    kind: of the message, such as ``task``, ``result`` or ``version``; or ``opened``, ``refusal``,
        ``ended``.
    sender, to: address of the sender and of the recipient; "" for a record of the broker.
    node: the connected node that hosted the recipient, or None.
    client: number of the client that a task, a result or a failure concerns, or None.
    version: of the model that it contains, answers, evaluates or commits, or None.
    answers: number of the task or evaluation that it answers, or of the message that a refusal
        rejects; or None.
    nbytes: size of its payload.
    outcome: of a result: ``used``, ``rejected`` or ``unused``; else "".
    staleness: of a used result, in versions; else None.
    code, reason: why the message was rejected; "" if it was not.
    body: of the message.
    """

    number: int
    time_s: float
    kind: str
    sender: str = ""
    to: str = ""
    node: str | None = None
    client: int | None = None
    version: int | None = None
    answers: int | None = None
    nbytes: int = 0
    outcome: str = ""
    staleness: int | None = None
    code: str = ""
    reason: str = ""
    body: Mapping[str, Any] | None = None


class RunTrace:
    """Iterates over the entries of a run, in the order of the ledger; reads the files each time.

    Entries that only say which messages a node has consumed are left out. If the ledger is damaged,
    the iteration ends before the damage, which `damage` describes.

    Args:
        folder: of the run.
        run_id: of the run, if the ledger has several.
    """

    def __init__(self, folder: Path, run_id: str = "") -> None:
        self._folder, self._run_id = folder, run_id
        self.damage = ""

    def __iter__(self) -> Iterator[TraceEntry]:
        """Yield the entries.

        Raises:
            LedgerError: there is no ledger, or it has no such run.
        """
        trace = Trace(self._folder, self._run_id)
        overview, tracker = Overview(trace), TaskTracker()  # first the outcomes, then the entries
        for entry in before_damage(trace):
            facts = tracker.feed(entry)
            if not isinstance(entry, Consumed):
                yield _entry(facts, entry.at - trace.opened.at, overview)
        self.damage = "" if trace.damage is None else str(trace.damage)

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with a row for each entry, without the bodies.

        Raises:
            ImportError: pandas is not installed.
            LedgerError: there is no ledger, or it has no such run.
        """
        rows = [
            {name: value for name, value in vars(each).items() if name != "body"} for each in self
        ]
        return ArrayTable.of_rows(rows, "entry").to_pandas()

    def __repr__(self) -> str:
        return f"<trace of {self._folder}: iterate over it, or call to_pandas()>"


def _entry(facts: Facts, time_s: float, overview: Overview) -> TraceEntry:
    entry, message = facts.entry, facts.message
    if message is None:
        return _record(entry, time_s)
    outcomes = overview.history.outcomes
    outcome, refusal = outcomes.outcome_of(entry.seq), overview.rejections.get(entry.seq)
    return TraceEntry(
        number=entry.seq,
        time_s=time_s,
        kind=message.kind,
        sender=message.sender,
        to=message.to,
        node=facts.host,
        client=facts.client,
        version=facts.version,
        answers=facts.task.seq if facts.is_answer and facts.task is not None else None,
        nbytes=sum(blob.size for blob in message.blobs),
        outcome=_OUTCOMES.get(outcome, ""),
        staleness=outcomes.staleness_of(entry.seq),
        code="" if refusal is None else refusal.known_code,
        reason="" if refusal is None else refusal.reason,
        body=shown_body(message),
    )


def _record(entry: AnyEntry, time_s: float) -> TraceEntry:
    """Return a record of the broker: a run was opened or has ended, or a message was rejected."""
    kind = type(entry).__name__.lower()
    if isinstance(entry, Refusal):
        return TraceEntry(
            *(entry.seq, time_s, kind, entry.node),
            answers=entry.of,
            code=entry.known_code,
            reason=entry.reason,
        )
    return TraceEntry(entry.seq, time_s, kind, reason=str(getattr(entry, "reason", "")))
