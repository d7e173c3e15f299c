"""FedAvg: McMahan, Moore, Ramage, Hampson, Aguera y Arcas,
"Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedmq.algorithms.base import Algorithm, Client, Payload, Result, Task
from fedmq.algorithms.errors import Fault, ResultError
from fedmq.algorithms.model import FlatModel, Layout, scratch_model, zeros
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.rng import derive_rng

_EVALUATION_BATCH = 500
_LARGEST = 1e30
"""Of a weighted value: millions of them still have a sum in float32."""


@dataclass(frozen=True)
class ModelState:
    """One version of the global model. weights: float32 [dim]; counters: int64."""

    layout: Layout
    weights: Tensor
    counters: Tensor


@dataclass
class Gathered:
    """The running sum over a version's results, whatever their number.

    total: float32 [dim], sum of weight * what a client sent.
    models: sum of the weights of the results that are models, not updates.
    counters: int64, largest so far.
    """

    total: Tensor
    counters: Tensor
    models: float = 0.0


@dataclass(frozen=True)
class FedAvg(Algorithm):
    """Algorithm 1 (FederatedAveraging).

    lr: eta, the clients' learning rate.
    epochs: E, passes over the local data.
    batch_size: B; None is the paper's infinity, the whole local set as one batch.
    momentum: of the local SGD; 0 in the paper. It starts from zero at each task.
    weight_decay: of the local SGD; 0 in the paper.
    server_lr: eta_g, how far the model goes along the averaged update; 1 in the paper.
        FedBuff calls it the global learning rate.
    """

    name: ClassVar[str] = "fedavg"
    schedules: ClassVar[frozenset[str]] = frozenset({"rounds", "buffered", "stream"})
    at_commit: ClassVar[frozenset[str]] = frozenset({"server_lr"})

    lr: Annotated[float, Field(gt=0)] = 0.05
    epochs: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] | None = 10
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    server_lr: Annotated[float, Field(gt=0)] = 1.0

    # ---- at the aggregator

    def start(self, problem: Problem) -> ModelState:
        """w_0."""
        model = FlatModel(problem.model())
        return ModelState(model.layout, model.weights, model.read_counters())

    def task(self, state: ModelState, client: int) -> Payload:
        """Return w_t; the same for every client."""
        return model_payload(state)

    def gather(self, state: ModelState) -> Gathered:
        """Return an empty sum."""
        return Gathered(zeros(state.layout.dim), state.counters.clone())

    def absorb(
        self, gathered: Gathered, state: ModelState, result: Result, weight: float
    ) -> Gathered:
        """Add ``weight`` times the client's update (or model) to the sum."""
        payload = result.payload
        counters = state.layout.flatten_counters(payload.exact)
        # One pass tells that every value is a number, and that no sum of them overflows.
        blocks = state.layout.blocks(payload.weights)
        for _, block in blocks:
            low, high = torch.aminmax(block) if block.numel() else (block.sum(), block.sum())
            largest = max(-low.item(), high.item())
            if not math.isfinite(largest):
                text = "the result holds NaN or infinite values"
                raise ResultError(text, Fault.NOT_FINITE)
            if largest * weight > _LARGEST:
                text = f"the result holds values as large as {largest:g}"
                raise ResultError(text, Fault.TOO_LARGE)
        for start, block in blocks:
            gathered.total[start : start + block.numel()].add_(block, alpha=weight)
        if counters.numel():
            torch.maximum(gathered.counters, counters, out=gathered.counters)
        if payload.numbers.get("reply") == "model":
            gathered.models += weight
        return gathered

    def commit(self, state: ModelState, gathered: Gathered, divisor: float) -> ModelState:
        """w_{t+1} = w_t + eta_g * sum_k (weight_k / divisor) * (w_k - w_t).

        With weight_k = n_k and divisor = sum of n_k over the cohort this is line 8 of
        Algorithm 1. Clients that sent w_k itself have their part of w_t taken out here.
        """
        step = self.server_lr / divisor
        weights = gathered.total.mul_(step).add_(state.weights, alpha=1 - step * gathered.models)
        return ModelState(state.layout, weights, gathered.counters)

    def save(self, state: ModelState) -> Payload:
        """Return w_t, which is all there is."""
        return model_payload(state)

    def load(self, problem: Problem, saved: Payload) -> ModelState:
        """Return the state of a saved w_t."""
        layout = Layout.of(problem.model())
        return ModelState(
            layout, layout.flatten(saved.weights), layout.flatten_counters(saved.exact)
        )

    def tensors(self, state: ModelState) -> Mapping[str, Tensor]:
        """Return the model by name."""
        return state.layout.views(state.weights) | state.layout.counter_views(state.counters)

    # ---- at the client

    def train(self, task: Task, client: Client) -> tuple[Payload, Payload | None]:
        """ClientUpdate(k, w): E epochs of SGD over batches of B, from w_t."""
        model, start = load_model(task, client.problem, client.device)
        layout = model.layout
        data = client.data.to(client.device)
        anchor = start[: layout.parameters]
        with torch.random.fork_rng(devices=cuda_devices(client.device)):
            torch.manual_seed(client.seed)
            self._sgd(model, anchor, data, client)
        vector = model.weights.clone() if task.reply == "model" else model.weights - start
        return Payload(
            weights=layout.views(vector.cpu()),
            exact=layout.counter_views(model.read_counters()),
            numbers={"n": len(data), "reply": task.reply},
        ), None

    def _sgd(self, model: FlatModel, anchor: Tensor, data: Examples, client: Client) -> None:
        """Run the local epochs on a loaded model."""
        loss = client.problem.loss
        trained, gradient = model.trained, model.gradient
        velocity = torch.zeros_like(gradient) if self.momentum else None
        model.module.train()
        epochs = self.local_epochs(client)
        for x, y in batches(data, self.batch_size, epochs, derive_rng(client.seed, "batches")):
            gradient.zero_()
            loss(model.module(x), y).backward()  # type: ignore[no-untyped-call] # torch's
            with torch.no_grad():
                self.regularize(gradient, trained, anchor)
                restrict(client, model.layout, gradient)
                if velocity is not None:
                    gradient = velocity.mul_(self.momentum).add_(gradient)
                trained.add_(gradient, alpha=-self.lr)
                gradient = model.gradient

    def local_epochs(self, client: Client) -> int:
        """Return how many epochs this client does now."""
        return self.epochs

    def regularize(self, gradient: Tensor, trained: Tensor, anchor: Tensor) -> None:
        """Add the gradient of what is not the loss; ``anchor`` is w_t."""
        if self.weight_decay:
            gradient.add_(trained, alpha=self.weight_decay)

    # ---- at the evaluator

    def evaluate(self, task: Task, problem: Problem, device: str) -> Mapping[str, float]:
        """Return the metrics of w_t on the test data."""
        model, _ = load_model(task, problem, device)
        return evaluate_module(model.module, problem, device)


def model_payload(state: ModelState) -> Payload:
    """Return a model as a payload: weights as the codec likes, counters exactly."""
    return Payload(
        weights=state.layout.views(state.weights), exact=state.layout.counter_views(state.counters)
    )


def load_model(task: Task, problem: Problem, device: str) -> tuple[FlatModel, Tensor]:
    """Return the working copy of the model, loaded with w_t, and w_t itself, float32 [dim]."""
    model = scratch_model(problem, device)
    start = model.layout.flatten(task.payload.weights).to(device)
    model.load(start, model.layout.flatten_counters(task.payload.exact))
    return model, start


def restrict(client: Client, layout: Layout, gradient: Tensor) -> None:
    """Project a gradient, float32 [parameters], in place: see `Client.restrict`."""
    if client.restrict is not None:
        whole = torch.zeros(layout.dim, device=gradient.device)
        whole[: layout.parameters] = gradient
        client.restrict(layout.views(whole))
        gradient.copy_(whole[: layout.parameters])


def batches(
    data: Examples, batch_size: int | None, epochs: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches (x [b, ...], y [b]), each epoch a new order, the last one short."""
    n = len(data)
    size = n if batch_size is None else batch_size
    for _ in range(epochs):
        order = torch.from_numpy(rng.permutation(n)).to(data.y.device)
        for start in range(0, n, size):
            chosen = order[start : start + size]
            yield data.x[chosen], data.y[chosen]


def evaluate_module(module: torch.nn.Module, problem: Problem, device: str) -> dict[str, float]:
    """Return a module's metrics on the problem's test data, averaged over examples."""
    return metrics_on(module, problem, problem.test(), device)


def metrics_on(
    module: torch.nn.Module, problem: Problem, data: Examples, device: str
) -> dict[str, float]:
    """Return a module's metrics on some examples, averaged over them."""
    sums: dict[str, float] = {}
    module.eval()
    with torch.no_grad():
        for start in range(0, len(data), _EVALUATION_BATCH):
            x = data.x[start : start + _EVALUATION_BATCH].to(device)
            y = data.y[start : start + _EVALUATION_BATCH].to(device)
            for name, value in problem.metrics(module(x), y).items():
                sums[name] = sums.get(name, 0.0) + value * len(y)
    return {name: value / len(data) for name, value in sums.items()}


def cuda_devices(device: str) -> list[torch.device]:
    """Return the devices, besides the CPU, whose generators a task on ``device`` uses."""
    return [torch.device(device)] if device.startswith("cuda") else []
