"""A stand-in for training, in scheduling studies: SGD on a noisy quadratic, in closed form.

Modelled on the noisy quadratic model of Zhang et al., "Which Algorithmic Choices Matter at Which
Batch Sizes?", NeurIPS 2019, section 3: SGD along each direction j of a quadratic with curvature
proportional to 1/j, and gradient noise whose covariance is that of the curvature. Here the model is
a vector w of `DIM` numbers, w_0 = 0, h_j = curvature / j, and client k minimises

    F_k(w) = 1/2 sum_j h_j (w_j - c_kj)^2,    c_k = c + heterogeneity * s * z_k,

with z_k ~ N(0, I) of its own. The common optimum c has components +s or -s, and s is chosen so that
the loss of w_0 is log(classes), as that of an untrained network:

    loss(w) = 1/2 sum_j h_j (w_j - c_j)^2,    accuracy(w) = exp(-loss(w)).

A step with a batch of B examples uses h_j (w_j - c_kj) + noise * s * sqrt(h_j / B) * N(0, 1). All
steps of a task are one linear map of w and one normal vector, so a task costs microseconds.

What follows from the equations holds here: local steps end near the client's own optimum, stale
updates point from where the client started and diverge if a task covers too much of the distance,
averages of more clients are less noisy. What does not hold: losses of networks are not convex,
their noise is not normal, heterogeneity and numbers of examples are settings and come from no
partition, and a codec acts on `DIM` numbers, not on the layers of a model. Compare schedules with
it, and check the conclusion with real training. The accuracy is no forecast.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.rng import derive_rng, derive_seed

DIM = 32
"""Number of components of w."""
_CLASSES = 10
_NORMAL = NormalDist()
_SPECTRUM = 1.0 / np.arange(1, DIM + 1)
"""h relative to its largest component, float64 [DIM]."""

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

    real: the problem that it stands in for.
    examples: returns a client's number of training examples.
    heterogeneity: how far the clients' optima are from the common one; 1 is as far as w_0.
    noise: standard deviation of the gradient of one example.
    curvature: h_1, of the steepest direction.
    """

    real: Problem
    examples: Callable[[int], int]
    heterogeneity: float
    noise: float
    curvature: float

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

    def model(self) -> nn.Module:
        """Return w_0."""
        return _Position()

    def client(self, index: int) -> Examples:
        """Return the examples of one client; all are empty."""
        return _empty(self.client_size(index))

    def client_size(self, index: int) -> int:
        """Return the client's number of examples."""
        return self.examples(index)

    def label_position(self, index: int) -> float:
        """Return the share of normal draws below z_k0: clients with similar optima are close."""
        return (derive_seed(self.seed, "label position", index) + 0.5) * 2.0**-63

    def test(self) -> Examples:
        """Return one empty example: the loss is known exactly."""
        return _empty(1)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the loss of w; outputs: w, [n, DIM]."""
        away = outputs - torch.from_numpy(self._optimum).to(outputs)
        h = torch.from_numpy(self.curvature * _SPECTRUM).to(outputs)
        return 0.5 * (h * away.square()).sum(dim=1).mean()

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
        h = self.curvature * _SPECTRUM
        left, spread = _response(how, self.curvature)
        fixed = (h * own + how.proximal * first) / (h + how.weight_decay + how.proximal)
        step_noise = self.noise * self._scale * np.sqrt(h / how.batch_size)
        drawn = derive_rng(seed, "gradient noise").standard_normal(DIM)
        end = fixed + left * (first - fixed) + step_noise * spread * drawn
        return torch.from_numpy(end.astype(np.float32))

    def _difference(self, client: int) -> Vector:
        """Return z_k."""
        found = derive_rng(self.seed, "optimum", client).standard_normal(DIM)
        # Within the range of inv_cdf: a position can round to 1.
        position = min(max(self.label_position(client), 1e-12), 1 - 1e-12)
        found[0] = _NORMAL.inv_cdf(position)
        return found

    @cached_property
    def _scale(self) -> float:
        """Return s."""
        try:
            classes = self.real.classes
        except ProblemError:
            classes = _CLASSES
        return math.sqrt(2 * math.log(max(2, classes)) / (self.curvature * _SPECTRUM.sum()))

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
def _response(how: LocalSteps, curvature: float) -> tuple[Vector, Vector]:
    """Return what is left of a distance after all steps, and the effect of unit noise in each.

    Both float64 [DIM]; the noise is the root of the summed squares of the steps' effects.
    """
    stiffness = curvature * _SPECTRUM + how.weight_decay + how.proximal
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
