"""MOCHA: Smith, Chiang, Sanjabi, Talwalkar, "Federated Multi-Task Learning", NeurIPS 2017.

CoCoA is MOCHA with a fixed budget of local work, ``epochs_low = epochs_high``.
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
from fedmq.algorithms.toolkit.layout import Layout, expect_tensor
from fedmq.algorithms.toolkit.states import DERIVED, SavedAs, expect_float
from fedmq.codecs.text import shorten

_LARGEST = 1e12
"""Limit of a dual value or a coordinate of b: their squares and sums are finite."""
_ROUNDING = 1e-11
"""Share of the summed magnitudes that an ascent may seem to lose by rounding."""


@dataclass(frozen=True)
class MochaState:
    """One version. All arrays are float64, for m tasks (one a client) of d features.

    b: [m, d], b_t = (1/n_t) sum_i alpha_ti x_ti, from the clients' last results.
    duals: [m], (1/n_t) sum_i -l*(-alpha_ti), from the same results.
    sigma: [m, m], Omega^-1, the relation of the tasks.
    weights: [m, d], w_t = (1/lambda) sum_t' Sigma_tt' b_t'; derived from b and sigma.
    safe: sigma', derived from sigma.
    version: number of versions before it.
    """

    b: Array = field(metadata=SavedAs(most=_LARGEST).field)
    duals: Array = field(metadata=SavedAs(most=_LARGEST).field)
    sigma: Array = field(metadata=SavedAs(most=_LARGEST).field)
    weights: Array = field(metadata=DERIVED)
    safe: float = field(metadata=DERIVED)
    version: int


MochaAccumulator = dict[int, tuple[Array, float]]
"""The new b_t and dual value by client."""


@dataclass(frozen=True)
class Mocha(Algorithm[MochaState, MochaAccumulator]):
    """Algorithm 1 for linear models, one task a client; the server learns how tasks relate.

    It minimises sum_t (1/n_t) sum_i l(w_t^T x_ti, y_ti) + (lambda/2) tr(W Omega W^T) by ascent
    of the dual with Omega fixed.

    loss: ``hinge`` for two classes, y = 0 or 1; ``squared``, (u - y)^2 / 2, for regression.
    lam: lambda. Omega is m I at the start, so a single task has a ridge of lam * m.
    relation: ``learned``: Sigma = (W^T W)^{1/2} / tr((W^T W)^{1/2}) after every `inner`
        versions, I / m at first. ``local``: always I / m, independent tasks. ``global``: 1/m in
        every entry, one w for all.
    inner: H, versions between two updates of Sigma.
    floor: smallest eigenvalue of W^T W; smaller ones are raised to it for Sigma.
    safety: choice of sigma', which keeps the sum of all clients' steps from overshooting.
        ``rows``: max_t sum_t' |Sigma_tt'| / Sigma_tt, as in the paper's code. ``eigenvalue``:
        the smallest safe value, often a half or a third of that bound.
    epochs_low, epochs_high: bounds of a client's passes over its data in a round, drawn uniformly
        for each client and round; theta in the paper. Half a pass in its code.
    drop: probability that a client does nothing in a round, theta = 0 in the paper.
    personal_epochs: passes of a new client, which starts from the mean of all w_t. Its dual starts
        from zero, so the default is 20.
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
                f"epochs_low: expected at most epochs_high, got {self.epochs_low} "
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
        """Return c = sigma' Sigma_tt / lambda, by which a task's outputs follow its own b_t."""
        return state.safe * float(state.sigma[client, client]) / self.lam

    def task(self, state: MochaState, client: int) -> Payload:
        """Return v_t = w_t - c b_t, exactly, and c = sigma' Sigma_tt / lambda.

        With them a client's subproblem depends on its alpha and not on their change, so the client
        need not know which of its results were accepted.
        """
        curvature = self._curvature(state, client)
        anchor = state.weights[client] - curvature * state.b[client]
        return Payload(exact={"v": torch.from_numpy(anchor)}, numbers={"curvature": curvature})

    def evaluation_task(self, state: MochaState, client: int = 0) -> Payload:
        """Return w_t; for a client beyond the m, the mean of all."""
        known = client < len(state.weights)
        w = state.weights[client].copy() if known else state.weights.mean(axis=0)
        return Payload(exact={"w": torch.from_numpy(w)})

    def result_bytes(self, state: MochaState) -> int:
        """Return the size of one b_t, in bytes."""
        return int(state.b[0].nbytes)

    def new_accumulator(self, state: MochaState) -> MochaAccumulator:
        """Return an empty accumulator."""
        return {}

    def accumulate(
        self,
        accumulator: MochaAccumulator,
        state: MochaState,
        result: Result,
        weight: float,
    ) -> MochaAccumulator:
        """Replace a client's b_t, if that is certain to raise the dual objective.

        The clients' steps together add at least the sum of their `_gain` to the dual objective;
        each gain is at least zero if the client's task was of this version.
        """
        b = _vector(result.payload.exact, "b", state.b.shape[1])
        dual_value = expect_float("dual", result.payload.numbers, _LARGEST)
        if self.loss == "hinge" and not 0 <= dual_value <= 1 + _ROUNDING:
            raise ResultError(f"expected dual, a mean of y alpha, from 0 to 1, got {dual_value:g}")
        gain, scale = self._gain(state, result.client, b, dual_value)
        if gain < -_ROUNDING * scale:
            raise ResultError(
                f"expected a result that raises the dual objective, got one that lowers it by "
                f"{-gain:.3g}, as results of older versions may"
            )
        accumulator[result.client] = b, dual_value
        return accumulator

    def _gain(
        self, state: MochaState, client: int, b: Array, dual_value: float
    ) -> tuple[float, float]:
        """Return the gain of a new b_t in the client's subproblem, and the summed magnitudes."""
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

        W is recomputed from b, so that it matches the clients' alpha after Sigma has changed, and
        clients need not be informed.
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
        """Return W, b, the dual values and Sigma."""
        arrays = {"w": state.weights, "b": state.b, "duals": state.duals, "sigma": state.sigma}
        return {name: torch.from_numpy(each.copy()) for name, each in arrays.items()}

    # ---- at the client

    def train(self, task: Task, client: Client) -> TrainResult:
        """Ascend from the client's alpha by this round's budget of coordinates.

        The result is b_t and not its change, so the next result makes up for a lost or rejected
        one, and the server's b_t always matches an alpha of this client.
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
        """Return the number of coordinate steps of a client with n examples; 0 if dropped."""
        dropped = rng.random() < self.drop
        epochs = rng.uniform(self.epochs_low, self.epochs_high)
        return 0 if dropped else round(epochs * n)

    def _examples(self, data: Examples) -> tuple[Array, Array]:
        """Return x [n, d] and y [n], -1 or 1 for classes.

        Raises:
            ProblemError: the labels do not fit the loss.
        """
        if data.y.is_floating_point() != (self.loss == "squared"):
            needed = "numbers" if self.loss == "squared" else "classes 0 and 1"
            raise ProblemError(
                f"loss: expected {needed} as y for the {self.loss} loss, got {data.y.dtype}"
            )
        x, y = data.x.cpu().double().numpy(), data.y.cpu().double().numpy()
        return np.ascontiguousarray(x), y if self.loss == "squared" else 2 * y - 1

    def evaluate_client(self, task: Task, client: Client) -> Mapping[str, float]:
        """Return the problem's metrics of w_t on the client's test data, and its share of the gap.

        The mean of ``gap`` over the clients times m is P(W) - D(alpha), if the server has
        accepted each client's last result.
        """
        w = _vector(task.payload.exact, "w", features(client.problem))
        x, y = self._examples(client.data)
        gap = dual.gap(dual.LOSSES[self.loss], x, y, _alpha(client, len(y)), w)
        return {**measured(client.problem, client.index, w), "gap": gap}

    def personalise(self, state: MochaState, version: int, client: Client) -> Mapping[str, float]:
        """Return the metrics of a new task whose w is regularised to the mean of all others.

        min_w (1/n) sum_i l(w^T x_i, y_i) + (lambda m / 2) |w - mean|^2, like a single task at the
        start except for the mean. The paper has no new tasks.
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
        ProblemError: the model is another; a constant feature serves as the bias.
    """
    slots = Layout.of(problem.model()).weights
    if len(slots) != 1 or len(slots[0].shape) != 2 or slots[0].shape[0] != 1:
        shapes = ", ".join(str(list(slot.shape)) for slot in slots)
        raise ProblemError(
            "problem: MOCHA learns linear models: expected one weight of shape [1, d], "
            f"got {shapes}"
        )
    return slots[0].shape[1]


def measured(problem: Problem, client: int, w: Array) -> dict[str, float]:
    """Return a problem's metrics of w [d] on a client's test data."""
    test = problem.client_test(client)
    u = dual.outputs(test.x.double().numpy(), w)
    return dict(problem.metrics(torch.from_numpy(u).float()[:, None], test.y))


def _alpha(client: Client, n: int) -> Array:
    """Return the client's alpha [n], zeros if it never trained."""
    if client.local is None:
        return np.zeros(n)
    return _array(client.local.exact, "alpha", (n,))


def _array(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Array:
    """Return a copy of a tensor as an array.

    Raises:
        ResultError: it is missing, or not finite float64 of this shape.
    """
    array: Array = expect_tensor(name, tensors.get(name), torch.float64, shape).numpy().copy()
    if not (np.abs(array) <= _LARGEST).all():
        raise ResultError(f"expected values of {name} up to {_LARGEST:g} in magnitude")
    return array


def _vector(tensors: Mapping[str, Tensor], name: str, size: int) -> Array:
    extra = sorted(set(tensors) - {name})
    if extra:
        raise ResultError(f"expected no tensor {shorten(extra[0])}")
    return _array(tensors, name, (size,))
