"""The evaluations that an aggregator has asked for: who may answer, and what it comes to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from fedmq.algorithms.base import AnyAlgorithm, OpaqueState
from fedmq.broker.rejections import Code, Rejection
from fedmq.broker.wire.addresses import EVALUATOR
from fedmq.broker.wire.schema import Message
from fedmq.nodes.aggregator.fleet import Fleet
from fedmq.nodes.messages.payloads import RAW, Packed, pack
from fedmq.nodes.process.exception_text import clip_text


class ClientEvaluation(Struct):
    """An evaluation that a client has been asked for, of which version."""

    client: int
    version: int


@dataclass
class Evaluations:
    """Evaluations that are out, by the id of the message that asked for them.

    One is with the evaluator, or with a client; what clients say of a version counts when
    all of them have said it.

    asked: ids of all that are out.
    examinations: those of clients, by id.
    scores: accuracies that clients have reported, by version, as long as some are missing.
    """

    asked: set[str] = field(default_factory=set)
    client_evaluations: dict[str, ClientEvaluation] = field(default_factory=dict)
    scores: dict[int, list[float]] = field(default_factory=dict)

    def ask(self, name: str, examination: ClientEvaluation | None = None) -> None:
        """Note one that has been asked for; without an examination, of the evaluator."""
        self.asked.add(name)
        if examination is not None:
            self.client_evaluations[name] = examination

    def is_with(self, name: str, node: str, members: Fleet) -> bool:
        """Tell whether a node may answer it."""
        if name not in self.asked:
            return False
        examination = self.client_evaluations.get(name)
        if examination is None:
            return node in members.evaluators
        return node == members.hosts.get(examination.client)

    def awaited(self, members: Fleet) -> bool:
        """Tell whether anybody who is here may still answer one."""
        with_clients = any(
            each.client in members.hosts for each in self.client_evaluations.values()
        )
        return with_clients or bool(
            members.evaluators and self.asked - self.client_evaluations.keys()
        )

    def end(self, name: str, accuracy: float | None) -> float | None:
        """Note that one is over; return the accuracy of its version, once that is known."""
        self.asked.discard(name)
        known = [] if accuracy is None else [accuracy]
        examination = self.client_evaluations.pop(name, None)
        if examination is not None:
            version = examination.version
            known = [*self.scores.pop(version, ()), *known]
            if any(each.version == version for each in self.client_evaluations.values()):
                self.scores[version] = known
                return None
        return sum(known) / len(known) if known else None


def requests(
    algorithm: AnyAlgorithm, state: OpaqueState, version: int, clients: Iterable[int]
) -> Iterator[tuple[str, dict[str, Any], Packed, ClientEvaluation | None]]:
    """Yield the messages that ask for the evaluation of a version: to whom, body, tensors.

    The last is None for the evaluator's. ``clients``: those who can be reached.
    """
    who = f"{type(algorithm).__name__}.evaluation_task"
    if algorithm.evaluated_by == "model":
        packed = pack(algorithm.evaluation_task(state), RAW, 0, who)
        yield EVALUATOR, {**packed.body, "model_version": version}, packed, None
        return
    for client in sorted(clients):
        packed = pack(algorithm.evaluation_task(state, client), RAW, 0, who)
        body = {**packed.body, "client": client, "model_version": version}
        yield f"client/{client}", body, packed, ClientEvaluation(client, version)


def accuracy_in(message: Message) -> tuple[float | None, Rejection | None]:
    """Return the accuracy that an answer tells, if any, and why it cannot be used, if so."""
    match message.body:
        case {"metrics": {"accuracy": float(accuracy)}}:
            return accuracy, None
        case {"metrics": dict()}:
            return None, None
        case _:
            text = "expected metrics as a map of numbers"
            failed = message.kind == "failed"
            return None, None if failed else Rejection(Code.MALFORMED, text)


def metrics_without_accuracy(message: Message) -> str | None:
    """Return which metrics an answer has, if it has some and accuracy is not among them."""
    match message.body:
        case {"metrics": dict(metrics)} if metrics and "accuracy" not in metrics:
            return clip_text(", ".join(sorted(map(str, metrics))))
        case _:
            return None
