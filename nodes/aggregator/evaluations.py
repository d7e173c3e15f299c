"""Evaluations that an aggregator requested: who may answer them, and their accuracy."""

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
    """A requested evaluation of a version by a client."""

    client: int
    version: int


@dataclass
class Evaluations:
    """Outstanding evaluations by the evaluator or by clients.

    The clients' accuracy of a version counts once all of them have answered.

    asked: ids of the requests for all outstanding evaluations.
    client_evaluations: those by clients, by id.
    scores: accuracies from clients, by version, while others are missing.
    """

    asked: set[str] = field(default_factory=set)
    client_evaluations: dict[str, ClientEvaluation] = field(default_factory=dict)
    scores: dict[int, list[float]] = field(default_factory=dict)

    def ask(self, name: str, of_client: ClientEvaluation | None = None) -> None:
        """Add a requested evaluation, by a client or, without ``of_client``, by the evaluator."""
        self.asked.add(name)
        if of_client is not None:
            self.client_evaluations[name] = of_client

    def is_with(self, name: str, node: str, fleet: Fleet) -> bool:
        """Return whether a node may answer an evaluation."""
        if name not in self.asked:
            return False
        of_client = self.client_evaluations.get(name)
        if of_client is None:
            return node in fleet.evaluators
        return node == fleet.hosts.get(of_client.client)

    def awaited(self, fleet: Fleet) -> bool:
        """Return whether a connected node can still answer an evaluation."""
        asked = self.client_evaluations.values()
        with_clients = any(each.client in fleet.reachable for each in asked)
        return with_clients or bool(
            fleet.evaluators and self.asked - self.client_evaluations.keys()
        )

    def end(self, name: str, accuracy: float | None) -> float | None:
        """Remove an evaluation; return the accuracy of its version, once that is known."""
        self.asked.discard(name)
        known = [] if accuracy is None else [accuracy]
        of_client = self.client_evaluations.pop(name, None)
        if of_client is not None:
            version = of_client.version
            known = self.scores.pop(version, [])
            known += [] if accuracy is None else [accuracy]
            if any(each.version == version for each in self.client_evaluations.values()):
                self.scores[version] = known
                return None
        return sum(known) / len(known) if known else None

    def faults(self, version: int) -> Iterator[str]:
        """Yield what contradicts itself, for `AggregatorState.validate_state`."""
        if unknown := self.client_evaluations.keys() - self.asked:
            yield f"evaluations {sorted(unknown)} are with clients, but were not requested"
        versions = {each.version for each in self.client_evaluations.values()}
        if future := [each for each in versions if each > version]:
            yield f"versions {sorted(future)} are evaluated before they exist"
        if complete := self.scores.keys() - versions:
            yield f"versions {sorted(complete)} wait for scores, but every client has answered"


def requests(
    algorithm: AnyAlgorithm, state: OpaqueState, version: int, clients: Iterable[int]
) -> Iterator[tuple[str, dict[str, Any], Packed, ClientEvaluation | None]]:
    """Yield the evaluation requests of a version: addressee, body, tensors, client.

    The client is None for the evaluator. ``clients``: the reachable ones, in order.
    """
    who = f"{type(algorithm).__name__}.evaluation_task"
    if algorithm.evaluated_by == "model":
        packed = pack(algorithm.evaluation_task(state), RAW, 0, who)
        yield EVALUATOR, {**packed.body, "model_version": version}, packed, None
        return
    for client in clients:
        packed = pack(algorithm.evaluation_task(state, client), RAW, 0, who)
        body = {**packed.body, "client": client, "model_version": version}
        yield f"client/{client}", body, packed, ClientEvaluation(client, version)


def accuracy_in(message: Message) -> tuple[float | None, Rejection | None]:
    """Return the accuracy in an answer, or None, and the rejection if the answer is malformed."""
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
    """Return the names of an answer's metrics if it has some but no accuracy, else None."""
    match message.body:
        case {"metrics": dict(metrics)} if metrics and "accuracy" not in metrics:
            return clip_text(", ".join(sorted(map(str, metrics))))
        case _:
            return None
