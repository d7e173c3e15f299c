"""Summary of a run, folded from its ledger entry by entry."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmq.broker.ledger.entries import Accepted, AnyEntry, Ended, Opened
from fedmq.broker.wire.addresses import AGGREGATOR, BROKER, CONTINUED, EVALUATOR, WORKER
from fedmq.broker.wire.schema import Message
from fedmq.nodes.messages.tensor_tables import has_table
from fedmq.nodes.run.agreement import disagree
from fedmq.nodes.run.config import parse
from fedmq.nodes.run_folder.outcomes import Outcomes
from fedmq.nodes.run_folder.strict_json import not_finite


@dataclass
class NodeState:
    """State of one node.

    sessions, tasks, drops: number of its sessions, answered tasks and failed tasks.
    here: whether it is connected.
    doing: addressee of each task that it has now, by the task's id.
    """

    role: str
    sessions: int = 0
    tasks: int = 0
    drops: int = 0
    here: bool = False
    doing: dict[str, str] = field(default_factory=dict)


@dataclass
class CurvePoint:
    """The evaluation of one version, by the evaluator or by the clients.

    wall_s: seconds since the start of the run, without the time in which it was stopped.
    metrics: metrics by name; means over the clients that have answered so far.
    clients: metrics of each client that has answered, by its address.
    """

    version: int
    wall_s: float
    metrics: dict[str, float]
    clients: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def accuracy(self) -> float | None:
        """Return the accuracy, if it is among the metrics."""
        return self.metrics.get("accuracy")

    @property
    def loss(self) -> float | None:
        """Return the loss, if it is among the metrics."""
        return self.metrics.get("loss")

    def add(self, client: str, metrics: dict[str, float]) -> None:
        """Add a client's metrics of this version."""
        self.clients[client] = metrics
        names = dict.fromkeys(name for each in self.clients.values() for name in each)
        for name in names:
            known = [each[name] for each in self.clients.values() if name in each]
            self.metrics[name] = sum(known) / len(known)


@dataclass
class RunFold:
    """The state of one run, folded from the entries of its ledger."""

    started_at: float | None = None
    """Start of the run in seconds since 1970; by default, the time of its first message."""
    run: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    now: float | None = None
    """Time of the newest entry; None before the first."""
    version: int = 0
    outcomes: Outcomes = field(default_factory=Outcomes)
    mean_staleness: float | None = None
    model_digest: str = ""
    curve: list[CurvePoint] = field(default_factory=list)
    nodes: dict[str, NodeState] = field(default_factory=dict)
    payload_down: int = 0
    payload_up: int = 0
    wire_down: int = 0
    wire_up: int = 0
    ended: str | None = None
    stopped_s: float = 0.0
    """Seconds in which the run was stopped, until it was resumed."""
    failed: bool = False
    """Whether the run ended without reaching its goal."""
    version_0: Any = None
    """The aggregator's fingerprint of the model that the run starts from."""
    disagreeing: list[str] = field(default_factory=list)
    """Names of the nodes whose fingerprint differs."""
    first_task_at: float | None = None
    total_clients: int | None = None
    _aggregator: str = AGGREGATOR
    kinds: dict[str, dict[str, int]] = field(default_factory=lambda: {"down": {}, "up": {}})
    """Payload bytes by direction and by group of tensors."""
    _asked: dict[str, tuple[int, str]] = field(default_factory=dict)
    """(version, addressee) of each outstanding task and evaluation, by its id."""
    _hosts: dict[str, str] = field(default_factory=dict)

    def feed(self, entries: Iterable[AnyEntry]) -> None:
        """Fold more entries, in order."""
        for entry in entries:
            self.now = entry.at
            message = entry.read() if isinstance(entry, Accepted) else None
            self.outcomes.feed(entry, message, self._aggregator)
            if message is not None:
                self._message(message, entry.at)
            match entry:
                case Opened(total_clients=clients):
                    self.total_clients = clients
                case Ended(reason=reason, nodes=nodes):
                    self.ended = reason
                    for name, counts in nodes.items():
                        if name not in self.nodes or self.nodes[name].role != AGGREGATOR:
                            self.wire_down += counts["sent_bytes"]
                            self.wire_up += counts["received_bytes"]

    @property
    def wall_s(self) -> float:
        """Return the run's duration in seconds, without the time in which it was stopped."""
        if self.now is None:
            return 0.0
        return self._since_start(self.now)

    def _since_start(self, at: float) -> float:
        return at - (at if self.started_at is None else self.started_at) - self.stopped_s

    @property
    def status(self) -> str:
        """Return the run's status: ``finished``, ``failed`` or ``interrupted``."""
        if self.ended is None:
            return "interrupted"
        return "failed" if self.failed else "finished"

    @property
    def missing_clients(self) -> list[int]:
        """Return the unreachable clients if the run waits for them: no node has a task."""
        if self.ended is not None or not self.run or self.total_clients is None:
            return []
        if any(node.here and node.doing for node in self.nodes.values()):
            return []
        here = {name for name, node in self.nodes.items() if node.here}
        hosts = ((k, self._hosts.get(f"client/{k}")) for k in range(self.total_clients))
        return [client for client, host in hosts if host not in here]

    @property
    def working_clients(self) -> list[int]:
        """Return the clients that have a task on a connected node."""
        names = {to for node in self.nodes.values() if node.here for to in node.doing.values()}
        numbers = (name.removeprefix("client/") for name in names)
        return sorted(int(number) for number in numbers if number.isdecimal())

    @property
    def first_task_s(self) -> float | None:
        """Return the seconds from the start to the first task; None before it."""
        if self.first_task_at is None or self.started_at is None:
            return None
        return self.first_task_at - self.started_at

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

    def _message(self, message: Message, at: float) -> None:
        """Fold a message; a kind counts only from the sender that it belongs to."""
        if self.started_at is None:
            self.started_at = at
        size = sum(blob.size for blob in message.blobs)
        if message.sender == BROKER:
            self._from_broker(message)
        elif message.sender == self._aggregator:
            self._from_aggregator(message, at, size)
        else:
            self._from_worker(message, at, size)

    def _from_broker(self, message: Message) -> None:
        body = message.body
        if message.kind == "joined":
            node = self.nodes.setdefault(body["node"], NodeState(body["role"]))
            node.sessions += 1
            node.here = True
            if body["role"] == AGGREGATOR:
                self._aggregator = body["node"]
            if body["role"] == EVALUATOR:
                self._hosts[EVALUATOR] = body["node"]
            for low, high in body["clients"]:
                for client in range(low, high + 1):
                    self._hosts[f"client/{client}"] = body["node"]
        elif message.kind == CONTINUED:
            self.ended, self.failed = None, False
            self.config = parse(body["config"]).model_dump()
            self.stopped_s += body["stopped_s"]
            for node in self.nodes.values():
                node.here = False
                node.doing.clear()
        elif message.kind == "left" and (left := self.nodes.get(body["node"])) is not None:
            left.here = False
            left.doing.clear()

    def _from_aggregator(self, message: Message, at: float, size: int) -> None:
        body = message.body
        match message.kind:
            case "run":
                self.run = message.run
                self.config = parse(body["config"]).model_dump()
                self.version_0 = body.get("version_0")
            case "task" | "evaluate":
                self.first_task_at = self.first_task_at or at
                self.payload_down += size
                self._count("down", message)
                self._asked[message.id] = body["model_version"], message.to
                host = self._hosts.get(message.to)
                if host is not None:
                    self.nodes[host].doing[message.id] = message.to
            case "finished":
                self.failed = body.get("failed") is True
            case "version":
                self.version = body["version"]
                self.mean_staleness = body["mean_staleness"]
                self.model_digest = body["model_digest"]

    def _from_worker(self, message: Message, at: float, size: int) -> None:
        if message.kind not in ("result", "failed", "score"):
            return
        node = self.nodes.setdefault(message.sender, NodeState(WORKER))
        if message.sender not in self.disagreeing and disagree(
            self.version_0, message.body.get("version_0")
        ):
            self.disagreeing.append(message.sender)
        node.doing.pop(message.re or "", None)
        self.payload_up += size
        self._count("up", message)
        version, asked = self._asked.pop(message.re or "", (None, ""))
        node.tasks += message.kind != "failed"
        node.drops += message.kind == "failed"
        match message.body:
            case {"metrics": dict(metrics)} if message.kind == "score" and version is not None:
                known = {key: each for key, each in metrics.items() if isinstance(each, float)}
                self._evaluated(version, asked, self._since_start(at), known)

    def _evaluated(
        self, version: int, asked: str, wall_s: float, metrics: dict[str, float]
    ) -> None:
        """Record the metrics of a version from the evaluator or a client."""
        if asked == EVALUATOR:
            self.curve.append(CurvePoint(version, wall_s, metrics))
            return
        point = next((each for each in reversed(self.curve) if each.version == version), None)
        if point is None:
            point = CurvePoint(version, wall_s, {})
            self.curve.append(point)
        point.wall_s = wall_s
        point.add(asked, metrics)

    def _count(self, direction: str, message: Message) -> None:
        """Count a payload's bytes by group of tensors."""
        groups = message.body.get("groups")
        rest = iter(message.blobs)
        for group in groups if isinstance(groups, list) else ():
            match group:
                case {"name": str(name), "buffers": int(buffers)}:
                    many = max(0, buffers) + has_table(group)
                    size = sum(blob.size for blob in itertools.islice(rest, many))
                    kinds = self.kinds[direction]
                    kinds[name] = kinds.get(name, 0) + size

    def summary(self) -> dict[str, Any]:
        """Return the content of ``summary.json``, in which NaN and infinities become null.

        ``not_finite``, if present, lists those values.
        """
        config, last = self.config, self.outcomes.last
        summary = {
            "run": self.run,
            # None: the run was stopped before its first record was written.
            "algorithm": config.get("algorithm", {}).get("name"),
            "schedule": config.get("schedule", {}).get("name"),
            "codec": config.get("codec"),
            "seed": config.get("run", {}).get("seed"),
            "versions": self.version,
            "results": self._results(),
            "rounds": self._rounds(),
            "clients_without_result": {
                str(client): {"tasks": each.tasks, "code": each.code, "reason": each.reason}
                for client, each in self.outcomes.without_result.items()
            },
            "final_accuracy": self.accuracy,
            "metrics": self.curve[-1].metrics if self.curve else {},
            "best_accuracy": self.best_accuracy,
            "curve": [
                {
                    "version": point.version,
                    "wall_s": round(point.wall_s, 3),
                    "accuracy": point.accuracy,
                    "loss": point.loss,
                }
                for point in self.curve
            ],
            "wall_s": round(self.wall_s, 3),
            "first_task_s": None if self.first_task_s is None else round(self.first_task_s, 3),
            "bytes": {
                "down": {"payload": self.payload_down, "wire": self._known(self.wire_down)},
                "up": {"payload": self.payload_up, "wire": self._known(self.wire_up)},
                "kinds": self.kinds,
            },
            "model_digest": self.model_digest,
            "nodes": {
                name: {"sessions": node.sessions, "tasks": node.tasks, "drops": node.drops}
                for name, node in self.nodes.items()
            },
            "status": self.status,
            "ended": self.ended,
            "last_failure": None if last is None else vars(last),
            "disagreeing": self.disagreeing,
        }
        if (clients := self.clients) is not None:
            summary["clients"] = clients
        if strange := not_finite(summary):
            summary["not_finite"] = strange
        return summary

    def _known(self, nbytes: int) -> int | None:
        """Return bytes on the wire, which the broker records at the end of the run."""
        return None if self.ended is None else nbytes

    def _results(self) -> dict[str, Any]:
        """Return counts of results; ``failed`` counts tasks, and ``unaccepted`` posts."""
        outcomes = self.outcomes
        return {
            "used": outcomes.used,
            "stale": outcomes.stale,
            "refused": outcomes.refused,
            "unused": outcomes.unused,
            "failed": outcomes.failed.total(),
            "failed_evaluations": outcomes.failed_evaluations,
            "unaccepted": outcomes.unaccepted,
            "by_code": {code or "unknown": n for code, n in outcomes.rejected.items() if n},
            "failed_by_code": {code or "unknown": n for code, n in outcomes.failed.items() if n},
        }

    def _rounds(self) -> dict[str, int] | None:
        """Return the completeness of cohorts, if the run has synchronous rounds."""
        cohorts = self.outcomes.cohorts
        if not cohorts.versions:
            return None
        return {
            "versions": cohorts.versions,
            "whole": cohorts.whole,
            "wanted": cohorts.wanted,
            "missing": cohorts.missing,
        }

    @property
    def clients(self) -> dict[str, float] | None:
        """Return statistics of accuracy over the clients that evaluated the newest version."""
        answers = self.curve[-1].clients.values() if self.curve else ()
        known = [each["accuracy"] for each in answers if "accuracy" in each]
        return spread(known) if known else None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean, worst_decile (mean of the lowest tenth, at least one), std and count.

    They include the finite values only; ``not_finite``, if present, is the number of the others.
    """
    finite = sorted(filter(math.isfinite, values))
    others = {"not_finite": len(values) - len(finite)} if len(finite) < len(values) else {}
    if not finite:
        return {"mean": math.nan, "worst_decile": math.nan, "std": math.nan, "count": 0, **others}
    return {
        "mean": statistics.fmean(finite),
        "worst_decile": statistics.fmean(finite[: max(1, len(finite) // 10)]),
        "std": statistics.pstdev(finite),
        "count": len(finite),
        **others,
    }
