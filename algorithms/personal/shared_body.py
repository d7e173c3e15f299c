"""What FedPer and FedRep share: FedAvg of a model's body; each client keeps its own head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from fedmq.algorithms.base import Client, Payload, Task, TrainResult
from fedmq.algorithms.fedavg import FedAvg, ModelState
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.toolkit.dry_step import dry_step
from fedmq.algorithms.toolkit.results import result_payload
from fedmq.algorithms.toolkit.sgd import cuda_devices
from fedmq.algorithms.toolkit.split_model import Split, local_metrics, scratch_split


@dataclass(frozen=True)
class SharedBody(FedAvg):
    """FedAvg of the body; each client keeps its head, which is never sent.

    head: number of the last trained layers that are the head.
    Other fields are FedAvg's.
    """

    evaluated_by: ClassVar[Literal["model", "clients"]] = "clients"

    head: Annotated[int, Field(ge=1)] = 1

    # ---- at the aggregator

    def start(self, problem: Problem) -> ModelState:
        """Return phi_0, the body of the problem's first model.

        Raises:
            ProblemError: the model cannot be cut.
        """
        model = Split(problem, self.head)
        body = model.body_vectors()
        return ModelState(model.shared, body.weights, body.counters)

    # ---- at the client

    def try_model(self, problem: Problem, data: Examples, device: str) -> None:
        """Try a step of the problem's model, body and head."""
        dry_step(lambda: Split(problem, self.head, device).whole, problem, data, device)

    def train(self, task: Task, client: Client) -> TrainResult:
        """Return the body or its change; keep the head."""
        model = scratch_split(client.problem, self.head, client.device)
        came = model.load(task.payload, client.local)
        data = client.data.to(client.device)
        with torch.random.fork_rng(devices=cuda_devices(client.device)):
            torch.manual_seed(client.seed)
            self.learn(model, data, client)
        numbers = {"reply": task.reply}
        payload = result_payload(model.shared, came, model.body_vectors(), numbers, task.reply)
        return TrainResult(payload, len(data), Payload(exact=model.kept_tensors()))

    @abstractmethod
    def learn(self, model: Split, data: Examples, client: Client) -> None:
        """Run a task's local epochs on a loaded model."""

    def evaluate_client(self, task: Task, client: Client) -> Mapping[str, float]:
        """Return the metrics, on the client's test data, of its head on phi_t.

        ``loss`` and ``accuracy`` are those after `tune` on its training data;
        ``accuracy_before`` is that with the client's local head (or the first one).
        """
        model = scratch_split(client.problem, self.head, client.device)
        model.load(task.payload, client.local)
        before = local_metrics(model.whole, client)["accuracy"]
        model.load(task.payload, client.local)
        data = client.data.to(client.device)
        with torch.random.fork_rng(devices=cuda_devices(client.device)):
            torch.manual_seed(client.seed)
            self.tune(model, data, client)
        return {**local_metrics(model.whole, client), "accuracy_before": before}

    @abstractmethod
    def tune(self, model: Split, data: Examples, client: Client) -> None:
        """Fit a loaded model to the client's training data, for an evaluation."""
