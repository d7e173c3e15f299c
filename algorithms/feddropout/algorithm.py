"""Federated Dropout: Caldas, Konecny, McMahan, Talwalkar,
"Expanding the Reach of Federated Learning by Reducing Client Resource Requirements", 2018.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmq.algorithms.base import Client, Payload, Result, Task, TrainResult
from fedmq.algorithms.fedavg import (
    Accumulator,
    ModelAveraging,
    ModelState,
    add_result,
    averaged,
    first_model,
    model_payload,
)
from fedmq.algorithms.feddropout.submodels import SubModels, SubProblem
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.toolkit.arithmetic import add_scaled
from fedmq.algorithms.toolkit.dry_step import dry_step
from fedmq.algorithms.toolkit.flat_model import FlatModel, zeros
from fedmq.algorithms.toolkit.results import merge_counters
from fedmq.algorithms.toolkit.states import DERIVED, expect_count


@dataclass(frozen=True)
class DropoutState(ModelState):
    """One version of the global model, and what determines its sub-models.

    parts: shapes and positions of the sub-models; the same for all versions.
    version: number of versions before it.
    clients: K.
    """

    parts: SubModels = field(metadata=DERIVED)
    version: int
    clients: int = field(metadata=DERIVED)


@dataclass
class DropoutAccumulator(Accumulator):
    """Running sum over the results of sub-models; ``total`` contains updates only.

    held: float32 [dim], for each coordinate the sum of the weights of the results that hold it;
        None unless ``absent`` is ``holders``.
    weight: sum of the weights of all results.
    """

    held: Tensor | None = None
    weight: float = 0.0


@dataclass(frozen=True)
class FedDropout(ModelAveraging[DropoutState, DropoutAccumulator]):
    """Each task trains another random sub-model.

    keep: p, the share of the units (filters) of each hidden layer in a sub-model:
        ``round(p * units)`` of them, at least one. 1 is FedAvg.
    absent: how the server counts a coordinate that a client did not get. ``zero`` (the paper):
        as an update of zero. ``holders``: not at all; each coordinate is averaged over the
        clients that hold it.
    seed: with the version and the client it determines a sub-model; None is the run's.
    Other fields are FedAvg's.

    Activations are not scaled by 1/p, neither in the sub-model nor in the whole model: the paper
    does not mention it.
    """

    name: ClassVar[str] = "feddropout"
    task_per_client: ClassVar[bool] = True
    server_hparams: ClassVar[frozenset[str]] = frozenset({"server_lr", "absent"})

    keep: Annotated[float, Field(gt=0, le=1)] = 0.75
    absent: Literal["zero", "holders"] = "zero"
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    # ---- at the aggregator

    def start(self, problem: Problem) -> DropoutState:
        """w_0.

        Raises:
            ProblemError: the problem's model has a layer that cannot be cut.
        """
        parts = SubModels.of(problem, self.keep)
        first = first_model(problem)
        return DropoutState(first.layout, first.weights, first.counters, parts, 0, problem.clients)

    def task(self, state: DropoutState, client: int) -> Payload:
        """Return the client's sub-model of w_t, and the (version, client) that determine it."""
        numbers = {"version": state.version, "client": client}
        part = state.weights
        if state.parts.cut:
            part = part[self._index(state.parts, state.version, client)]
        model = state.parts.small.write(part, state.counters)
        return dataclasses.replace(model, numbers=numbers)

    def evaluation_task(self, state: DropoutState, client: int = 0) -> Payload:
        """Return the whole model."""
        return model_payload(state)

    def new_accumulator(self, state: DropoutState) -> DropoutAccumulator:
        """Return an empty sum."""
        found = DropoutAccumulator.empty(state)
        if self.absent == "holders" and state.parts.cut:
            found.held = zeros(state.layout.dim)
        return found

    def accumulate(
        self, accumulator: DropoutAccumulator, state: DropoutState, result: Result, weight: float
    ) -> DropoutAccumulator:
        """Add ``weight`` times a sub-model's update to the sum, at its coordinates.

        A sub-model that was sent as a model counts as its change from w_t. The version and the
        client in the result decide the coordinates; any values denote a sub-model of this seed.
        """
        version, client = _mask_of(result.payload.numbers, state.clients)
        if not state.parts.cut:
            return super().accumulate(accumulator, state, result, weight)
        # FedAvg's checks and its weighted sum, in a vector of the sub-model's size.
        index = self._index(state.parts, version, client)
        now, end = state.weights[index], state.parts.small.parameters
        small = ModelState(state.parts.small, now, state.counters)
        part = Accumulator.empty(small)
        add_result(part, small, result, weight)
        if part.models:
            add_scaled(part.total[:end], now[:end], -weight)
        accumulator.total.index_add_(0, index, part.total)
        fresh = not result.staleness
        merge_counters(accumulator.counters, state.counters, part.counters, fresh=fresh)
        if accumulator.held is not None:
            accumulator.held.index_add_(0, index, torch.tensor(weight).expand(len(index)))
            accumulator.weight += weight
        return accumulator

    def commit(
        self, state: DropoutState, accumulator: DropoutAccumulator, divisor: float
    ) -> DropoutState:
        """w_{t+1} = w_t + eta_g * sum_k (weight_k / divisor) * (w_k - w_t).

        With ``holders``, the sum of a coordinate is replaced by its mean over the clients that
        hold it, times the sum of all weights, as if the others had sent that mean. Coordinates
        that no client holds stay.
        """
        if accumulator.held is not None and accumulator.weight:
            # Divided in this order, a mean of finite updates is finite for all weights.
            accumulator.total.div_(accumulator.held.masked_fill_(accumulator.held == 0, 1.0))
            divisor /= accumulator.weight
        new = averaged(state, accumulator, self.server_lr / divisor)
        return dataclasses.replace(
            state, weights=new.weights, counters=new.counters, version=state.version + 1
        )

    def _index(self, parts: SubModels, version: int, client: int) -> Tensor:
        """Return the coordinates in w of a client's sub-model of a version, int64 [small.dim].

        They are computed each time, because they take twice the memory of the sub-model.
        """
        rng = derive_rng(self.seed or 0, "federated dropout", version, client)
        return parts.index(parts.draw(rng))

    # ---- at the client

    def try_model(self, problem: Problem, data: Examples, device: str) -> None:
        """Try a step of a sub-model."""
        part = _sub_problem(problem, self.keep)
        dry_step(lambda: FlatModel(part.model(), device), problem, data, device)

    def train(self, task: Task, client: Client) -> TrainResult:
        """ClientUpdate(k, w) of FedAvg on the sub-model."""
        problem = _sub_problem(client.problem, self.keep)
        version, who = _mask_of(task.payload.numbers, client.problem.clients)
        found = super().train(task, dataclasses.replace(client, problem=problem))
        numbers = {**found.payload.numbers, "version": version, "client": who}
        return TrainResult(dataclasses.replace(found.payload, numbers=numbers), found.num_examples)


def _mask_of(numbers: Mapping[str, object], clients: int) -> tuple[int, int]:
    """Return the version and the client that determine a payload's sub-model.

    Any version is valid: late results are of older ones, and a what-if replay numbers versions
    differently.

    Raises:
        ResultError: the payload's numbers lack them.
    """
    return expect_count("version", numbers), expect_count("client", numbers, clients)


def _sub_problem(problem: Problem, keep: float) -> SubProblem:
    """Return the one sub-problem of a problem in this process, which owns a working copy."""
    for known in _sub_problems:
        if known.whole is problem and known.keep == keep:
            return known
    made = SubProblem(problem, keep)
    _sub_problems.appendleft(made)
    return made


_sub_problems: deque[SubProblem] = deque(maxlen=4)
