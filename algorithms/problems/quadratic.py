"""A stand-in for training, in scheduling studies: SGD on a noisy quadratic, in closed form.

Modelled on the noisy quadratic model of Zhang et al., "Which Algorithmic Choices Matter at Which
Batch Sizes?", NeurIPS 2019, section 3: SGD along each direction j of a quadratic with curvature
h_j = 1/j, and gradient noise whose covariance is that of the curvature. Here the model is a vector
w of `DIM` numbers, w_0 = 0, and client k minimises

    F_k(w) = 1/2 sum_j h_j (w_j - c_kj)^2,    c_k = c + heterogeneity * s * z_k,

with z_k ~ N(0, I) of its own. The common optimum c has components +s or -s, and s is chosen so that
the loss of w_0 is log(classes), as that of an untrained network:

    loss(w) = 1/2 sum_j h_j (w_j - c_j)^2,    accuracy(w) = exp(-loss(w)).

A step with a batch of B examples uses h_j (w_j - c_kj) + noise * s * sqrt(h_j / B) * N(0, 1). All
steps of a task are one linear map of w and one normal vector, so a task costs microseconds.

What follows from the equations holds here: local steps overshoot towards the client's own optimum,
stale updates point from where the client started, averages of more clients are less noisy. What
does not hold: losses of networks are not convex, their noise is not normal, heterogeneity does not
come from the partition, and a codec acts on `DIM` numbers, not on the layers of a model. Compare
schedules with it, and check the conclusion with real training. The accuracy is no forecast.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.rng import derive_rng

DIM = 32
"""Number of components of w."""
_CLASSES = 10
_CURVATURE = 1.0 / np.arange(1, DIM + 1)
"""h, float64 [DIM]."""

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class LocalSteps:
    """The SGD of one task, w <- w - lr * v with v <- momentum * v + gradient.

    steps: number of steps.
    batch_size: examples a step.
    weight_decay: adds weight_decay * w to the gradient.
    proximal: adds proximal * (w - w_t) to the gradient; w_t is where the task starts.
    """

    steps: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    proximal: float


@dataclass(frozen=True)
class QuadraticProblem(Problem):
    """The stand-in of a problem; see the module for its equations.

    real: the problem that it stands in for: it has the clients and their numbers of examples.
    heterogeneity: how far the clients' optima are from the common one; 1 is as far as w_0.
    noise: standard deviation of the gradient of one example.
    """

    real: Problem
    heterogeneity: float
    noise: float

    @property
    def clients(self) -> int:  # type: ignore[override] # a plain value in the base class
        """Return the number of clients."""
        return self.real.clients

    @property
    def seed(self) -> int:  # type: ignore[override] # a plain value in the base class
        """Return the seed of the run."""
        return self.real.seed

    @property
    def held_out(self) -> int:
        """Return the number of clients that never train."""
        return self.real.held_out

    @property
    def most_examples(self) -> int:
        """Return the most training examples that one client can have."""
        return self.real.most_examples

    def model(self) -> nn.Module:
        """Return w_0."""
        return _Position()

    def client(self, index: int) -> Examples:
        """Return as many examples as the client really has; all are empty."""
        return _empty(self.client_size(index))

    def client_size(self, index: int) -> int:
        """Return the client's number of examples."""
        return self.real.client_size(index)

    def label_position(self, index: int) -> float:
        """Return the share of normal draws below z_k0: clients of a kind have similar optima."""
        first = float(self._difference(index)[0])
        return 0.5 * (1 + math.erf(first / math.sqrt(2)))

    def test(self) -> Examples:
        """Return one empty example: the loss is known exactly."""
        return _empty(1)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the loss of w; outputs: w, [n, DIM]."""
        away = outputs - torch.from_numpy(self._optimum).to(outputs)
        curvature = torch.from_numpy(_CURVATURE).to(outputs)
        return 0.5 * (curvature * away.square()).sum(dim=1).mean()

    def metrics(self, outputs: Tensor, y: Tensor) -> Mapping[str, float]:
        """Return ``loss`` and ``accuracy``."""
        loss = self.loss(outputs.double(), y).item()
        return {"loss": loss, "accuracy": math.exp(-loss)}

    def metric_range(self, name: str) -> tuple[float, float]:
        """Return 0 to 1 for ``accuracy``."""
        return (0.0, 1.0) if name == "accuracy" else super().metric_range(name)

    def after_sgd(self, start: Tensor, client: int, seed: int, how: LocalSteps) -> Tensor:
        """Return where a client's local SGD ends, float32 [DIM].

        Args:
            start: w_t, float32 [DIM].
            client: its number.
            seed: of the noise of this task.
            how: steps and their settings.
        """
        first = start.double().numpy()
        own = self._optimum + self.heterogeneity * self._scale * self._difference(client)
        left, spread = _response(how)
        stiffness = _CURVATURE + how.weight_decay + how.proximal
        fixed = (_CURVATURE * own + how.proximal * first) / stiffness
        step_noise = self.noise * self._scale * np.sqrt(_CURVATURE / how.batch_size)
        drawn = derive_rng(seed, "gradient noise").standard_normal(DIM)
        end = fixed + left * (first - fixed) + step_noise * spread * drawn
        return torch.from_numpy(end.astype(np.float32))

    def _difference(self, client: int) -> Vector:
        """Return z_k."""
        return derive_rng(self.seed, "optimum", client).standard_normal(DIM)

    @cached_property
    def _scale(self) -> float:
        """Return s."""
        try:
            classes = self.real.classes
        except ProblemError:
            classes = _CLASSES
        return math.sqrt(2 * math.log(max(2, classes)) / _CURVATURE.sum())

    @cached_property
    def _optimum(self) -> Vector:
        """Return c."""
        signs = derive_rng(self.seed, "common optimum").choice([-1.0, 1.0], DIM)
        return np.asarray(signs * self._scale, np.float64)


class _Position(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), DIM)


def _empty(count: int) -> Examples:
    return Examples(torch.empty(count, 0), torch.zeros(1, dtype=torch.int64).expand(count))


@functools.lru_cache(maxsize=1024)
def _response(how: LocalSteps) -> tuple[Vector, Vector]:
    """Return what is left of a distance after all steps, and the effect of unit noise in each.

    Both float64 [DIM]; the noise is the root of the summed squares of the steps' effects.
    """
    stiffness = _CURVATURE + how.weight_decay + how.proximal
    distance, speed = np.ones(DIM), np.zeros(DIM)
    effect, effect_speed = np.full(DIM, -how.lr), np.ones(DIM)  # of noise in the last step
    squares = np.zeros(DIM)
    with np.errstate(over="ignore", invalid="ignore"):  # a large lr diverges, as in training
        for _ in range(how.steps):
            speed = how.momentum * speed + stiffness * distance
            distance = distance - how.lr * speed
            squares = squares + effect**2
            effect_speed = how.momentum * effect_speed + stiffness * effect
            effect = effect - how.lr * effect_speed
    return distance, np.sqrt(squares)
