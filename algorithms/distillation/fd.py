"""Federated Distillation (FD): Jeong, Oh, Kim, Park, Bennis, Kim, "Communication-Efficient
On-Device Machine Learning: Federated Distillation and Augmentation under Non-IID Private Data",
2018.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fedmq.algorithms.base import Algorithm, Client, Payload, Reply, Result, Task, examples_of
from fedmq.algorithms.distillation.reports import (
    MOST_COUNTED,
    NewOutputs,
    Reports,
    check_probabilities,
    check_shape,
    group_of,
)
from fedmq.algorithms.errors import AlgorithmError, ResultError
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.problems.models import MODELS
from fedmq.algorithms.rng import derive_rng, derive_seed
from fedmq.algorithms.toolkit.dry_step import dry_step
from fedmq.algorithms.toolkit.flat_model import FlatModel
from fedmq.algorithms.toolkit.sgd import batches, cuda_devices, evaluate_module
from fedmq.codecs.text import shorten, unknown


@dataclass(frozen=True)
class Distillation(Algorithm):
    """Algorithm 1 (federated distillation): labels' mean outputs travel, models never do.

    lr: eta, of the devices' SGD; the paper does not state it.
    gamma: weight of the distillation term; 0 is training alone. The paper does not state it.
    iterations: n, local steps a round; 250 in the paper. None: as many as ``epochs`` make.
    epochs: passes over the local data a round, where ``iterations`` is None.
    batch_size: 64 as in the paper; None is the whole local set.
    models: names of `fedmq.algorithms.problems.models`; device k has ``models[k % len]``, so
        that devices may differ. Empty: the problem's own model. ``fd-cnn`` is the paper's.
    seed: what the first parameters of ``models`` depend on; each device draws its own. None
        is the run's.
    """

    name: ClassVar[str] = "fd"
    schedules: ClassVar[frozenset[str]] = frozenset({"rounds", "buffered", "stream"})
    reproducible: ClassVar[bool] = True
    task_per_client: ClassVar[bool] = True
    fixed_reply: ClassVar[Reply | None] = "update"

    lr: Annotated[float, Field(gt=0)] = 0.05
    gamma: Annotated[float, Field(ge=0)] = 0.5
    iterations: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[int, Field(ge=1)] = 2
    batch_size: Annotated[int, Field(ge=1)] | None = 64
    models: tuple[str, ...] = ()
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    def __post_init__(self) -> None:
        for each in self.models:
            if each not in MODELS:
                raise AlgorithmError(f"models: {unknown('model', each, MODELS)}")

    # ---- at the aggregator

    def start(self, problem: Problem) -> Any:
        """Nobody has said anything.

        Raises:
            ProblemError: the problem does not say how many classes it has.
        """
        return Reports.none(problem.clients, problem.classes, problem.classes)

    def task(self, state: Any, client: int) -> Payload:
        """Return Fhat^(i), the other devices' mean outputs by label.

        ``counts`` says how many other devices have a label: 0 where none has.
        """
        means, having = state.others(client)
        return Payload(logits={"logits": means, "counts": having})

    @property
    def evaluated_by(self) -> Literal["model", "clients"]:
        """Each device evaluates its own model, on the whole test set as in the paper."""
        return "clients"

    def evaluation_task(self, state: Any, client: int = 0) -> Payload:
        """Return nothing: a device has all that it needs."""
        return Payload()

    def result_bytes(self, state: Any) -> int:
        """Return the size of one device's report."""
        return int(state.means[0].nbytes + state.counts[0].nbytes)

    def new_accumulator(self, state: Any) -> Any:
        """Return that there is nothing new."""
        news: NewOutputs = {}
        return news

    def accumulate(self, gathered: Any, state: Any, result: Result, weight: float) -> Any:
        """Take down a device's report, in place of its last.

        ``weight`` has no part in it: the paper's mean over devices is unweighted.
        """
        examples_of(result.payload.numbers)
        gathered[result.client] = self.report_of(state, result.payload)
        return gathered

    def report_of(self, state: Reports, payload: Payload) -> tuple[Tensor, Tensor]:
        """Return (means, counts) of a report by label.

        Raises:
            ResultError: it is not one of mean probabilities.
        """
        means, counts = group_of(payload, "counts")
        check_shape(counts, torch.int64, tuple(state.counts.shape[1:]), "counts")
        check_shape(means, torch.float32, tuple(state.means.shape[1:]), "logits")
        low, high = (int(each) for each in torch.aminmax(counts))
        if low < 0 or not 0 < high <= MOST_COUNTED:
            raise ResultError(f"expected counts from 0 to {MOST_COUNTED}, got {low} to {high}")
        if bool((means[counts == 0] != 0).any()):
            raise ResultError("expected no means of labels that count 0")
        check_probabilities(means[counts > 0])
        return means, counts

    def commit(self, state: Any, gathered: Any, divisor: float) -> Any:
        """Replace the reports of those who sent one; the others' stay."""
        return state.updated(gathered)

    def save(self, state: Any) -> Payload:
        """Return all reports."""
        return Payload(exact=self.tensors(state))

    def load(self, problem: Problem, saved: Payload) -> Any:
        """Return the state of saved reports."""
        first = self.start(problem)
        found = saved.exact
        if set(found) != {"means", "counts"}:
            raise ResultError(f"expected means and counts, got {shorten(sorted(found))}")
        check_shape(found["means"], torch.float32, tuple(first.means.shape), "means")
        check_shape(found["counts"], torch.int64, tuple(first.counts.shape), "counts")
        return Reports.of(found["means"], found["counts"])

    def tensors(self, state: Any) -> Mapping[str, Tensor]:
        """Return all reports: float32 [M, R, L] and int64 [M, R]."""
        return {"means": state.means, "counts": state.counts}

    # ---- at the device

    def try_model(self, problem: Problem, data: Examples, device: str) -> None:
        """Try the problem's model, if that is what devices have."""
        if not self.models:
            dry_step(lambda: FlatModel(problem.model(), device), problem, data, device)

    def train(self, task: Task, client: Client) -> tuple[Payload, Payload | None]:
        """Algorithm 1, lines 3 to 8: n steps on CE(F, y) + gamma * CE(F, Fhat_y).

        A sample whose label no other device has is trained on CE(F, y) alone. The outputs
        that are averaged by label are those of the steps, before each of them.
        """
        soft, _ = group_of(task.payload, "counts")
        soft = soft.to(client.device)
        model = self.own_model(client)
        classes = len(soft)
        sums = torch.zeros((classes, classes), dtype=torch.float64, device=client.device)
        counts = torch.zeros(classes, dtype=torch.int64, device=client.device)
        for x, y in self.steps(model, client):
            outputs = model.module(x)
            loss = client.problem.loss(outputs, y)
            if self.gamma:
                loss = loss + self.gamma * cross_entropy(outputs, soft[y])
            loss.backward()  # type: ignore[no-untyped-call] # torch's
            of = F.one_hot(y, classes)
            sums += of.double().T @ outputs.detach().softmax(dim=1).double()
            counts += of.sum(dim=0)
        means = (sums / counts.clamp(min=1).unsqueeze(1)).float()
        report = {"logits": means.cpu(), "counts": counts.cpu()}
        return Payload(numbers={"n": len(client.data)}, logits=report), kept(model)

    def steps(self, model: FlatModel, client: Client) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the round's batches, and step along the gradient that each leaves behind."""
        data = client.data.to(client.device)
        rng = derive_rng(client.seed, "batches")
        model.module.train()
        with torch.random.fork_rng(devices=cuda_devices(client.device)):
            torch.manual_seed(client.seed)
            for x, y in self._batches(data, rng):
                model.gradient.zero_()
                yield x, y
                model.after_backward()
                with torch.no_grad():
                    model.trained.add_(model.gradient, alpha=-self.lr)
        model.end_task()

    def _batches(self, data: Examples, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        if self.iterations is None:
            return batches(data, self.batch_size, self.epochs, rng)
        endless = batches(data, self.batch_size, self.iterations, rng)
        return itertools.islice(endless, self.iterations)

    def own_model(self, client: Client) -> FlatModel:
        """Return the device's model as it left it, or as it begins."""
        make = functools.partial(self._first, client.problem, client.index)
        model = FlatModel(make(), client.device, make)
        if client.local is not None:
            model.load(*model.layout.read(client.local))
        return model

    def _first(self, problem: Problem, index: int) -> nn.Module:
        if not self.models:
            return problem.model()
        make = MODELS[self.models[index % len(self.models)]]
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            seed = derive_seed(self.seed or 0, "device model", index)
            torch.default_generator.manual_seed(seed)
            channels, height, width = problem.shape
            return make((channels, height, width), problem.classes)

    def evaluate_client(self, task: Task, client: Client) -> Mapping[str, float]:
        """Return the metrics of the device's own model on the whole test set."""
        return evaluate_module(self.own_model(client).module, client.problem, client.device)

    def personalise(self, state: Any, version: int, client: Client) -> Mapping[str, float]:
        """Train a new device for one round with what the others have said, and evaluate it."""
        task = Task(version, self.task(state, client.index))
        _, local = self.train(task, client)
        return self.evaluate_client(task, dataclasses.replace(client, local=local))


# ---- shared with co-distillation and FAug


def cross_entropy(outputs: Tensor, soft: Tensor) -> Tensor:
    """Return the mean over a batch of CE(F, Fhat) = -sum_l Fhat_l log F_l.

    outputs: logits [n, L]; soft: probabilities [n, L], of which a row of zeros adds nothing.
    """
    return -(soft * F.log_softmax(outputs, dim=1)).sum(dim=1).mean()


def kept(model: FlatModel) -> Payload:
    """Return a device's model as what it keeps."""
    weights = model.layout.views(model.weights.detach().clone().cpu())
    return Payload(weights, model.layout.counter_views(model.read_counters()))
