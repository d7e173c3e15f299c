"""Per-FedAvg: Fallah, Mokhtari, Ozdaglar, "Personalized Federated Learning with Theoretical
Guarantees: A Model-Agnostic Meta-Learning Approach", NeurIPS 2020.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedmq.algorithms.base import Client, Task, TrainResult
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.toolkit.adaptation import before_and_after
from fedmq.algorithms.toolkit.flat_model import FlatModel
from fedmq.algorithms.toolkit.sgd import cuda_devices, learned, load_model, project


@dataclass(frozen=True)
class PerFedAvg(FedAvg):
    """Algorithm 1: FedAvg on F(w) = (1/K) sum_k f_k(w - alpha grad f_k(w)).

    It learns a model that is good after one gradient step on a client's own data.

    variant: how a local step treats the Hessian in the gradient of F. ``fo`` (first order)
        omits it. ``hf`` (Hessian-free) computes its product with a vector from two gradients.
        ``fedavg`` takes no meta-step, v <- v - beta g(v; D); with the same evaluation this is
        the paper's baseline "FedAvg + update".
    inner_lr: alpha, of the adaptation step, in training and at evaluation.
    lr: beta, of the local steps.
    steps: tau, local steps of a task.
    batch_size: size of each of D, D' and D''; None is the whole local set, whose gradient is
        exact.
    perturbation: distance ||delta u|| of the two points of ``hf`` from v. If it is too small,
        float32's rounding dominates, if too large, the curvature.
    adapt_steps: steps at evaluation; 1 in the paper.
    adapt_examples: number of the client's training examples, drawn at random, for each of these
        steps; None is all.
    server_lr: as in FedAvg; 1 in the paper.

    The defaults of lr, batch_size, inner_lr and steps are those of the paper's experiments. A task
    consists of ``steps`` plain steps, so epochs is 1 and momentum 0.

    The server takes the plain mean, as in the paper: the number of examples of a result is
    ``steps * batch_size``, which is equal for all clients with ``batch_size`` examples.
    """

    name: ClassVar[str] = "perfedavg"
    evaluated_by: ClassVar[Literal["model", "clients"]] = "clients"
    counts_examples: ClassVar[bool] = False

    lr: Annotated[float, Field(gt=0)] = 0.001
    epochs: Annotated[int, Field(ge=1, le=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] | None = 40
    momentum: Annotated[float, Field(ge=0, le=0)] = 0.0
    weight_decay: Annotated[float, Field(ge=0, le=0)] = 0.0
    variant: Literal["fo", "hf", "fedavg"] = "fo"
    inner_lr: Annotated[float, Field(gt=0)] = 0.01
    steps: Annotated[int, Field(ge=1)] = 10
    perturbation: Annotated[float, Field(gt=0, le=1)] = 0.001
    adapt_steps: Annotated[int, Field(ge=1)] = 1
    adapt_examples: Annotated[int, Field(ge=1)] | None = None

    # ---- at the client

    def train(self, task: Task, client: Client) -> TrainResult:
        """Take tau steps from w_t."""
        model, start = load_model(task, client.problem, client.device)
        layout = model.layout
        data = client.data.to(client.device)
        rng = derive_rng(client.seed, "batches")
        model.module.train()
        with torch.random.fork_rng(devices=cuda_devices(client.device)):
            torch.manual_seed(client.seed)
            for _ in range(self.steps):
                direction = self._direction(model, data, rng, client)
                project(client, layout, direction)
                model.trained.add_(direction, alpha=-self.lr)
        model.end_task()
        payload = learned(model, start, {"reply": task.reply}, task.reply)
        return TrainResult(payload, self.steps * _size(data, self.batch_size))

    def _direction(
        self, model: FlatModel, data: Examples, rng: np.random.Generator, client: Client
    ) -> Tensor:
        """(I - alpha Hess(v; D'')) g(v - alpha g(v; D); D'), float32 [parameters]; v stays."""
        first = gradient(model, _batch(data, self.batch_size, rng), client)
        if self.variant == "fedavg":
            return first
        v = model.trained.clone()
        model.trained.add_(first, alpha=-self.inner_lr)
        u = gradient(model, _batch(data, self.batch_size, rng), client)
        if self.variant == "hf":
            third = _batch(data, self.batch_size, rng)
            product = hessian_product(model, v, u, third, client, self.perturbation)
            u.sub_(product, alpha=self.inner_lr)
        model.trained.copy_(v)
        return u

    def evaluate_client(self, task: Task, client: Client) -> Mapping[str, float]:
        """Take one alpha-step on the client's training examples, then test."""
        rng = derive_rng(client.seed, "adaptation")

        def adapt(model: FlatModel, data: Examples) -> None:
            for _ in range(self.adapt_steps):
                batch = _batch(data, self.adapt_examples, rng)
                model.trained.sub_(gradient(model, batch, client), alpha=self.inner_lr)

        return before_and_after(task, client, adapt)


def gradient(model: FlatModel, batch: Examples, client: Client) -> Tensor:
    """g(v; D), the gradient of a batch's mean loss at the model's v; float32 [parameters]."""
    model.gradient.zero_()
    client.problem.loss(model.module(batch.x), batch.y).backward()  # type: ignore[no-untyped-call] # torch's
    model.after_backward()
    return model.gradient.clone()


def hessian_product(
    model: FlatModel, v: Tensor, u: Tensor, batch: Examples, client: Client, perturbation: float
) -> Tensor:
    """Hess(v; D'') u ~ [g(v + delta u; D'') - g(v - delta u; D'')] / (2 delta).

    delta = perturbation / ||u||. The model is left at v - delta u. Both gradients draw the same
    random numbers (such as dropout's); otherwise their difference would be noise / delta.
    """
    length = torch.linalg.vector_norm(u)
    if not length:
        return torch.zeros_like(u)
    delta = perturbation / length
    with torch.random.fork_rng(devices=cuda_devices(client.device)):
        torch.add(v, u * delta, out=model.trained)
        above = gradient(model, batch, client)
    torch.sub(v, u * delta, out=model.trained)
    below = gradient(model, batch, client)
    return above.sub_(below).div_(2 * delta)


def _size(data: Examples, batch_size: int | None) -> int:
    return len(data) if batch_size is None else min(batch_size, len(data))


def _batch(data: Examples, batch_size: int | None, rng: np.random.Generator) -> Examples:
    """Return examples drawn without replacement, independently of earlier batches."""
    size = _size(data, batch_size)
    if size == len(data):
        return data
    chosen = torch.from_numpy(rng.choice(len(data), size, replace=False)).to(data.y.device)
    return Examples(data.x[chosen], data.y[chosen])
