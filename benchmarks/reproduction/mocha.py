"""Multi-task learning on related tasks: Smith, Chiang, Sanjabi, Talwalkar, NeurIPS 2017,
"Federated Multi-Task Learning", table 1 and section 5.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedmq.algorithms.base import Client, Payload, Result, Task
from fedmq.algorithms.errors import DataError
from fedmq.algorithms.mocha import dual
from fedmq.algorithms.mocha.algorithm import Mocha, measured
from fedmq.algorithms.problems import Problem
from fedmq.algorithms.problems.federated_datasets import DigitTasks, LandMine, LinearTasks, School
from fedmq.algorithms.rng import derive_rng, derive_seed
from reproduction.runs import Cell, Outcome, Runs, Settings

KINDS = ("global", "local", "learned")
POOLED_EPOCHS = 20


@dataclass(frozen=True)
class Natural(Cell):
    """Metrics of a natural data set's tasks, without a network: one w, local w, MOCHA.

    make: returns the problem of a seed.
    loss: the algorithm's loss.
    lams: lambda of each kind, the best of a few on the splits of seeds 100 and 101.
    shuffles: number of splits into training and test parts, with seeds s, s + 1, ..; the
        paper has ten.
    rounds: rounds of MOCHA; local training takes a third.
    inner: H.
    shown: metrics, the deciding one first; that is the AUC where 94 % are of one class.
    """

    make: Callable[[int], LinearTasks]
    loss: str
    lams: Mapping[str, float]
    shuffles: int
    rounds: int = 60
    inner: int = 10
    shown: Sequence[str] = ("auc", "accuracy", "loss")

    def measure(self, runs: Runs) -> Outcome:
        """Run all shuffles; return "no data" if the data are missing."""
        try:
            self.make(runs.seed).client(0)
        except DataError as error:
            return Outcome("no data", None, {}, (str(error),))
        scores: dict[str, list[Mapping[str, float]]] = {kind: [] for kind in KINDS}
        for seed in range(runs.seed, runs.seed + self.shuffles):
            problem = self.make(seed)
            common: dict[str, Any] = {
                "loss": self.loss,
                "inner": self.inner,
                "epochs_low": 1.0,
                "epochs_high": 1.0,
                "safety": "eigenvalue",
            }
            shared = Mocha(lam=self.lams["global"], loss=common["loss"])
            scores["global"].append(scored(problem, pooled(shared, problem, seed)))
            alone = Mocha(lam=self.lams["local"], relation="local", **common)
            weights = federated(alone, problem, self.rounds // 3, seed)
            scores["local"].append(scored(problem, weights))
            related = Mocha(lam=self.lams["learned"], **common)
            weights = federated(related, problem, self.rounds, seed)
            scores["learned"].append(scored(problem, weights))
        figures: dict[str, float] = {}
        for kind, name in itertools.product(KINDS, self.shown):
            values = [each[name] for each in scores[kind]]
            figures[f"{kind}.{name}"] = statistics.fmean(values)
            figures[f"{kind}.{name}.se"] = statistics.stdev(values) / self.shuffles**0.5
        ours, *more = (
            f"{name} " + " / ".join(f"{figures[f'{kind}.{name}']:.4f}" for kind in KINDS)
            for name in self.shown
        )
        return Outcome(ours, None, figures, more)


@dataclass(frozen=True)
class Digits(Cell):
    """Tasks of MNIST images: MOCHA with stragglers, and 30 % of the nodes missing per round.

    The run's seed runs as a cluster; the bar is on the mean of three seeds without a network.

    digits: kind of the tasks.
    lams: lambda of each kind, the best of a few on images of another seed.
    lead: smallest accepted difference between the error of local training and MOCHA's.
    """

    digits: Literal["one-vs-rest", "odd-even"]
    lams: Mapping[str, float]
    lead: float = 0.0

    clients = 100
    examples = 20
    rounds = 50
    seeds = 3

    def settings(self, algorithm: Mocha) -> Settings:
        """Return the cluster's run: 16 images a client for training, 4 for tests."""
        return Settings(
            run={"versions": self.rounds, "evaluate_every": 0},
            problem={
                "name": "fedmq.algorithms.problems.federated_datasets:DigitTasks",
                "data": "mnist",
                "digits": self.digits,
                "clients": self.clients,
                "examples": self.examples,
            },
            algorithm={
                "name": "mocha",
                **dataclasses.asdict(algorithm),
            },
            schedule={"name": "rounds", "fraction": 1.0},
        )

    def measure(self, runs: Runs) -> Outcome:
        """Run MOCHA, local training without stragglers, and one w."""
        learned = Mocha(
            lam=self.lams["learned"],
            inner=10,
            safety="eigenvalue",
            epochs_low=0.1,
            epochs_high=1.0,
            drop=0.3,
        )
        local = Mocha(lam=self.lams["local"], relation="local", epochs_low=1.0, epochs_high=1.0)
        errors: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for seed in range(runs.seed, runs.seed + self.seeds):
            problem = DigitTasks(
                clients=self.clients,
                seed=seed,
                digits=self.digits,
                data="mnist",
                examples=self.examples,
            )
            found = {
                "global": pooled(Mocha(lam=self.lams["global"]), problem, seed),
                "local": federated(local, problem, self.rounds // 3, seed),
                "learned": federated(learned, problem, self.rounds, seed),
            }
            for kind, weights in found.items():
                errors[kind].append(1 - scored(problem, weights)["accuracy"])
        run = runs.result(self.settings(learned))
        means = {kind: statistics.fmean(values) for kind, values in errors.items()}
        by_seed = "; ".join(
            " / ".join(f"{each:.2%}" for each in one)
            for one in zip(*(errors[kind] for kind in KINDS), strict=True)
        )
        cluster = (
            f"as a cluster: {1 - run.last:.2%}; {run.traffic.down:,.0f} bytes down and "
            f"{run.traffic.up:,.0f} up per client and round"
        )
        return Outcome(
            " / ".join(f"{means[kind]:.2%}" for kind in KINDS),
            means["learned"] <= min(means["local"] - self.lead, means["global"]),
            {**means, "cluster": 1 - run.last, "cluster_s": run.seconds},
            (f"by seed: {by_seed}", cluster),
        )


def federated(algorithm: Mocha, problem: Problem, rounds: int, seed: int) -> dual.Array:
    """Return W, float64 [m, d], after rounds of all clients."""
    state, local_states = algorithm.start(problem), dict[int, Payload]()

    def client(index: int, turn: int) -> Client:
        own = derive_seed(seed, "natural", turn, index)
        return Client(index, problem, problem.client(index), local_states.get(index), own)

    for turn in range(rounds):
        accumulator = algorithm.new_accumulator(state)
        for index in range(problem.clients):
            task = Task(turn, algorithm.task(state, index))
            trained = algorithm.train(task, client(index, turn))
            if trained.local_state is not None:
                local_states[index] = trained.local_state
            result = Result(index, 0, trained.payload, trained.num_examples)
            accumulator = algorithm.accumulate(accumulator, state, result, 1.0)
        state = algorithm.commit(state, accumulator, 1.0)
    return state.weights


def pooled(algorithm: Mocha, problem: Problem, seed: int) -> dual.Array:
    """Return W, float64 [m, d], whose rows are the one w trained on all examples together.

    w minimises (1/n) sum_i l(w^T x_i, y_i) + (lambda/2) |w|^2.
    """
    parts = [problem.client(index) for index in range(problem.clients)]
    y = np.concatenate([part.y.numpy() for part in parts]).astype(np.float64)
    y = y if algorithm.loss == "squared" else 2 * y - 1
    x = np.concatenate([part.x.numpy() for part in parts]).astype(np.float64)
    curvature, loss = 1 / algorithm.lam, dual.LOSSES[algorithm.loss]
    rng, steps = derive_rng(seed, "pooled"), POOLED_EPOCHS * len(y)
    zero = np.zeros(x.shape[1])
    alpha = dual.ascend(loss, x, y, np.zeros(len(y)), zero, curvature, steps, rng)
    return np.tile(curvature * dual.combine(x, alpha), (problem.clients, 1))


def scored(problem: Problem, weights: dual.Array) -> dict[str, float]:
    """Return the clients' mean metrics, and ``auc`` over the outputs of all clients.

    ``auc``: probability that an example of class 1 has a larger output than one of class 0.
    """
    metrics = [measured(problem, index, w) for index, w in enumerate(weights)]
    found = {name: statistics.fmean(each[name] for each in metrics) for name in metrics[0]}
    parts = [problem.client_test(index) for index in range(problem.clients)]
    outputs = [part.x.double().numpy() @ w for part, w in zip(parts, weights, strict=True)]
    u, y = np.concatenate(outputs), np.concatenate([part.y.numpy() for part in parts])
    above = u[y > 0][:, None] - u[y <= 0]
    return {**found, "auc": float(np.mean((above > 0) + 0.5 * (above == 0)))}


CELLS: tuple[Cell, ...] = (
    Natural(
        "mocha-landmine",
        "error 27.72 / 23.43 / 20.09 % (table 1)",
        "",
        lambda seed: LandMine(clients=29, seed=seed),
        "hinge",
        {"global": 0.01, "local": 0.01, "learned": 0.1},
        shuffles=10,
    ),
    Natural(
        "mocha-school",
        "explained variance: not in the paper",
        "",
        lambda seed: School(clients=139, seed=seed),
        "squared",
        {"global": 0.01, "local": 0.002, "learned": 0.1},
        shuffles=3,
        shown=("accuracy", "loss"),
    ),
    Digits(
        "mocha-one-vs-rest",
        "global > local > MTL (table 1)",
        "error 1 point below local, and below global",
        "one-vs-rest",
        {"global": 0.1, "local": 0.02, "learned": 0.05},
        0.01,
    ),
    Digits(
        "mocha-odd-even",
        "global > local > MTL (table 1)",
        "error at or below local and below global",
        "odd-even",
        {"global": 0.01, "local": 0.01, "learned": 0.03},
    ),
)
