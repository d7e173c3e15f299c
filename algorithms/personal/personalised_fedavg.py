"""Personalised FedAvg: Jiang, Konecny, Rush, Kannan,
"Improving Federated Learning Personalization via Model Agnostic Meta Learning", 2019.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmq.algorithms.base import Client, Payload, Reply, Result, Task, TrainResult
from fedmq.algorithms.errors import Fault, ResultError
from fedmq.algorithms.fedavg import (
    Accumulator,
    ModelAveraging,
    ModelState,
    first_model,
)
from fedmq.algorithms.personal.perfedavg import gradient
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.toolkit.adaptation import before_and_after
from fedmq.algorithms.toolkit.arithmetic import power, square_root
from fedmq.algorithms.toolkit.flat_model import FlatModel, zeros
from fedmq.algorithms.toolkit.results import moved, read_result
from fedmq.algorithms.toolkit.sgd import batches, cuda_devices, learned, load_model, project
from fedmq.algorithms.toolkit.states import SavedAs, expect_count, load_state
from fedmq.codecs.text import shorten

_FEDAVG, _REPTILE = "fedavg", "reptile"
"""The phases."""
_LARGEST_SQUARED = 1e15
"""Limit of a value that Adam squares: the square is far from float32's largest."""


@dataclass(frozen=True)
class MetaState(ModelState):
    """One version of the global model and of the server's optimizer.

    version: number of versions before it; it decides the phase.
    moments: float32 [parameters] by name: ``velocity`` in the phase of FedAvg, ``first`` and
        ``second`` (Adam) in that of Reptile.
    """

    version: int
    moments: Mapping[str, Tensor] = field(metadata=SavedAs(prefix="server/").field)


@dataclass(frozen=True)
class PersonalisedFedAvg(ModelAveraging[MetaState, Accumulator]):
    """FedAvg(E), then Reptile(K), then each client fine-tunes.

    epochs: E, local epochs of FedAvg(E); the paper wants it fairly large, so 10 by default.
    momentum: 0 as in the paper: the clients' SGD is plain.
    lr, batch_size: eta and B of the clients' SGD, in both phases and in fine-tuning.
    server_lr, server_momentum: of the server's step in FedAvg(E), SGD with momentum along the
        averaged update.
    switch: first version whose tasks are Reptile's; 0 is Reptile alone, and a number that no run
        reaches is FedAvg alone.
    steps: K, mini-batch steps of a task of Reptile(K).
    reptile_lr, beta1, beta2, epsilon: of the server's step in Reptile(K), Adam (Kingma and Ba,
        ICLR 2015, algorithm 1). Its gradient is the averaged update with its sign turned.
    personal_epochs: local epochs of fine-tuning, at evaluation.

    FedAvg's mean is weighted by examples, Reptile's is plain: the number of examples of a result
    is ``steps * batch_size``.
    """

    name: ClassVar[str] = "personalised-fedavg"
    schedules: ClassVar[frozenset[str]] = frozenset({"rounds", "buffered"})
    fixed_reply: ClassVar[Reply | None] = "update"
    evaluated_by: ClassVar[Literal["model", "clients"]] = "clients"
    counts_examples: ClassVar[bool] = False
    server_hparams: ClassVar[frozenset[str]] = frozenset(
        {"server_lr", "server_momentum", "reptile_lr", "beta1", "beta2", "epsilon"}
    )

    epochs: Annotated[int, Field(ge=1)] = 10
    momentum: Annotated[float, Field(ge=0, le=0)] = 0.0
    weight_decay: Annotated[float, Field(ge=0, le=0)] = 0.0
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    switch: Annotated[int, Field(ge=0)] = 100
    steps: Annotated[int, Field(ge=1)] = 10
    reptile_lr: Annotated[float, Field(gt=0)] = 0.001
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    personal_epochs: Annotated[int, Field(ge=1)] = 1

    def _phase(self, version: int) -> str:
        return _FEDAVG if version < self.switch else _REPTILE

    # ---- at the aggregator

    def start(self, problem: Problem) -> MetaState:
        """w_0."""
        model = first_model(problem)
        moments = self._rest(model.layout.parameters, 0)
        return MetaState(model.layout, model.weights, model.counters, 0, moments)

    def new_accumulator(self, state: MetaState) -> Accumulator:
        """Return an empty sum."""
        return Accumulator.empty(state)

    def accumulate(
        self, accumulator: Accumulator, state: MetaState, result: Result, weight: float
    ) -> Accumulator:
        """Add ``weight`` times the client's update to the sum, if it is of the state's phase.

        A late result of FedAvg(E) is rejected after the switch: an update of many epochs would
        set the scale of Adam's first steps, which should be that of K steps.
        """
        payload = result.payload
        phase, expected = payload.numbers.get("phase"), self._phase(state.version)
        if phase != expected:
            raise ResultError(f"expected a result of phase {expected!r}, got {shorten(phase)}")
        if expected == _REPTILE:
            for _, block in read_result(state.layout, payload, state.counters):
                largest = block.abs().max().item() if block.numel() else 0.0
                if largest > _LARGEST_SQUARED:
                    text = f"the result holds values as large as {largest:g}"
                    raise ResultError(text, Fault.TOO_LARGE)
        return super().accumulate(accumulator, state, result, weight)

    def commit(self, state: MetaState, accumulator: Accumulator, divisor: float) -> MetaState:
        """Take the server optimizer's step along the averaged update.

        Tensors without a gradient, such as BatchNorm's statistics, change by the average.
        """
        end, version = state.layout.parameters, state.version
        mean = accumulator.total.div_(divisor)
        step = self._sgdm if self._phase(version) == _FEDAVG else self._adam
        change, moments = step(state, mean[:end])
        if self._phase(version + 1) != self._phase(version):
            moments = self._rest(end, version + 1)
        rest = moved(state.weights[end:], mean[end:])
        weights = torch.cat([state.weights[:end] + change, rest])
        return MetaState(state.layout, weights, accumulator.counters, version + 1, moments)

    def _sgdm(self, state: MetaState, update: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """m <- mu m + Delta; w <- w + eta_g m."""
        velocity = update.add(state.moments["velocity"] * self.server_momentum)
        return velocity * self.server_lr, {"velocity": velocity}

    def _adam(self, state: MetaState, update: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Adam on the gradient -Delta; t counts the steps since the switch."""
        t = state.version - self.switch + 1
        first = state.moments["first"] * self.beta1 + update * (1 - self.beta1)
        second = state.moments["second"] * self.beta2 + update * update * (1 - self.beta2)
        size = square_root(second / (1 - power(self.beta2, t))).add_(self.epsilon)
        moved = (first / size).mul_(self.reptile_lr / (1 - power(self.beta1, t)))
        return moved, {"first": first, "second": second}

    def load(self, problem: Problem, saved: Payload) -> MetaState:
        """Return the state of a saved w_t, t and moments; t decides which moments there are."""
        first, version = self.start(problem), expect_count("version", saved.numbers)
        moments = self._rest(first.layout.parameters, version)
        state = load_state(dataclasses.replace(first, moments=moments), saved)
        if "second" in moments and bool((state.moments["second"] < 0).any()):
            raise ResultError("expected values of server/second of at least 0")
        return state

    def _rest(self, size: int, version: int) -> dict[str, Tensor]:
        """Return the moments of an optimizer before its first step."""
        names = ("velocity",) if self._phase(version) == _FEDAVG else ("first", "second")
        return {name: zeros(size) for name in names}

    # ---- at the client

    def train(self, task: Task, client: Client) -> TrainResult:
        """Run E epochs, or after the switch K steps, of SGD from w_t."""
        phase = self._phase(task.version)
        if phase == _FEDAVG:
            found = super().train(task, client)
            numbers = {**found.payload.numbers, "phase": phase}
            payload = dataclasses.replace(found.payload, numbers=numbers)
            return TrainResult(payload, found.num_examples)
        model, start = load_model(task, client.problem, client.device)
        layout = model.layout
        data = client.data.to(client.device)
        model.module.train()
        with torch.random.fork_rng(devices=cuda_devices(client.device)):
            torch.manual_seed(client.seed)
            order = derive_rng(client.seed, "batches")
            for x, y in islice(batches(data, self.batch_size, self.steps, order), self.steps):
                step = gradient(model, Examples(x, y), client)
                project(client, layout, step)
                model.trained.add_(step, alpha=-self.lr)
        model.end_task()
        size = len(data) if self.batch_size is None else min(self.batch_size, len(data))
        payload = learned(model, start, {"reply": task.reply, "phase": phase})
        return TrainResult(payload, self.steps * size)

    def evaluate_client(self, task: Task, client: Client) -> Mapping[str, float]:
        """Fine-tune w_t on the client's training examples as in training, then evaluate it."""

        def adapt(model: FlatModel, data: Examples) -> None:
            free = dataclasses.replace(client, project=None)
            tuned = dataclasses.replace(self, epochs=self.personal_epochs)
            tuned._sgd(model, model.trained, data, free)  # noqa: SLF001 - this class, other epochs

        return before_and_after(task, client, adapt)
