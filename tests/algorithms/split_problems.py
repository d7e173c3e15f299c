"""Problems whose model has a body and a head, and whose clients have test data of their own."""

import torch
from torch import nn

from fedmq.algorithms.base import Result, Task
from tests.algorithms.tiny import Tiny, client

BODY, HEAD = ("0.weight", "0.bias"), ("2.weight", "2.bias")


class Halves(Tiny):
    """Eight hidden units are the body's; weights of the head are 2.weight and 2.bias."""

    def module(self):
        return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))

    def client_test(self, index):
        return self.points(500 + index, 20)


class Tracking(Halves):
    """With a BatchNorm on either side of the cut between fc1 and fc2, and dropout in the body."""

    def module(self):
        return nn.Sequential(
            nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2),
        )  # fmt: skip

    def client(self, index):
        return self.points(100 + index, 8 + 4 * index)


class NoSequence(Halves):
    """A model that nobody can say the last layer of."""

    def module(self):
        return nn.Linear(2, 2)


class Tied(Halves):
    """Its two layers have one weight."""

    def module(self):
        module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        module[2].weight = module[0].weight
        return module


def task_of(algorithm, state, reply="update", version=0):
    return Task(version, algorithm.task(state, 0), reply)


def head_of(problem, names=HEAD):
    """Return the first head of a problem, by name."""
    tensors = problem.model().state_dict()
    return {name: tensors[name] for name in names}


def same(one, other):
    """Tell whether two groups of tensors are equal to the bit."""
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def play(algorithm, problem, rounds, seed=0, keep=None):
    """Run rounds of all clients; return the state and what the clients keep."""
    state, keep = algorithm.start(problem), dict(keep or {})
    for version in range(rounds):
        gathered, total = algorithm.new_accumulator(state), 0.0
        for index in range(problem.clients):
            at = client(problem, index, seed=1000 * seed + 10 * version + index)
            at = type(at)(**{**vars(at), "local": keep.get(index)})
            trained = algorithm.train(task_of(algorithm, state, version=version), at)
            result, keep[index] = trained.payload, trained.local_state
            n = float(trained.num_examples)
            gathered = algorithm.accumulate(gathered, state, Result(index, 0, result, 1), n)
            total += n
        state = algorithm.commit(state, gathered, total)
    return state, keep


def trained(algorithm, problem, index=0, local=None, reply="update", seed=7):
    at = client(problem, index, seed, local)
    trained = algorithm.train(task_of(algorithm, algorithm.start(problem), reply), at)
    return trained.payload, trained.local_state
