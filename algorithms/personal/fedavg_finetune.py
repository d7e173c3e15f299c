"""Baselines for personal models: FedAvg with fine-tuning, and training alone.

They are FedAvg+FT and Local in the tables of Collins et al., ICML 2021.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from fedmq.algorithms.base import Client, Payload, Result, Task, TrainResult
from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.fedavg import Accumulator, FedAvg, ModelState
from fedmq.algorithms.problems.base import Problem
from fedmq.algorithms.toolkit.flat_model import FlatModel
from fedmq.algorithms.toolkit.sgd import cuda_devices, load_model
from fedmq.algorithms.toolkit.split_model import Split, local_metrics, scratch_split


@dataclass(frozen=True)
class FedAvgFT(FedAvg):
    """FedAvg whose model each client fine-tunes on its own training data before evaluation.

    finetune_epochs: passes over the local data, with the SGD of training; the result is
        discarded. With 0 the common model is evaluated on local data.
    head: number of the last trained layers to fine-tune, with the rest frozen; None fine-tunes
        the whole model.
    Other fields are FedAvg's.
    """

    name: ClassVar[str] = "fedavg-ft"
    evaluated_by: ClassVar[Literal["model", "clients"]] = "clients"

    finetune_epochs: Annotated[int, Field(ge=0)] = 10
    head: Annotated[int, Field(ge=1)] | None = None

    def start(self, problem: Problem) -> ModelState:
        """w_0.

        Raises:
            ProblemError: the model cannot be cut there.
        """
        if self.head is not None:
            Split(problem, self.head)
        return super().start(problem)

    def evaluate_client(self, task: Task, client: Client) -> Mapping[str, float]:
        """Return the metrics of the fine-tuned w_t on the client's test data.

        ``loss`` and ``accuracy`` are those after fine-tuning on its training data,
        ``accuracy_before`` is that of w_t itself.
        """
        if self.head is None:
            model, _ = load_model(task, client.problem, client.device)
            return self._tuned(model, client)
        split = scratch_split(client.problem, self.head, client.device)
        split.whole.load(*split.whole.layout.read(task.payload))
        return self._tuned(split.whole, client, split)

    def _tuned(
        self, model: FlatModel, client: Client, split: Split | None = None
    ) -> Mapping[str, float]:
        """Evaluate a loaded model, fine-tune it (or the head of ``split``), and evaluate it."""
        start, counters = model.weights.clone(), model.read_counters()
        before = local_metrics(model, client)
        model.load(start, counters)  # an evaluation changes nothing for the training
        if not self.finetune_epochs:
            return {**before, "accuracy_before": before["accuracy"]}
        if split is None:
            dataclasses.replace(self, epochs=self.finetune_epochs).alone(model, client)
        else:
            with torch.random.fork_rng(devices=cuda_devices(client.device)):
                torch.manual_seed(client.seed)
                data = client.data.to(client.device)
                split.fit("head", data, self.finetune_epochs, self.sgd_settings, client)
        after = local_metrics(model, client)
        return {**after, "accuracy_before": before["accuracy"]}

    def alone(self, model: FlatModel, client: Client) -> None:
        """Run E epochs on a loaded model that is not sent."""
        # Nothing is sent, so the uplink's codec does not restrict the steps.
        at = dataclasses.replace(client, data=client.data.to(client.device), project=None)
        with torch.random.fork_rng(devices=cuda_devices(client.device)):
            torch.manual_seed(client.seed)
            self._sgd(model, model.trained, at.data, at)


@dataclass(frozen=True)
class LocalOnly(FedAvgFT):
    """Each client trains its own model further in each task; nothing is shared.

    finetune_epochs: additional passes over the local data before a client is evaluated; the
        result is discarded.
    epochs, batch_size, lr, momentum, weight_decay: of its SGD.

    All other fields, and the weights of results, have no effect: the aggregator's state stays
    the problem's first model, which is never sent.
    """

    name: ClassVar[str] = "local"

    def task(self, state: ModelState, client: int) -> Payload:
        """Return an empty payload."""
        return Payload()

    def accumulate(
        self,
        accumulator: Accumulator,
        state: ModelState,
        result: Result,
        weight: float,
    ) -> Accumulator:
        """Check that a result is empty."""
        if result.payload.weights or result.payload.exact:
            raise ResultError("expected a result without tensors")
        return accumulator

    def commit(self, state: ModelState, accumulator: Accumulator, divisor: float) -> ModelState:
        """Return the unchanged state."""
        return state

    def train(self, task: Task, client: Client) -> TrainResult:
        """Run E epochs of SGD from the client's local model, and keep the result."""
        model = own_model(client)
        self.alone(model, client)
        layout = model.layout
        kept = layout.views(model.weights.cpu()) | layout.counter_views(model.read_counters())
        payload = Payload(numbers={"reply": task.reply})
        return TrainResult(payload, len(client.data), Payload(exact=kept))

    def evaluate_client(self, task: Task, client: Client) -> Mapping[str, float]:
        """Return the metrics of the client's own model, trained further, on its test data."""
        return self._tuned(own_model(client), client)


def own_model(client: Client) -> FlatModel:
    """Return a working copy of a client's local model, or of the problem's first one."""
    problem = client.problem
    model = FlatModel(problem.model(), client.device, problem.model)
    if client.local is not None:
        model.load(*model.layout.read(client.local))
    return model
