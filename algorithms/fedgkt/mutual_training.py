"""Train a network on labels and on another network's logits of the same samples.

Both sides of FedGKT do this (He, Annavaram, Avestimehr, NeurIPS 2020): the edge learns from
the server's logits, the server from the edges'.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedmq.algorithms.toolkit.flat_model import FlatModel
from fedmq.algorithms.toolkit.states import SavedAs

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8
_MOST_STEPS = 10**15


@dataclass(frozen=True)
class Batch:
    """A batch of samples. x: float32 [b, ...]; y: int64 [b].

    teacher: float32 [b, classes], the other network's logits, with rows of NaN for samples
    without any; None if there are none at all.
    """

    x: Tensor
    y: Tensor
    teacher: Tensor | None = None


@dataclass(frozen=True)
class NetworkState:
    """A network and its optimizer's moments, as flat vectors; never changed in place.

    weights: float32 [dim], counters: int64, in the order of `toolkit.layout.Layout`.
    moments: float32 [rows, parameters]: Adam's m, v and largest v, or SGD's velocity.
    steps: int64 [1], number of steps so far.
    """

    weights: Tensor
    counters: Tensor
    moments: Tensor
    steps: Tensor = field(metadata=SavedAs(least=0, most=_MOST_STEPS).field)


@dataclass(frozen=True)
class Optimizer:
    """The optimizer of a network.

    kind: ``adam`` (Kingma, Ba, ICLR 2015, with amsgrad of Reddi et al., ICLR 2018) or ``sgd``.
    lr: learning rate. momentum: of SGD. weight_decay: added to the gradient in both.
    """

    kind: Literal["adam", "sgd"]
    lr: Annotated[float, Field(gt=0)]
    momentum: float
    weight_decay: float

    @property
    def rows(self) -> int:
        """Return the number of moment vectors."""
        return 3 if self.kind == "adam" else int(self.momentum > 0)

    def first(self, model: FlatModel) -> NetworkState:
        """Return the state of a model before the first step."""
        moments = torch.zeros(self.rows, model.layout.parameters)
        weights, steps = model.weights.cpu().clone(), torch.zeros(1, dtype=torch.int64)
        return NetworkState(weights, model.read_counters(), moments, steps)

    def step(self, weights: Tensor, gradient: Tensor, moments: Tensor, step: int) -> None:
        """Change weights, moments and the gradient in place; ``step`` counts from 1."""
        if self.weight_decay:
            gradient.add_(weights, alpha=self.weight_decay)
        if self.kind == "adam":
            mean, square, largest = moments
            mean.lerp_(gradient, 1 - _BETA1)
            square.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
            torch.maximum(largest, square, out=largest)
            scale = (largest / (1 - _BETA2**step)).sqrt_().add_(_EPSILON)
            weights.addcdiv_(mean, scale, value=-self.lr / (1 - _BETA1**step))
            return
        if self.momentum:
            gradient = moments[0].mul_(self.momentum).add_(gradient)
        weights.add_(gradient, alpha=-self.lr)


@dataclass(frozen=True)
class Objective:
    """CE(z, y) + alpha * T^2 * KL(softmax(teacher / T) || softmax(z / T)), mean over a batch."""

    alpha: float
    temperature: float

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the loss. Samples without a teacher contribute 0 to KL."""
        loss = F.cross_entropy(logits, batch.y)
        if batch.teacher is None or not self.alpha:
            return loss
        known = ~batch.teacher.isnan().any(dim=1)
        target = (batch.teacher[known] / self.temperature).softmax(dim=1)
        log_probs = (logits[known] / self.temperature).log_softmax(dim=1)
        kl = F.kl_div(log_probs, target, reduction="sum") / len(logits)
        return loss + self.alpha * self.temperature**2 * kl


def fit(
    model: FlatModel,
    trained: NetworkState,
    optimizer: Optimizer,
    objective: Objective,
    batches: Iterable[Batch],
) -> NetworkState:
    """Train a network and return its new state; the module keeps it, in eval mode.

    torch's global generators are not used, because the networks have no dropout.
    """
    model.load(trained.weights, trained.counters)
    device = model.weights.device
    moments = trained.moments.to(device, copy=True)
    steps = int(trained.steps)
    model.module.train()
    for batch in batches:
        model.gradient.zero_()
        teacher = None if batch.teacher is None else batch.teacher.to(device)
        there = Batch(batch.x.to(device), batch.y.to(device), teacher)
        objective.loss(model.module(there.x), there).backward()  # type: ignore[no-untyped-call] # torch's
        model.after_backward()
        steps += 1
        with torch.no_grad():
            optimizer.step(model.trained, model.gradient, moments, steps)
    model.end_task()
    model.module.eval()
    weights = model.weights.detach().to("cpu", copy=True)
    return NetworkState(weights, model.read_counters(), moments.cpu(), torch.tensor([steps]))
