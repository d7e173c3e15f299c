"""MOCHA: Smith, Chiang, Sanjabi, Talwalkar, "Federated Multi-Task Learning", NeurIPS 2017.

CoCoA is the same with a fixed budget of local work, ``epochs_low = epochs_high``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedmq.algorithms.base import Algorithm, Client, Payload, Result, Task, TrainResult
from fedmq.algorithms.errors import AlgorithmError, ProblemError, ResultError
from fedmq.algorithms.mocha import dual
from fedmq.algorithms.mocha.dual import Array
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.toolkit.layout import Layout
from fedmq.algorithms.toolkit.states import DERIVED, expect_float, expect_tensor, saved
from fedmq.codecs.text import shorten

_LARGEST = 1e12
"""Of a dual value or a coordinate of b: squares and sums of them are finite."""
_ROUNDING = 1e-11
"""How much, of all that is added up, an ascent may seem to lose."""


@dataclass(frozen=True)
class MochaState:
    """One version. All float64; m tasks, one a client, of d features.

    b: [m, d], b_t = (1/n_t) sum_i alpha_ti x_ti, as the clients last said.
    duals: [m], (1/n_t) sum_i -l*(-alpha_ti), as they said it with b.
    sigma: [m, m], Omega^-1, how the tasks relate.
    weights: [m, d], w_t = (1/lambda) sum_t' Sigma_tt' b_t'; it follows from b and sigma.
    safe: sigma', of sigma.
    version: how many were committed before.
    """

    b: Array = field(metadata=saved(most=_LARGEST))
    duals: Array = field(metadata=saved(most=_LARGEST))
    sigma: Array = field(metadata=saved(most=_LARGEST))
    weights: Array = field(metadata=DERIVED)
    safe: float = field(metadata=DERIVED)
    version: int


MochaAccumulator = dict[int, tuple[Array, float]]
"""What is new of a client: b_t and its dual value. At most one entry a client."""


@dataclass(frozen=True)
class Mocha(Algorithm[MochaState, MochaAccumulator]):
    """Algorithm 1, for linear models, one task a client; the server learns how tasks relate.

    It minimises sum_t (1/n_t) sum_i l(w_t^T x_ti, y_ti) + (lambda/2) tr(W Omega W^T), by
    ascent of its dual while Omega is fixed.

    loss: ``hinge`` for two classes, y = 0 or 1; ``squared``, (u - y)^2 / 2, for regression.
    lam: lambda. Omega is large, m I at the start: a task alone has a ridge of lam * m.
    relation: ``learned``: Sigma = (W^T W)^{1/2} / tr((W^T W)^{1/2}) after every `inner`
        versions, from I / m. ``local``: I / m for ever, each task alone. ``global``: 1/m in
        every place, one w for all.
    inner: H, versions between two updates of Sigma.
    floor: least eigenvalue of W^T W that Sigma is made from.
    safety: how sigma' is chosen, which keeps all clients' steps together from going too far.
        ``rows``: max_t sum_t' |Sigma_tt'| / Sigma_tt, as in the paper's code. ``eigenvalue``:
        the least that is safe, which that is a bound of; often a half or a third of it.
    epochs_low, epochs_high: passes over its data that a client does in a round, drawn uniformly
        between them for each client and round; theta in the paper. Half a pass in its code.
    drop: probability that a client does nothing in a round, theta = 0 in the paper.
    personal_epochs: passes of a new client, which starts from the mean of all w_t; its dual has
        to be found from nothing, so 20 by default.
    """

    name: ClassVar[str] = "mocha"
    schedules: ClassVar[frozenset[str]] = frozenset({"rounds", "buffered", "stream"})
    task_per_client: ClassVar[bool] = True
    fixed_reply: ClassVar[Literal["update"]] = "update"
    evaluated_by: ClassVar[Literal["model", "clients"]] = "clients"

    loss: Literal["hinge", "squared"] = "hinge"
    lam: Annotated[float, Field(gt=0)] = 1e-3
    relation: Literal["learned", "local", "global"] = "learned"
    inner: Annotated[int, Field(ge=1)] = 100
    floor: Annotated[float, Field(gt=0)] = 1e-7
    safety: Literal["rows", "eigenvalue"] = "rows"
    epochs_low: Annotated[float, Field(ge=0)] = 0.5
    epochs_high: Annotated[float, Field(gt=0)] = 0.5
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    personal_epochs: Annotated[int, Field(ge=1)] = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs_low > self.epochs_high:
            raise AlgorithmError(
                f"expected epochs_low of at most epochs_high, got {self.epochs_low} "
                f"and {self.epochs_high}"
            )

    # ---- at the aggregator

    def start(self, problem: Problem) -> MochaState:
        """W = 0, alpha = 0, Sigma = I/m (or all 1/m)."""
        m, d = problem.clients, features(problem)
        sigma = np.full((m, m), 1.0 / m) if self.relation == "global" else np.eye(m) / m
        return self._state(np.zeros((m, d)), np.zeros(m), sigma, 0)

    def _state(self, b: Array, duals: Array, sigma: Array, version: int) -> MochaState:
        weights = np.einsum("ts,sd->td", sigma, b) / self.lam
        return MochaState(b, duals, sigma, weights, dual.SAFETY[self.safety](sigma), version)

    def _curvature(self, state: MochaState, client: int) -> float:
        """sigma' Sigma_tt / lambda: how fast a task's outputs follow its own b_t."""
        return state.safe * float(state.sigma[client, client]) / self.lam

    def task(self, state: MochaState, client: int) -> Payload:
        """Return v_t = w_t - c b_t, exactly, and c = sigma' Sigma_tt / lambda.

        With them a client's subproblem is in terms of all its alpha, not of their change:
        it need not know which of its results have been counted.
        """
        curvature = self._curvature(state, client)
        anchor = state.weights[client] - curvature * state.b[client]
        return Payload(exact={"v": torch.from_numpy(anchor)}, numbers={"curvature": curvature})

    def evaluation_task(self, state: MochaState, client: int = 0) -> Payload:
        """Return w_t; to a client that is not of the m, the mean of all."""
        known = client < len(state.weights)
        w = state.weights[client].copy() if known else state.weights.mean(axis=0)
        return Payload(exact={"w": torch.from_numpy(w)})

    def result_bytes(self, state: MochaState) -> int:
        """Return the size of one b_t."""
        return int(state.b[0].nbytes)

    def new_accumulator(self, state: MochaState) -> MochaAccumulator:
        """Return that nothing is new."""
        return {}

    def accumulate(
        self,
        accumulator: MochaAccumulator,
        state: MochaState,
        result: Result,
        weight: float,
    ) -> MochaAccumulator:
        """Note a client's whole b_t, if that raises the dual objective for certain.

        The sum over clients of what `_gain` says is at most what their steps add to the dual
        objective together; each is at least zero if the client's task was of this version.
        """
        b = _vector(result.payload.exact, "b", state.b.shape[1])
        dual_value = expect_float("dual", result.payload.numbers, _LARGEST)
        if self.loss == "hinge" and not 0 <= dual_value <= 1 + _ROUNDING:
            raise ResultError(f"expected dual, a mean of y alpha, from 0 to 1, got {dual_value:g}")
        gain, scale = self._gain(state, result.client, b, dual_value)
        if gain < -_ROUNDING * scale:
            raise ResultError(
                f"expected a result that raises the dual objective, this lowers it by {-gain:.3g}; "
                "one of an older version may"
            )
        accumulator[result.client] = b, dual_value
        return accumulator

    def _gain(
        self, state: MochaState, client: int, b: Array, dual_value: float
    ) -> tuple[float, float]:
        """Return what a new b_t adds to the client's subproblem, and the scale of it."""
        old, curvature = state.b[client], self._curvature(state, client)
        change = b - old
        terms = (
            dual_value,
            -float(state.duals[client]),
            -float(np.einsum("i,i->", state.weights[client], change)),
            -0.5 * curvature * float(np.einsum("i,i->", change, change)),
        )
        return math.fsum(terms), sum(map(abs, terms))

    def commit(
        self, state: MochaState, accumulator: MochaAccumulator, divisor: float
    ) -> MochaState:
        """w_t += (1/lambda) sum_t' Sigma_tt' db_t'; after H versions Sigma follows W.

        W is made anew from b: when Sigma has changed, W and the clients' alpha still belong
        together, and no client has to hear of it.
        """
        b, duals = state.b.copy(), state.duals.copy()
        for client, (vector, dual_value) in accumulator.items():
            b[client], duals[client] = vector, dual_value
        version = state.version + 1
        new = self._state(b, duals, state.sigma, version)
        if self.relation == "learned" and version % self.inner == 0:
            return self._state(b, duals, dual.relate(new.weights, self.floor), version)
        return new

    def dual(self, state: MochaState) -> float:
        """D = sum_t (1/n_t) sum_i -l*(-alpha_ti) - (lambda/2) tr(W Omega W^T)."""
        penalty = np.einsum("td,td->", state.b, state.weights) / 2
        return float(state.duals.sum() - penalty)

    def load(self, problem: Problem, saved: Payload) -> MochaState:
        """Return the state that was saved; the weights and sigma' follow from it."""
        found = super().load(problem, saved)
        if not (np.array_equal(found.sigma, found.sigma.T) and (np.diag(found.sigma) > 0).all()):
            raise ResultError("expected sigma to be symmetric, its diagonal above 0")
        return self._state(found.b, found.duals, found.sigma, found.version)

    def tensors(self, state: MochaState) -> Mapping[str, Tensor]:
        """Return W, and what it is made of."""
        arrays = {"w": state.weights, "b": state.b, "duals": state.duals, "sigma": state.sigma}
        return {name: torch.from_numpy(each.copy()) for name, each in arrays.items()}

    # ---- at the client

    def train(self, task: Task, client: Client) -> TrainResult:
        """Coordinate ascent from the client's alpha, as far as this round's budget goes.

        The result is all of b_t, not its change: one that is lost or refused is made up for
        by the next, and what the server counts always belongs to alpha this client had.
        """
        loss, (x, y) = dual.LOSSES[self.loss], self._examples(client.data)
        alpha = _alpha(client, len(y))
        anchor = _vector(task.payload.exact, "v", x.shape[1])
        curvature = expect_float("curvature", task.payload.numbers, _LARGEST)
        rng = derive_rng(client.seed, "mocha")
        steps = self.budget(len(y), rng)
        alpha = dual.ascend(loss, x, y, alpha, anchor, curvature, steps, rng)
        dual_value = float(np.mean(loss.dual(alpha, y)))
        payload = Payload(
            exact={"b": torch.from_numpy(dual.combine(x, alpha))},
            numbers={"dual": dual_value, "steps": steps},
        )
        return TrainResult(payload, len(y), Payload(exact={"alpha": torch.from_numpy(alpha)}))

    def budget(self, n: int, rng: np.random.Generator) -> int:
        """Return how many of its n coordinates a client turns to now; 0 if it is dropped."""
        dropped = rng.random() < self.drop
        epochs = rng.uniform(self.epochs_low, self.epochs_high)
        return 0 if dropped else round(epochs * n)

    def _examples(self, data: Examples) -> tuple[Array, Array]:
        """Return x [n, d] and y [n], -1 or 1 for classes.

        Raises:
            ProblemError: they do not go with the loss.
        """
        if data.y.is_floating_point() != (self.loss == "squared"):
            needed = "numbers as y" if self.loss == "squared" else "classes 0 and 1 as y"
            raise ProblemError(f"the {self.loss} loss needs {needed}, got {data.y.dtype}")
        x, y = data.x.cpu().double().numpy(), data.y.cpu().double().numpy()
        return np.ascontiguousarray(x), y if self.loss == "squared" else 2 * y - 1

    def evaluate_client(self, task: Task, client: Client) -> Mapping[str, float]:
        """Return the problem's metrics of w_t on the client's test data, and its part of the gap.

        ``gap``: the mean over the clients times m is P(W) - D(alpha), if the server has
        counted each client's last result.
        """
        w = _vector(task.payload.exact, "w", features(client.problem))
        x, y = self._examples(client.data)
        gap = dual.gap(dual.LOSSES[self.loss], x, y, _alpha(client, len(y)), w)
        return {**measured(client.problem, client.index, w), "gap": gap}

    def personalise(self, state: MochaState, version: int, client: Client) -> Mapping[str, float]:
        """Return the metrics of a new task whose w is kept near the mean of all others.

        min_w (1/n) sum_i l(w^T x_i, y_i) + (lambda m / 2) |w - mean|^2: as for a task alone at
        the start, but for the mean. The paper has no new tasks.
        """
        payload = self.evaluation_task(state, client.index)
        mean = _vector(payload.exact, "w", features(client.problem))
        curvature = 1.0 / (self.lam * len(state.weights))
        x, y = self._examples(client.data)
        rng, steps = derive_rng(client.seed, "mocha"), self.personal_epochs * len(y)
        loss, zero = dual.LOSSES[self.loss], np.zeros(len(y))
        alpha = dual.ascend(loss, x, y, zero, mean, curvature, steps, rng)
        return measured(client.problem, client.index, mean + curvature * dual.combine(x, alpha))


def features(problem: Problem) -> int:
    """Return d of a problem whose model is one output w^T x.

    Raises:
        ProblemError: its model is another; a constant among the features is its bias.
    """
    slots = Layout.of(problem.model()).weights
    if len(slots) != 1 or len(slots[0].shape) != 2 or slots[0].shape[0] != 1:
        shapes = ", ".join(str(list(slot.shape)) for slot in slots)
        raise ProblemError(
            "problem: MOCHA learns linear models, expected one weight of shape [1, d], "
            f"this problem's model has {shapes}"
        )
    return slots[0].shape[1]


def measured(problem: Problem, client: int, w: Array) -> dict[str, float]:
    """Return a problem's metrics of w [d] on a client's test data."""
    test = problem.client_test(client)
    u = dual.outputs(test.x.double().numpy(), w)
    return dict(problem.metrics(torch.from_numpy(u).float()[:, None], test.y))


def _alpha(client: Client, n: int) -> Array:
    """Return the client's alpha [n], zero if it never trained."""
    if client.local is None:
        return np.zeros(n)
    return _array(client.local.exact, "alpha", (n,))


def _array(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Array:
    """Return a tensor as an array of its own.

    Raises:
        ResultError: it is not there, or not finite float64 of this shape.
    """
    array: Array = expect_tensor(name, tensors.get(name), torch.float64, shape).numpy().copy()
    if not (np.abs(array) <= _LARGEST).all():
        raise ResultError(f"expected {name} to be finite, up to {_LARGEST:g}")
    return array


def _vector(tensors: Mapping[str, Tensor], name: str, size: int) -> Array:
    extra = sorted(set(tensors) - {name})
    if extra:
        raise ResultError(f"expected no tensor {shorten(extra[0])}")
    return _array(tensors, name, (size,))
