"""Small problems for Per-FedAvg, its steps by autograd, and what its clients make."""

import torch
import torch.nn.functional as F
from torch import nn

from fedmq.algorithms.base import Task
from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.rng import derive_rng
from tests.algorithms.tiny import Tiny, change, client, task

VARIANTS = ["fo", "hf", "fedavg"]


class Local(Tiny):
    """Clients have test points of their own, and a smooth hidden layer to bend the loss."""

    def module(self):
        return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2))

    def client(self, index):
        return self.points(100 + index, 30)

    def client_test(self, index):
        return self.points(500 + index, 20)


class Watched(Local):
    """Keeps the points that go through the model, and whether a gradient was taken there."""

    def __init__(self, clients=2, seed=0):
        super().__init__(clients, seed)
        self.seen, self.points_trained = [], []

    def loss(self, outputs, y):
        loss = super().loss(outputs, y)
        if outputs.requires_grad:
            self.seen.append(len(y))
        return loss

    def module(self):
        module = super().module()
        module.register_forward_pre_hook(self.keep)
        return module

    def keep(self, module, inputs):
        if torch.is_grad_enabled():
            self.points_trained.append(inputs[0])


def draw(data, size, rng):
    """Return a batch as the client draws it."""
    chosen = torch.from_numpy(rng.choice(len(data), size, replace=False))
    return Examples(data.x[chosen], data.y[chosen])


def f(v, batch):
    """Return the loss of `Local`'s model with the parameters v, float32 [32]."""
    first, bias, second, last = v.split([12, 6, 12, 2])
    hidden = torch.tanh(batch.x @ first.view(6, 2).T + bias)
    return F.cross_entropy(hidden @ second.view(2, 6).T + last, batch.y)


def grad(v, batch):
    v = v.detach().requires_grad_()
    return torch.autograd.grad(f(v, batch), v)[0]


def product(v, u, batch):
    """Return Hess(v; D) u, by autograd."""
    v = v.detach().requires_grad_()
    (first,) = torch.autograd.grad(f(v, batch), v, create_graph=True)
    return torch.autograd.grad(first @ u, v)[0]


def by_autograd(algorithm, at, start):
    """Return Algorithm 1's tau local steps, with the exact Hessian for ``hf``."""
    v, rng = start.clone(), derive_rng(at.seed, "batches")
    for _ in range(algorithm.steps):
        one, two = (draw(at.data, algorithm.batch_size, rng) for _ in range(2))
        z = v - algorithm.inner_lr * grad(v, one)
        u = grad(z, two)
        if algorithm.variant == "hf":
            three = draw(at.data, algorithm.batch_size, rng)
            u = u - algorithm.inner_lr * product(v, u, three)
        v = v - algorithm.lr * u
    return v


def update(algorithm, problem, index=0, seed=7, reply="update", state=None):
    """Return what a client sends, as one vector, and its numbers."""
    state = algorithm.start(problem) if state is None else state
    trained = algorithm.train(task(state, reply=reply), client(problem, index, seed))
    result, local = trained.payload, trained.local_state
    assert local is None
    return change(state.layout, result), result.numbers


def evaluated(algorithm, problem, index=0, seed=3, state=None):
    state = algorithm.start(problem) if state is None else state
    examined = Task(0, algorithm.evaluation_task(state, index))
    return algorithm.evaluate_client(examined, client(problem, index, seed))
