"""FedAvg: McMahan, Moore, Ramage, Hampson, Aguera y Arcas,
"Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from fedmq.algorithms.base import Algorithm, Client, Payload, Result, Task, TrainResult
from fedmq.algorithms.errors import Fault, ResultError
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.problems.quadratic import LocalSteps, QuadraticProblem
from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.toolkit.arithmetic import add_scaled, scale_and_add
from fedmq.algorithms.toolkit.dry_step import dry_step
from fedmq.algorithms.toolkit.flat_model import FlatModel, zeros
from fedmq.algorithms.toolkit.layout import Layout
from fedmq.algorithms.toolkit.results import merge_counters, moved, read_result
from fedmq.algorithms.toolkit.sgd import (
    SGDSettings,
    batches,
    cuda_devices,
    evaluate_module,
    learned,
    load_model,
    project,
    spans,
)

_LARGEST = 1e30
"""Limit of a weighted value: float32 can hold the sum of millions of them."""


@dataclass(frozen=True)
class ModelState:
    """One version of the global model: weights float32 [dim], counters int64."""

    layout: Layout
    weights: Tensor
    counters: Tensor


@dataclass
class Accumulator:
    """Running sum over a version's results.

    total: float32 [dim], the sum of weight * result. For tensors that are not trained a result
        is always a change; if a client sends its model, the change is computed here.
    models: sum of the weights of those results that are models.
    counters: int64, see `merge_counters`.
    """

    total: Tensor
    counters: Tensor
    models: float = 0.0

    @classmethod
    def empty(cls, state: ModelState) -> Self:
        """Return the sum of no results."""
        return cls(zeros(state.layout.dim), state.counters.clone())


ModelStateT = TypeVar("ModelStateT", bound=ModelState)
AccumulatorT = TypeVar("AccumulatorT", bound=Accumulator)


@dataclass(frozen=True)
class ModelAveraging(Algorithm[ModelStateT, AccumulatorT]):
    """What FedAvg shares with algorithms that add something to its state or its accumulator.

    See `FedAvg` for the fields.
    """

    schedules: ClassVar[frozenset[str]] = frozenset({"rounds", "buffered", "stream"})
    reproducible: ClassVar[bool] = True
    counts_examples: ClassVar[bool] = True
    bounds_updates: ClassVar[bool] = True
    server_hparams: ClassVar[frozenset[str]] = frozenset({"server_lr"})

    lr: Annotated[float, Field(gt=0)] = 0.05
    epochs: Annotated[int, Field(ge=1)] = 2
    batch_size: Annotated[int, Field(ge=1)] | None = 10
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    server_lr: Annotated[float, Field(gt=0)] = 1.0

    # ---- at the aggregator

    def task(self, state: ModelStateT, client: int) -> Payload:
        """Return w_t, which is the same for every client."""
        return model_payload(state)

    def accumulate(
        self, accumulator: AccumulatorT, state: ModelStateT, result: Result, weight: float
    ) -> AccumulatorT:
        """Add ``weight`` times the client's update (or model) to the sum."""
        add_result(accumulator, state, result, weight)
        return accumulator

    def tensors(self, state: ModelStateT) -> Mapping[str, Tensor]:
        """Return the model by name."""
        return state.layout.tensors(state.weights, state.counters)

    # ---- at the client

    def try_model(self, problem: Problem, data: Examples, device: str) -> None:
        """Try a step of the problem's model."""
        dry_step(lambda: FlatModel(problem.model(), device), problem, data, device)

    def train(self, task: Task, client: Client) -> TrainResult:
        """ClientUpdate(k, w): E epochs of SGD over batches of B, from w_t."""
        model, start = load_model(task, client.problem, client.device)
        layout = model.layout
        data = client.data.to(client.device)
        anchor = start[: layout.parameters]
        if isinstance(client.problem, QuadraticProblem):
            self._sgd_in_closed_form(model, anchor, len(data), client, client.problem)
        else:
            with torch.random.fork_rng(devices=cuda_devices(client.device)):
                torch.manual_seed(client.seed)
                self._sgd(model, anchor, data, client)
        payload = learned(model, start, {"reply": task.reply}, task.reply)
        return TrainResult(payload, len(data))

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
            model.after_backward()
            with torch.no_grad():
                self.regularize(gradient, trained, anchor)
                project(client, model.layout, gradient)
                if velocity is not None:
                    gradient = velocity.mul_(self.momentum).add_(gradient)
                trained.add_(gradient, alpha=-self.lr)
                gradient = model.gradient
        model.end_task()

    def _sgd_in_closed_form(
        self, model: FlatModel, anchor: Tensor, n: int, client: Client, problem: QuadraticProblem
    ) -> None:
        """Do what `_sgd` does, for the stand-in of a problem."""
        size = min(n, self.batch_size or n)
        steps = self.local_epochs(client) * len(spans(n, size))
        how = LocalSteps(
            steps, size, self.lr, self.momentum, self.weight_decay, self.proximal_weight
        )
        moved_by = problem.after_sgd(anchor.cpu(), client.index, client.seed, how).to(anchor)
        moved_by -= anchor
        project(client, model.layout, moved_by)
        model.trained.copy_(anchor + moved_by)

    @property
    def proximal_weight(self) -> float:
        """Return mu, the weight of ||w - w_t||^2 / 2 in the clients' loss."""
        return 0.0

    @property
    def sgd_settings(self) -> SGDSettings:
        """Return the settings of the clients' SGD."""
        return SGDSettings(self.lr, self.batch_size, self.momentum, self.weight_decay)

    def local_epochs(self, client: Client) -> int:
        """Return the number of epochs of this client's task."""
        return self.epochs

    def regularize(self, gradient: Tensor, trained: Tensor, anchor: Tensor) -> None:
        """Add the gradient of regularization terms; ``anchor`` is w_t."""
        if self.weight_decay:
            gradient.add_(trained, alpha=self.weight_decay)

    # ---- at the evaluator

    def evaluate(self, task: Task, problem: Problem, device: str) -> Mapping[str, float]:
        """Return the metrics of w_t on the test data."""
        model, _ = load_model(task, problem, device)
        return evaluate_module(model.module, problem, device)


@dataclass(frozen=True)
class FedAvg(ModelAveraging[ModelState, Accumulator]):
    """Algorithm 1 (FederatedAveraging).

    lr: eta, the clients' learning rate.
    epochs: E, passes over the local data.
    batch_size: B; None is the paper's infinity, the whole local set as one batch.
    momentum: of the local SGD; 0 in the paper. It starts from zero at each task.
    weight_decay: of the local SGD; 0 in the paper.
    server_lr: eta_g, how far the model goes along the averaged update; 1 in the paper.
        FedBuff calls it the global learning rate.

    Other algorithms with these fields use the same defaults, except where their papers ask for
    other values.
    """

    name: ClassVar[str] = "fedavg"

    def start(self, problem: Problem) -> ModelState:
        """w_0."""
        return first_model(problem)

    def new_accumulator(self, state: ModelState) -> Accumulator:
        """Return an empty sum."""
        return Accumulator.empty(state)

    def commit(self, state: ModelState, accumulator: Accumulator, divisor: float) -> ModelState:
        """w_{t+1} = w_t + eta_g * sum_k (weight_k / divisor) * (w_k - w_t).

        With weight_k = n_k and divisor = sum of n_k over the cohort this is line 8 of
        Algorithm 1.
        """
        return averaged(state, accumulator, self.server_lr / divisor)


def first_model(problem: Problem) -> ModelState:
    """Return a problem's first model, w_0."""
    model = FlatModel(problem.model())
    return ModelState(model.layout, model.weights, model.read_counters())


def add_result(accumulator: Accumulator, state: ModelState, result: Result, weight: float) -> None:
    """Add ``weight`` times a client's update (or model) to the sum, in place.

    Raises:
        ResultError: the result is not of this model, or holds NaN or values that are too large.
    """
    payload = result.payload
    model = payload.numbers.get("reply") == "model"
    blocks = read_result(state.layout, payload, state.counters, state.weights if model else None)
    # One pass checks that every value is finite and that no sum of them overflows.
    for _, block in blocks:
        largest = largest_magnitude(block)
        if not math.isfinite(largest):
            raise ResultError("the result holds NaN or infinite values", Fault.NOT_FINITE)
        # The model's own values are read only if the value would be too large beside zeros.
        times = result.bounds.times
        if largest * weight > _LARGEST or (
            largest > times and largest > times * (1 + largest_magnitude(state.weights))
        ):
            text = f"the result holds values as large as {largest:g}"
            raise ResultError(text, Fault.TOO_LARGE)
    if result.bounds.norm is not None:
        norm = update_norm(blocks, state.weights[: state.layout.parameters] if model else None)
        if norm > result.bounds.norm:
            raise ResultError(
                f"expected an update of norm {result.bounds.norm:g} at most (run.max_update_norm), "
                f"got {norm:g}",
                Fault.TOO_LARGE,
            )
    for start, block in blocks:
        add_scaled(accumulator.total[start : start + block.numel()], block, weight)
    if blocks.counters is not None:
        fresh = not result.staleness
        merge_counters(accumulator.counters, state.counters, blocks.counters, fresh=fresh)
    if model:
        accumulator.models += weight


def largest_magnitude(values: Tensor) -> float:
    """Return the largest magnitude in a tensor; NaN if it has one, 0 if it is empty."""
    low, high = torch.aminmax(values) if values.numel() else (values.sum(), values.sum())
    return float(max(-low.item(), high.item()))


def update_norm(blocks: Iterable[tuple[int, Tensor]], model: Tensor | None) -> float:
    """Return the L2 norm of an update, in float64.

    Args:
        blocks: (start, values) of the result.
        model: the trained parameters of the current version, if the result is a model.
    """
    squares = 0.0
    for start, block in blocks:
        change = block
        if model is not None and start < len(model):
            change = block - model[start : start + len(block)]
        squares += float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2
    return math.sqrt(squares)


def averaged(state: ModelState, accumulator: Accumulator, step: float) -> ModelState:
    """Return w_t + step * sum_k weight_k * (w_k - w_t); the accumulator is used up.

    Where clients sent w_k itself, their share of w_t is subtracted here.
    """
    end = state.layout.parameters
    weights, stay = accumulator.total, 1 - step * accumulator.models
    scale_and_add(weights[:end], step, state.weights[:end], stay)
    weights[end:] = moved(state.weights[end:], weights[end:].mul_(step))
    return ModelState(state.layout, weights, accumulator.counters)


def model_payload(state: ModelState) -> Payload:
    """Return a model as a payload: trained weights for the codec, the rest exactly."""
    return state.layout.write(state.weights, state.counters)
