"""Multi-task learning in the dual: losses, coordinate ascent, relations of tasks.

Smith, Chiang, Sanjabi, Talwalkar, "Federated Multi-Task Learning", NeurIPS 2017; the steps
are those of Shalev-Shwartz and Zhang, "Stochastic Dual Coordinate Ascent Methods", JMLR 2013.

Everything is float64. `numpy.einsum`, on one thread, computes large products, and torch, with a
fixed number of threads, eigenvalues: the last bits of a threaded BLAS depend on the number of
threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

_SMALLEST = 1e-300
"""Lower limit of a curvature: quotients stay finite and are clipped."""


class Loss(ABC):
    """A loss l(u) of an output u = w^T x, and its conjugate."""

    @abstractmethod
    def value(self, u: Array, y: Array) -> Array:
        """Return l(u_i), [n]."""

    @abstractmethod
    def dual(self, alpha: Array, y: Array) -> Array:
        """Return -l*(-alpha_i), [n], for feasible alpha."""

    @abstractmethod
    def step(self, alpha: float, y: float, u: float, curvature: float) -> float:
        """Return the alpha_i that maximises -l*(-alpha_i) - u d - curvature d^2 / 2.

        d is the change of alpha_i: this is a task's subproblem for one coordinate.
        """


class Hinge(Loss):
    """l(u) = max(0, 1 - y u) with y = -1 or 1; -l*(-a) = y a with y a in [0, 1]."""

    def value(self, u: Array, y: Array) -> Array:
        """Return l(u_i)."""
        return np.asarray(np.maximum(0.0, 1.0 - y * u))

    def dual(self, alpha: Array, y: Array) -> Array:
        """Return y_i alpha_i."""
        return np.asarray(y * alpha)

    def step(self, alpha: float, y: float, u: float, curvature: float) -> float:
        """y clip((1 - y u) / curvature + y alpha, 0, 1)."""
        wanted = (1.0 - y * u) / max(curvature, _SMALLEST) + y * alpha
        return y * min(max(wanted, 0.0), 1.0)


class Squared(Loss):
    """l(u) = (u - y)^2 / 2; -l*(-a) = a y - a^2 / 2.

    The derivative by d, y - (a + d) - u - curvature d, is zero at
    d = (y - a - u) / (1 + curvature).
    """

    def value(self, u: Array, y: Array) -> Array:
        """Return l(u_i)."""
        return np.asarray(0.5 * (u - y) ** 2)

    def dual(self, alpha: Array, y: Array) -> Array:
        """Return alpha_i y_i - alpha_i^2 / 2."""
        return np.asarray(alpha * y - 0.5 * alpha**2)

    def step(self, alpha: float, y: float, u: float, curvature: float) -> float:
        """Alpha + (y - alpha - u) / (1 + curvature)."""
        return alpha + (y - alpha - u) / (1.0 + curvature)


LOSSES: Mapping[str, Loss] = {"hinge": Hinge(), "squared": Squared()}


def combine(x: Array, alpha: Array) -> Array:
    """b = (1/n) sum_i alpha_i x_i. x: [n, d], alpha: [n] -> [d]."""
    return np.asarray(np.einsum("i,ij->j", alpha, x) / len(alpha))


def outputs(x: Array, w: Array) -> Array:
    """u_i = w^T x_i. x: [n, d], w: [d] -> [n]."""
    return np.asarray(np.einsum("ij,j->i", x, w))


def ascend(
    loss: Loss,
    x: Array,
    y: Array,
    alpha: Array,
    anchor: Array,
    curvature: float,
    steps: int,
    rng: np.random.Generator,
) -> Array:
    """Return alpha [n] after steps of coordinate ascent, each epoch in a new random order.

    No step lowers (1/n) sum_i -l*(-alpha_i) - v^T b - (c/2) |b|^2, with b = (1/n) sum_i alpha_i
    x_i, the anchor v [d] and the curvature c.
    """
    n = len(y)
    alpha = alpha.copy()
    # The weights of the subproblem's outputs; they follow b.
    w = anchor + curvature * combine(x, alpha)
    curvatures = (curvature / n * np.einsum("ij,ij->i", x, x)).tolist()
    labels = y.tolist()
    for first in range(0, steps, n):
        for i in rng.permutation(n)[: steps - first].tolist():
            row, before = x[i], float(alpha[i])
            after = loss.step(before, labels[i], float(row @ w), curvatures[i])
            if after != before:
                alpha[i] = after
                w += (curvature * (after - before) / n) * row
    return alpha


def gap(loss: Loss, x: Array, y: Array, alpha: Array, w: Array) -> float:
    """Return a task's share of P(W) - D(alpha): (1/n) sum_i l(u_i) + l*(-alpha_i) + alpha_i u_i.

    With W = W(alpha) the sum over tasks is the duality gap, and no share is negative.
    """
    u = outputs(x, w)
    return float(np.mean(loss.value(u, y) - loss.dual(alpha, y) + alpha * u))


def relate(weights: Array, floor: float) -> Array:
    """Sigma = (W^T W)^{1/2} / tr((W^T W)^{1/2}), of tasks by row: weights [m, d] -> [m, m].

    Eigenvalues of W^T W below the floor are raised to it. Otherwise Sigma has no inverse if there
    are more tasks than features, or equal tasks.
    """
    gram = np.einsum("td,sd->ts", weights, weights)
    values, vectors = (each.numpy() for each in torch.linalg.eigh(torch.from_numpy(gram)))
    roots = np.sqrt(np.maximum(values, floor))
    sigma = np.einsum("ti,si->ts", vectors * (roots / roots.sum()), vectors)
    return np.asarray((sigma + sigma.T) / 2)


def rows(sigma: Array) -> float:
    """sigma' = max_t sum_t' |Sigma_tt'| / Sigma_tt: with it, all tasks' steps can be added up."""
    return float(np.max(np.abs(sigma).sum(axis=1) / np.diag(sigma)))


def eigenvalue(sigma: Array) -> float:
    """Return the smallest sigma' with which all tasks' steps can be added up.

    It is the largest eigenvalue of Sigma_tt' / sqrt(Sigma_tt Sigma_t't'), so sigma' diag(Sigma) -
    Sigma has no negative eigenvalue. `rows` is an upper bound. A small margin covers rounding.
    """
    scale = 1.0 / np.sqrt(np.diag(sigma))
    scaled = torch.from_numpy(sigma * scale * scale[:, None])
    return float(torch.linalg.eigvalsh(scaled)[-1]) * (1 + 1e-9)


SAFETY: Mapping[str, Callable[[Array], float]] = {"rows": rows, "eigenvalue": eigenvalue}
