"""Small multi-task problems, and MOCHA on them without a network."""

import numpy as np
import torch

from fedmq.algorithms.base import Client, Result, Task
from fedmq.algorithms.mocha import dual
from fedmq.algorithms.mocha.algorithm import Mocha
from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.problems.federated_datasets import LinearTasks
from fedmq.algorithms.rng import derive_seed

LOSSES = ["hinge", "squared"]
SIGMA = np.array(
    [
        [0.30, 0.10, 0.20, -0.05, 0.01],
        [0.10, 0.25, 0.00, 0.15, 0.02],
        [0.20, 0.00, 0.20, -0.02, 0.00],
        [-0.05, 0.15, -0.02, 0.20, 0.03],
        [0.01, 0.02, 0.00, 0.03, 0.05],
    ]
)
"""Five tasks that help, and hinder, each other; its eigenvalues are above 0."""


class Points(LinearTasks):
    """Task k has 6 + 2k noisy points of three features; tasks k and k + 2 are alike.

    The task after the last has data, too.
    """

    dim = 3
    held_out = 1

    def __init__(self, clients=5, seed=0):
        self.clients, self.seed = clients, seed

    def points(self, index, n, seed):
        normal = np.random.default_rng((self.seed, index, seed)).standard_normal
        x = np.concatenate([normal((n, 2)), np.ones((n, 1))], axis=1)
        u = x @ np.array([[2.0, -1.0, 0.5], [-1.0, 2.0, 0.0]][index % 2]) + 0.7 * normal(n)
        return torch.from_numpy(x).float(), torch.from_numpy(u).float()

    def label(self, u):
        return (u > 0).long()

    def _parts(self, index):
        (x, u), (x_test, u_test) = self.points(index, 6 + 2 * index, 0), self.points(index, 40, 1)
        return Examples(x, self.label(u)), Examples(x_test, self.label(u_test))


class Heights(Points):
    """The same points with numbers as labels."""

    def label(self, u):
        return u

    def loss(self, outputs, y):
        return (outputs[:, 0] - y).square().mean() / 2

    def metrics(self, outputs, y):
        loss = self.loss(outputs, y).item()
        return {"loss": loss, "accuracy": 1 - 2 * loss}


PROBLEMS = {"hinge": Points, "squared": Heights}


class Federation:
    """The tasks of a problem, and a server; each chosen client trains.

    Attributes:
        state: newest version.
        locals: what each client keeps.
        alphas: [m] of the alpha that the server has counted.
    """

    def __init__(self, algorithm, problem, state=None, seed=0):
        self.algorithm, self.problem, self.seed = algorithm, problem, seed
        self.state = algorithm.start(problem) if state is None else state
        self.locals = [None] * problem.clients
        self.data = [algorithm._examples(problem.client(k)) for k in range(problem.clients)]
        self.alphas = [np.zeros(len(y)) for _, y in self.data]
        self.turn = 0

    def at(self, k):
        """Return where client k's half runs."""
        seed = derive_seed(self.seed, "turn", self.turn, k)
        return Client(k, self.problem, self.problem.client(k), self.locals[k], seed)

    def work(self, k, state=None):
        """Return client k's result for a version, and its alpha; it keeps what it made."""
        self.turn += 1
        state = self.state if state is None else state
        task = Task(state.version, self.algorithm.task(state, k))
        trained = self.algorithm.train(task, self.at(k))
        payload, self.locals[k] = trained.payload, trained.local_state
        return payload, self.locals[k].exact["alpha"].numpy()

    def round(self, who=None):
        """Commit a version from the results of some clients, or of all."""
        gathered = self.algorithm.new_accumulator(self.state)
        for k in range(self.problem.clients) if who is None else who:
            payload, alpha = self.work(k)
            gathered = self.algorithm.accumulate(
                gathered, self.state, Result(k, 0, payload, 1), 1.0
            )
            self.alphas[k] = alpha
        self.state = self.algorithm.commit(self.state, gathered, 1.0)

    @property
    def dual(self):
        """D, from every alpha."""
        return dual_of(self.algorithm, self.data, self.alphas, self.state.sigma)

    @property
    def primal(self):
        """P(W), with Omega as the inverse of Sigma."""
        w, loss = self.state.weights, dual.LOSSES[self.algorithm.loss]
        fit = sum(loss.value(x @ w[t], y).mean() for t, (x, y) in enumerate(self.data))
        omega = np.linalg.inv(self.state.sigma)
        return fit + self.algorithm.lam / 2 * np.trace(w.T @ omega @ w)

    def metrics(self):
        """Return the mean of all clients' metrics."""
        found = [
            self.algorithm.evaluate_client(
                Task(0, self.algorithm.evaluation_task(self.state, k)), self.at(k)
            )
            for k in range(self.problem.clients)
        ]
        return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def dual_of(algorithm, data, alphas, sigma):
    """D, written out."""
    b = np.array([x.T @ a / len(a) for (x, _), a in zip(data, alphas, strict=True)])
    if algorithm.loss == "hinge":
        won = [np.mean(y * a) for (_, y), a in zip(data, alphas, strict=True)]
    else:
        won = [np.mean(y * a - a * a / 2) for (_, y), a in zip(data, alphas, strict=True)]
    pairs = np.ndindex(*sigma.shape)
    return sum(won) - sum(sigma[s, t] * (b[s] @ b[t]) for s, t in pairs) / (2 * algorithm.lam)


def federation(loss="hinge", *, related=True, **options):
    """Return five tasks; at SIGMA for ever, unless they are not to be related."""
    algorithm = Mocha(loss=loss, **{"lam": 0.05, "inner": 10**6, **options})
    problem = PROBLEMS[loss]()
    start = algorithm.start(problem)
    state = algorithm._state(start.b, start.duals, SIGMA, 0) if related else None
    return Federation(algorithm, problem, state)


def combined(each):
    """Return B from all the alpha that the server has counted, [m, d]."""
    return np.array([x.T @ a / len(a) for (x, _), a in zip(each.data, each.alphas, strict=True)])
