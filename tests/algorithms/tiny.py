"""Problems small enough to check by hand, and clients to train on them."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from fedmq.algorithms.base import Client, Payload, Result, Task
from fedmq.algorithms.fedavg import FedAvg, model_payload
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.toolkit.results import read_result


class Tiny(Problem):
    """Two classes of points in the plane and a linear model; client k has 2 + 4k points."""

    def __init__(self, clients=2, seed=0):
        self.clients = clients
        self.seed = seed

    def module(self):
        return nn.Linear(2, 2)

    def model(self):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return self.module()

    def points(self, seed, n):
        x = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
        return Examples(x, (x[:, 0] + x[:, 1] > 0).long())

    def client(self, index):
        return self.points(100 + index, 2 + 4 * index)

    def test(self):
        return self.points(99, 40)

    def loss(self, outputs, y):
        return F.cross_entropy(outputs, y)

    def metrics(self, outputs, y):
        accuracy = (outputs.argmax(dim=1) == y).float().mean().item()
        return {"loss": self.loss(outputs, y).item(), "accuracy": accuracy}


class Normed(Tiny):
    """With a BatchNorm: running statistics, and a counter."""

    def module(self):
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


class Dropping(Tiny):
    """With dropout, so that training draws from torch's own generator."""

    def module(self):
        return nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2))


class HalfFrozen(Tiny):
    """Its bias is not trained."""

    def module(self):
        module = nn.Linear(2, 2)
        module.bias.requires_grad_(requires_grad=False)
        return module


@dataclass
class Plain(Tiny):
    """As a user writes a problem: a dataclass, which Python gives no hash."""

    clients: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Counting(FedAvg):
    """Each client counts its tasks, and keeps the model that it left off with."""

    name = "counting"

    def train(self, task, client):
        trained = super().train(task, client)
        before = client.local.exact["tasks"] if client.local else torch.zeros(1, dtype=torch.int64)
        kept = dict(trained.payload.weights)
        local = Payload(kept, {"tasks": before + 1}, {"last": task.version})
        return replace(trained, local_state=local)


def client(problem, index=0, seed=7, local=None):
    """Return a client of a problem."""
    return Client(index, problem, problem.client(index), local, seed)


def task(state, version=0, reply="update"):
    """Return the task for a state of the model."""
    return Task(version, model_payload(state), reply)


@dataclass(frozen=True)
class Beside(FedAvg):
    """Its versions are made beside the inbox, and evaluated by each client."""

    commits_in_background = True
    evaluated_by = "clients"

    def evaluate_client(self, task, client):
        return {"accuracy": (1 + client.index) / 10, "n": float(len(client.data))}


def payload(state, vector, counters=None, **numbers):
    """Return a result whose weights, end to end, are ``vector`` (or all one number)."""
    vector = torch.as_tensor(vector, dtype=torch.float32).expand(state.layout.dim).contiguous()
    counters = state.counters if counters is None else torch.as_tensor(counters)
    return Payload(state.layout.views(vector), state.layout.counter_views(counters), numbers)


def change(layout, result):
    """Return what a result changes, float32 [dim], in the order of the weights."""
    counters = torch.zeros(sum(slot.size for slot in layout.counters), dtype=torch.int64)
    vector = torch.zeros(layout.dim)
    for start, block in read_result(layout, result, counters):
        vector[start : start + len(block)] = block
    return vector


def one_round(algorithm, problem, state, seed=7):
    """Return the state after a round of all clients, weighted by their examples."""
    gathered, total = algorithm.new_accumulator(state), 0
    for index in range(problem.clients):
        trained = algorithm.train(task(state), client(problem, index, seed))
        n = trained.num_examples
        result = Result(0, 0, trained.payload, n)
        gathered = algorithm.accumulate(gathered, state, result, float(n))
        total += n
    return algorithm.commit(state, gathered, float(total))
