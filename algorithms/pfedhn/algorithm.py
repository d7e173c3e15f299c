"""pFedHN: Shamsian, Navon, Fetaya, Chechik,
"Personalized Federated Learning using Hypernetworks", ICML 2021.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmq.algorithms.base import Algorithm, Client, Payload, Reply, Result, Task, TrainResult
from fedmq.algorithms.errors import Fault, ResultError
from fedmq.algorithms.pfedhn.hypernetwork import HyperNet, largest_magnitude
from fedmq.algorithms.pfedhn.model_parts import ModelPartition
from fedmq.algorithms.pfedhn.state import HyperAccumulator, HyperState
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.rng import derive_rng, derive_seed
from fedmq.algorithms.toolkit.dry_step import dry_step
from fedmq.algorithms.toolkit.flat_model import FlatModel, scratch_model, zeros
from fedmq.algorithms.toolkit.layout import Layout
from fedmq.algorithms.toolkit.results import (
    Vectors,
    merge_counters,
    moved,
    read_result,
    result_payload,
)
from fedmq.algorithms.toolkit.sgd import batches, cuda_devices, metrics_on, project, spans

_LARGEST = 1e30
"""Limit of a weighted value: float32 can hold the sum of millions of them."""
_MOMENTUM = "momentum."


@dataclass(frozen=True)
class PFedHN(Algorithm[HyperState, HyperAccumulator]):
    """Algorithm 1, and with ``personal_classifier`` pFedHN-PC.

    lr, momentum, weight_decay: of the local SGD, whose momentum starts from zero at each task;
        their defaults, and those of batches and batch_size, are those of the paper's experiments.
    batches: K, local steps: successive batches of shuffled passes over the local data.
    batch_size: of the local steps.
    clip: largest norm of a local gradient.
    embedding: D_e, length of a client's embedding; None is int(1 + clients / 4).
    hidden: units of each hidden layer of the hypernetwork. layers: number of (ReLU, linear).
    server_lr: alpha, of the server's SGD on phi and the embeddings; None is 0.01, and 0.05
        with a personal classifier.
    server_momentum, server_weight_decay, server_clip: of the server's SGD; the clipped norm is
        that of the gradients of phi and all embeddings together.
    personal_classifier: the last layer stays at each client, with its optimizer's momentum.
    new_rounds: number of local trainings and embedding steps of a new client, in `personalise`.
    new_lr: learning rate of those steps. The paper states none; server_lr would be too small.
    seed: of the first phi and embeddings; None is the run's.

    An embedding changes only in versions with a result of its client, as in the paper's
    Algorithm 1; its momentum and weight decay pause in between.
    """

    name: ClassVar[str] = "pfedhn"
    counts_examples: ClassVar[bool] = True
    schedules: ClassVar[frozenset[str]] = frozenset({"rounds", "buffered", "stream"})
    task_per_client: ClassVar[bool] = True
    fixed_reply: ClassVar[Reply | None] = "update"
    evaluated_by: ClassVar[Literal["model", "clients"]] = "clients"
    server_hparams: ClassVar[frozenset[str]] = frozenset(
        {"server_lr", "server_momentum", "server_weight_decay", "server_clip"}
    )

    lr: Annotated[float, Field(gt=0)] = 5e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-5
    batches: Annotated[int, Field(ge=1)] = 50
    batch_size: Annotated[int, Field(ge=1)] = 64
    clip: Annotated[float, Field(gt=0)] = 50.0
    embedding: Annotated[int, Field(ge=1)] | None = None
    hidden: Annotated[int, Field(ge=1)] = 100
    layers: Annotated[int, Field(ge=0)] = 3
    server_lr: Annotated[float, Field(gt=0)] | None = None
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    server_weight_decay: Annotated[float, Field(ge=0)] = 1e-3
    server_clip: Annotated[float, Field(gt=0)] = 50.0
    personal_classifier: bool = False
    new_rounds: Annotated[int, Field(ge=0)] = 20
    new_lr: Annotated[float, Field(gt=0)] = 0.1
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    # ---- at the aggregator

    def start(self, problem: Problem) -> HyperState:
        """Return phi_0 and standard normal embeddings; the problem's first weights are not used.

        Raises:
            ProblemError: the model cannot be partitioned.
        """
        model = FlatModel(problem.model())
        parts, net = self._shape(problem, model.layout)
        phi = net.initial(derive_seed(self.seed or 0, "hypernetwork"))
        rng = derive_rng(self.seed or 0, "embeddings")
        drawn = rng.standard_normal((problem.clients, net.embedding), dtype="float32")
        embeddings = torch.from_numpy(drawn)
        return HyperState(
            net,
            parts,
            phi,
            embeddings,
            zeros(len(phi)),
            torch.zeros_like(embeddings),
            parts.part(model.weights)[parts.theta :].clone(),
            model.read_counters(),
            torch.zeros(problem.clients, dtype=torch.int64),
        )

    def task(self, state: HyperState, client: int) -> Payload:
        """Return theta_i = h(v_i; phi); phi itself is never sent."""
        return state.model_of(state.embedding(client))

    def result_bytes(self, state: HyperState) -> int:
        """Return the size of a client's model without its classifier, in bytes."""
        return 4 * state.partition.sent.dim + state.counters.nbytes

    def new_accumulator(self, state: HyperState) -> HyperAccumulator:
        """Return an empty sum."""
        return HyperAccumulator.empty(state)

    def accumulate(
        self, accumulator: HyperAccumulator, state: HyperState, result: Result, weight: float
    ) -> HyperAccumulator:
        """Add ``weight`` times (d theta_i / d (phi, v_i))^T dtheta_i, at the current phi and v_i.

        A late dtheta_i belongs to an older theta_i; the product uses the current phi and v_i.
        """
        sent, net, who = state.partition.sent, state.net, result.client
        if not 0 <= who < len(state.used):
            raise ResultError(f"expected a client from 0 to {len(state.used) - 1}, got {who}")
        arrived = read_result(sent, result.payload, state.counters)
        change = zeros(sent.dim)
        for start, block in arrived:
            change[start : start + block.numel()] = block
        if not change.isfinite().all():
            raise ResultError("the result holds NaN or infinite values", Fault.NOT_FINITE)
        delta, rest = change[: sent.parameters], change[sent.parameters :]
        product = net.vjp(state.phi, state.embeddings[who], delta)
        if weight * largest_magnitude(product, change) > _LARGEST:
            top = change.abs().max().item()
            raise ResultError(f"the result holds values as large as {top:g}", Fault.TOO_LARGE)
        net.add(accumulator.phi, product, delta, weight)
        accumulator.embeddings[who].add_(product.embedding, alpha=weight)
        accumulator.shared.add_(rest, alpha=weight)
        if arrived.counters is not None:
            fresh = not result.staleness
            merge_counters(accumulator.counters, state.counters, arrived.counters, fresh=fresh)
        accumulator.present[who] = True
        return accumulator

    def commit(
        self, state: HyperState, accumulator: HyperAccumulator, divisor: float
    ) -> HyperState:
        """Take one step of the server's SGD on phi and the embeddings of clients with a result.

        dtheta = theta~ - theta is a descent direction, so the gradient is the product with
        -dtheta, summed with the weights and divided by the divisor.
        """
        rows = accumulator.present
        scale = (
            -_within(self.server_clip * divisor, accumulator.phi, accumulator.embeddings) / divisor
        )
        lr = self._server_lr
        embeddings, velocity = state.embeddings.clone(), state.embedding_momentum.clone()
        embeddings[rows], velocity[rows] = self._descend(
            embeddings[rows], accumulator.embeddings[rows].mul_(scale), velocity[rows], lr
        )
        phi, phi_momentum = self._descend(
            state.phi, accumulator.phi.mul_(scale), state.phi_momentum, lr
        )
        return dataclasses.replace(
            state,
            phi=phi,
            embeddings=embeddings,
            phi_momentum=phi_momentum,
            embedding_momentum=velocity,
            shared=moved(state.shared, accumulator.shared.mul_(1 / divisor)),
            counters=accumulator.counters,
            used=state.used + rows,
        )

    def tensors(self, state: HyperState) -> Mapping[str, Tensor]:
        """Return the embeddings, phi, and the tensors that all clients' models share, by name."""
        phi = {f"phi.{name}": each for name, each in state.net.layout.views(state.phi).items()}
        parts = state.partition
        shared = {slot.name: slot.tensor(state.shared) for slot in parts.shared.weights}
        counters = {slot.name: slot.tensor(state.counters) for slot in parts.sent.counters}
        return {"embeddings": state.embeddings} | phi | shared | counters

    def _shape(self, problem: Problem, layout: Layout) -> tuple[ModelPartition, HyperNet]:
        parts = ModelPartition.of(layout, personal_classifier=self.personal_classifier)
        length = int(1 + problem.clients / 4) if self.embedding is None else self.embedding
        return parts, HyperNet.of(length, self.hidden, self.layers, parts.theta)

    @property
    def _server_lr(self) -> float:
        if self.server_lr is None:
            return 0.05 if self.personal_classifier else 0.01
        return self.server_lr

    def _descend(
        self, weights: Tensor, gradient: Tensor, velocity: Tensor, lr: float
    ) -> tuple[Tensor, Tensor]:
        """Return weights and velocity after a step of the server's SGD.

        The new velocity replaces the gradient in place, because phi is large.
        """
        new = gradient.add_(weights, alpha=self.server_weight_decay)
        new.add_(velocity, alpha=self.server_momentum)
        return weights.add(new, alpha=-lr), new

    # ---- at the client

    def try_model(self, problem: Problem, data: Examples, device: str) -> None:
        """Try a step of the problem's model."""
        dry_step(lambda: FlatModel(problem.model(), device), problem, data, device)

    def train(self, task: Task, client: Client) -> TrainResult:
        """Take K steps of SGD from theta_i; send dtheta_i = theta~_i - theta_i."""
        model, parts, velocity = self._load(task, client)
        before = model.weights.clone()
        with torch.random.fork_rng(devices=cuda_devices(client.device)):
            torch.manual_seed(client.seed)
            self._sgd(model, parts, velocity, client)
        payload = result_payload(
            parts.sent,
            Vectors(parts.part(before), model.loaded_counters),
            Vectors(parts.part(model.weights), model.read_counters()),
            {},
        )
        if not self.personal_classifier:
            return TrainResult(payload, len(client.data))
        own, moving = parts.kept(model.weights), parts.kept(velocity)
        local = Payload(exact=own | {_MOMENTUM + name: moving[name] for name in moving})
        return TrainResult(payload, len(client.data), local)

    def evaluate_client(self, task: Task, client: Client) -> Mapping[str, float]:
        """Return the metrics of theta_i on the client's test data."""
        model, _, _ = self._load(task, client)
        test = client.problem.client_test(client.index).to(client.device)
        return metrics_on(model.module, client.problem, test, client.device)

    def _load(self, task: Task, client: Client) -> tuple[FlatModel, ModelPartition, Tensor]:
        """Return the working copy of the client's model, and its velocity [parameters]."""
        model = scratch_model(client.problem, client.device)
        parts = ModelPartition.of(model.layout, personal_classifier=self.personal_classifier)
        place = slice(parts.theta, parts.whole.parameters)
        velocity = torch.zeros_like(model.gradient)
        own = zeros(0)
        if self.personal_classifier and client.local is None:
            own = FlatModel(client.problem.model()).weights[place]
        elif self.personal_classifier and client.local is not None:
            names, kept = parts.own.views(velocity[place]), client.local.exact
            own = parts.own.flatten({name: kept[name] for name in names})
            moving = parts.own.flatten({name: kept[_MOMENTUM + name] for name in names})
            velocity[place] = moving.to(client.device)
        sent, counters = parts.sent.read(task.payload)
        model.load(parts.join(sent, own).to(client.device), counters)
        return model, parts, velocity

    def _sgd(
        self, model: FlatModel, parts: ModelPartition, velocity: Tensor, client: Client
    ) -> None:
        """Take the local steps on a loaded model."""
        data = client.data.to(client.device)
        loss, trained, gradient = client.problem.loss, model.trained, model.gradient
        passes = math.ceil(self.batches / len(spans(len(data), self.batch_size)))
        order = derive_rng(client.seed, "batches")
        model.module.train()
        for x, y in itertools.islice(batches(data, self.batch_size, passes, order), self.batches):
            gradient.zero_()
            loss(model.module(x), y).backward()  # type: ignore[no-untyped-call] # torch's
            model.after_backward()
            with torch.no_grad():
                gradient.mul_(_within(self.clip, gradient))
                gradient.add_(trained, alpha=self.weight_decay)
                project(client, parts.sent, gradient[: parts.theta])
                velocity.mul_(self.momentum).add_(gradient)
                trained.add_(velocity, alpha=-self.lr)
        model.end_task()

    # ---- for a client that never took part

    def personalise(self, state: HyperState, version: int, client: Client) -> Mapping[str, float]:
        """Learn a new client's embedding with phi fixed, and return the metrics of its theta.

        The embedding starts from the mean of the trained ones; after each of ``new_rounds`` local
        trainings it takes a step of the server's SGD.
        """
        net, sent = state.net, state.partition.sent
        embedding = state.embedding(len(state.embeddings))
        velocity = torch.zeros_like(embedding)
        for turn in range(self.new_rounds):
            seed = derive_seed(client.seed, "personalise", turn)
            task = Task(version, state.model_of(embedding))
            found = self.train(task, dataclasses.replace(client, seed=seed))
            client = dataclasses.replace(client, local=found.local_state)
            delta = sent.flatten_trained(found.payload.weights)
            gradient = -net.vjp(state.phi, embedding, delta).embedding
            gradient.mul_(_within(self.server_clip, gradient))
            embedding, velocity = self._descend(embedding, gradient, velocity, self.new_lr)
        return self.evaluate_client(Task(version, state.model_of(embedding)), client)


def _within(most: float, *gradients: Tensor) -> float:
    """Return the factor that reduces the joint norm of gradients to at most ``most``.

    The squares of large accepted values overflow float32; then the norm is computed in float64.
    """
    norm = math.hypot(*(torch.linalg.vector_norm(each).item() for each in gradients))
    if not math.isfinite(norm):
        norms = (torch.linalg.vector_norm(each, dtype=torch.float64) for each in gradients)
        norm = math.hypot(*(each.item() for each in norms))
    return most / norm if norm > most else 1.0
