"""The read model of a run: every view of a run is computed by this one fold of its ledger.

Summary, live view, ``fedmq trace`` and timeline feed it entry by entry, and read its attributes
after any entry or at the end. It has codes and numbers only: each view has its own sentences.

A view that follows a run feeds what `fedmq.broker.ledger.reader.LedgerTail` yields, and may use the
`Facts` that `RunHistory.feed` returns for each entry. A view that shows an entry's later
outcome reads the ledger twice: first into a `RunHistory`, then through a `TaskTracker` for the
facts of each entry.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fedmq.broker.ledger.entries import Accepted, AnyEntry, Ended, Opened, Refusal
from fedmq.broker.rejections import Code
from fedmq.broker.wire.addresses import AGGREGATOR, BROKER, CONTINUED, EVALUATOR
from fedmq.broker.wire.schema import Message
from fedmq.nodes.history.curve import CurvePoint, VersionTotals
from fedmq.nodes.history.facts import Facts, SentTask, natural
from fedmq.nodes.history.outcomes import Outcomes
from fedmq.nodes.history.tracker import NodeState, TaskTracker
from fedmq.nodes.messages.actions import ANSWERS
from fedmq.nodes.messages.metrics import received_metrics
from fedmq.nodes.messages.tensor_tables import group_blobs
from fedmq.nodes.run.agreement import disagree

_INVALID_SCORE = (Code.MALFORMED, Code.NOT_FINITE, Code.OUT_OF_RANGE)
"""Why a score does not count. With other codes it was a second or late answer, and the first one
counts."""
_NO_RECORD = "failed: the ledger lacks the aggregator's record of this end"


@dataclass
class RunHistory:
    """The state of one run after the entries that were fed.

    All times are those of the broker, in seconds since 1970; all sizes are in bytes.
    """

    started_at: float | None = None
    """Start of the run; by default, the time of its first message."""
    run: str = ""
    """Id of the run; empty before its first entry."""
    config: str = ""
    """Newest configuration, as TOML."""
    begun: bool = False
    """Whether the aggregator has recorded that the run begins."""
    recorded_at: float | None = None
    """Time of the aggregator's record that the run begins; None before it."""
    arithmetic: int | None = None
    """See `fedmq.nodes.aggregator.computed`; None before the aggregator's first record."""
    total_clients: int | None = None
    """Number of clients; None before the run was opened."""
    now: float | None = None
    """Time of the newest entry; None before the first."""
    entries: int = 0
    """Number of entries."""
    ended: str | None = None
    """Reason why the run ended; None while it runs, again after it was resumed."""
    failed: bool = False
    """Whether the run ended without reaching its goal, or without the aggregator's record of its
    end."""
    stopped_s: float = 0.0
    """Seconds in which the run was stopped, until it was resumed."""
    extended_at: int = -1
    """Number of the entry that last resumed the run after its end, or -1. The aggregator has
    forgotten the tasks and results before it."""

    version: int = 0
    """Newest version."""
    mean_staleness: float | None = None
    """Mean staleness of the results in the newest version, in versions; None before the first."""
    model_digest: str = ""
    """Digest of the newest version's model."""
    curve: list[CurvePoint] = field(default_factory=list)
    """Evaluations, in the order of their first scores."""
    totals: VersionTotals = field(default_factory=VersionTotals)
    """Bytes and results at the commit of each version."""

    outcomes: Outcomes = field(default_factory=Outcomes)
    """Outcomes of tasks, results and evaluations, and of each client."""
    first_task_at: float | None = None
    """Time of the first task or evaluation; None before it."""

    tracker: TaskTracker = field(default_factory=TaskTracker)
    """All nodes, which clients they host, and the unanswered tasks and evaluations."""
    version_0: Any = None
    """The aggregator's fingerprint of the model that the run starts from."""
    disagreeing: list[str] = field(default_factory=list)
    """Names of the nodes whose fingerprint differs."""

    payload_down: int = 0
    """Bytes of the blobs of tasks and evaluations."""
    payload_up: int = 0
    """Bytes of the blobs of their answers."""
    groups: dict[str, dict[str, int]] = field(default_factory=lambda: {"down": {}, "up": {}})
    """The same by direction and by group of tensors."""
    wire_down: int = 0
    """Bytes on the wire to all nodes but the aggregator. The broker records them when the run
    ends; the same holds for ``wire_up``."""
    wire_up: int = 0
    """Bytes on the wire from all nodes but the aggregator."""
    wire_at_least: bool = False
    """Whether these are not all bytes on the wire: the broker has restarted."""

    _asked: dict[int, set[str]] = field(default_factory=dict)
    """Addresses of the clients that were asked to evaluate a version and have not all answered."""
    _scores: dict[int, tuple[CurvePoint, str]] = field(default_factory=dict)
    """Point of each score, and the address of its evaluator or client, by its number."""
    _finished: bool = False
    """Whether the aggregator has recorded the end of the run."""

    def feed(self, entry: AnyEntry) -> Facts:
        """Fold the next entry of the run, and return its facts."""
        self.entries += 1
        self.now = entry.at
        facts = self.tracker.feed(entry)
        message = facts.message
        if message is not None:
            if self.started_at is None:
                self.started_at = entry.at
            if message.sender == BROKER:
                if message.kind == CONTINUED:
                    self._continued(entry.seq, message)
            elif message.sender == self.tracker.placement.aggregator:
                self._from_aggregator(entry.at, message, facts.task)
            elif message.kind in ANSWERS:
                self._answer(entry, message, facts.task)
            return facts
        match entry:
            case Refusal():
                self.outcomes.rejection(entry)
                if entry.of is not None and entry.known_code in _INVALID_SCORE:
                    self._withdraw_score(entry.of, entry)
            case Opened():
                self.run, self.config = entry.run, entry.config
                self.total_clients = entry.total_clients
            case Ended():
                self._end(entry)
        return facts

    # ---- what follows from the attributes

    @property
    def nodes(self) -> dict[str, NodeState]:
        """Return the nodes by name."""
        return self.tracker.placement.nodes

    @property
    def wall_s(self) -> float:
        """Return the run's duration in seconds, without the time in which it was stopped."""
        return 0.0 if self.now is None else self._since_start(self.now)

    @property
    def first_task_s(self) -> float | None:
        """Return the seconds from the start to the first task; None before it."""
        if self.first_task_at is None or self.started_at is None:
            return None
        return self.first_task_at - self.started_at

    @property
    def status(self) -> str:
        """Return the run's status: ``finished``, ``failed`` or ``interrupted``."""
        if self.ended is None:
            return "interrupted"
        return "failed" if self.failed else "finished"

    @property
    def newest(self) -> CurvePoint | None:
        """Return the newest evaluation."""
        return self.curve[-1] if self.curve else None

    @property
    def accuracy(self) -> float | None:
        """Return the newest accuracy."""
        return self.curve[-1].accuracy if self.curve else None

    @property
    def best_accuracy(self) -> float | None:
        """Return the best finite accuracy so far."""
        known = [point.accuracy for point in self.curve if point.accuracy is not None]
        return max(filter(math.isfinite, known), default=None)

    @property
    def at_work(self) -> dict[str, list[SentTask]]:
        """Return the tasks of each connected node that has some, oldest first."""
        found: dict[str, list[SentTask]] = {}
        for task in self.tracker.unanswered.values():
            host = self.tracker.placement.host_of(task.to)
            if host is not None:
                found.setdefault(host, []).append(task)
        return found

    @property
    def missing_clients(self) -> list[tuple[int, int]]:
        """Return the unreachable clients if the run waits for them: no node has a task.

        They are ranges, both ends included.
        """
        if self.ended is not None or not self.begun or self.total_clients is None or self.at_work:
            return []
        return self.tracker.placement.unreachable(self.total_clients)

    @property
    def working_clients(self) -> list[int]:
        """Return the clients that have a task on a connected node."""
        tasks = (task for each in self.at_work.values() for task in each)
        return sorted({task.client for task in tasks if task.client is not None})

    def _since_start(self, at: float) -> float:
        return at - (at if self.started_at is None else self.started_at) - self.stopped_s

    # ---- entries

    def _end(self, entry: Ended) -> None:
        self.ended = entry.reason
        if not self._finished:  # it was rejected, or a program of somebody else ended the run
            self.failed, self.ended = True, f"{entry.reason}; {_NO_RECORD}"
        for name, counts in entry.nodes.items():
            self.wire_at_least |= bool(counts.get("recovered"))
            node = self.nodes.get(name)
            if node is None or node.role != AGGREGATOR:
                self.wire_down += counts.get("sent_bytes", 0)
                self.wire_up += counts.get("received_bytes", 0)

    def _continued(self, seq: int, message: Message) -> None:
        self.ended = None
        if message.body.get("further"):  # else the aggregator's record of the end still holds
            self.failed = False
        match message.body:
            case {"config": str(config), "stopped_s": int() | float() as stopped_s}:
                self.config = config
                self.stopped_s += stopped_s
        if self._finished and message.body.get("further"):
            self._finished, self.extended_at = False, seq
            self.outcomes.extended()
            self.tracker.withdraw_all()

    def _from_aggregator(self, at: float, message: Message, task: SentTask | None) -> None:
        if task is not None:
            self._sent(message, task)
            return
        body = message.body
        match message.kind:
            case "run":
                self.run, self.begun, self.recorded_at = message.run, True, at
                self.config = str(body.get("config", ""))
                self.arithmetic = natural(body.get("arithmetic", 1))
                self.version_0 = body.get("version_0")
            case "version":
                version, digest = natural(body.get("version")), body.get("model_digest")
                stale = body.get("mean_staleness")
                self.version = self.version if version is None else version
                self.mean_staleness = stale if isinstance(stale, int | float) else None
                self.model_digest = digest if isinstance(digest, str) else ""
                self.outcomes.committed(body)
                if version is not None:
                    self.totals.add(
                        *(version, self.payload_up, self.payload_down, self.outcomes.used),
                        self.mean_staleness,
                    )
            case "finished":
                self._finished, self.failed = True, body.get("failed") is True

    def _withdraw_score(self, seq: int, refusal: Refusal) -> None:
        """Remove the metrics of a score that the aggregator has rejected."""
        if seq not in self._scores:
            return
        point, to = self._scores.pop(seq)
        self.outcomes.rejected_score(refusal)
        point.withdraw(to)
        if not point.clients:
            self.curve = [each for each in self.curve if each is not point]

    def _sent(self, message: Message, task: SentTask) -> None:
        if self.first_task_at is None:
            self.first_task_at = task.at
        self.payload_down += _count(self.groups["down"], message)
        self.outcomes.sent(task)
        if task.is_evaluation and task.version is not None and task.client is not None:
            self._asked.setdefault(task.version, set()).add(task.to)

    def _answer(self, entry: AnyEntry, message: Message, task: SentTask | None) -> None:
        body = message.body
        if message.sender not in self.disagreeing and disagree(
            self.version_0, body.get("version_0")
        ):
            self.disagreeing.append(message.sender)
        self.payload_up += _count(self.groups["up"], message)
        counts = task is not None and task.seq > self.extended_at
        self.outcomes.answered(entry.seq, message, task if counts else None)
        if message.kind == "score" and task is not None and task.version is not None:
            metrics = body.get("metrics")
            if isinstance(metrics, dict):
                self._evaluated(entry, task.version, task.to, received_metrics(metrics))

    def _evaluated(self, entry: AnyEntry, version: int, to: str, metrics: dict[str, float]) -> None:
        """Record the metrics of a version from the evaluator or a client."""
        wall_s = self._since_start(entry.at)
        if to == EVALUATOR:
            point = CurvePoint(version, wall_s, metrics)
            self.curve.append(point)
            self._scores[entry.seq] = point, to
            return
        found = next((each for each in reversed(self.curve) if each.version == version), None)
        point = found or CurvePoint(version, wall_s)
        if found is None:
            self.curve.append(point)
        point.wall_s = wall_s
        self._scores[entry.seq] = point, to
        point.add(to, metrics)
        asked = self._asked.get(version, ())
        point.asked = max(point.asked, len(asked))
        if len(point.clients) >= point.asked:
            self._asked.pop(version, None)


def _count(groups: dict[str, int], message: Message) -> int:
    """Count a payload by group of tensors; return its bytes."""
    total = end = 0
    for name, _, blobs in group_blobs(message):
        size = sum([blob.size for blob in blobs])  # faster than with a generator
        groups[name] = groups.get(name, 0) + size
        total += size
        end += len(blobs)
    return total + sum([blob.size for blob in message.blobs[end:]])


def runs_of(entries: Iterable[AnyEntry], started_at: float | None = None) -> dict[str, RunHistory]:
    """Fold the entries of a ledger, and return its runs by id, in the order of their start.

    Args:
        entries: all entries, in order.
        started_at: see `RunHistory`.
    """
    found: dict[str, RunHistory] = {}
    for entry in entries:
        match entry:
            case Opened(run=run):
                found[run] = RunHistory(started_at)
            case Refusal(run=run) | Ended(run=run):
                pass
            case Accepted() if len(found) > 1:
                run = entry.read().run
            case _:
                # The only run; of several, consumed messages do not name theirs.
                run = next(iter(found)) if len(found) == 1 else ""
        if run in found:
            found[run].feed(entry)
    return found
