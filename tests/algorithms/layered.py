"""Problems with hidden layers, and what Federated Dropout makes of them."""

import dataclasses

import torch
from torch import nn

from fedmq.algorithms.base import Payload, Result, Task
from tests.algorithms.tiny import Tiny, client


class Hidden(Tiny):
    """A hidden layer of units enough to do without some."""

    def module(self):
        return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))


class Pair(Tiny):
    """Two hidden units: weights and biases are 0 to 3, 4 and 5, 6 to 9, and 10 and 11."""

    def module(self):
        return nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))


class Images(Tiny):
    """A convolution with a BatchNorm; all examples are small images."""

    def module(self):
        return nn.Sequential(
            nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
        )

    def points(self, seed, n):
        examples = super().points(seed, n)
        return dataclasses.replace(
            examples, x=examples.x[:, [0, 0, 0, 1, 1, 1, 0, 1, 0]].view(-1, 1, 3, 3)
        )


class Mixing(Tiny):
    """A layer that cannot be cut."""

    def module(self):
        return nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def task_for(algorithm, state, index, reply="update"):
    return Task(state.version, algorithm.task(state, index), reply)


def trained(algorithm, problem, state, index, reply="update"):
    task = task_for(algorithm, state, index, reply)
    return algorithm.train(task, client(problem, index)).payload


def units_of(algorithm, state, index, version=None):
    """Return which hidden units a client's sub-model has, from where its weights lie."""
    at = algorithm._index(state.parts, state.version if version is None else version, index)
    name = state.parts.hidden[0].name
    (slot,) = (each for each in state.layout.weights if each.name == f"{name}.bias")
    return [int(each) - slot.start for each in at if slot.start <= each < slot.start + slot.size]


def sent(state, value, index, version=0, **numbers):
    """Return a result whose weights are all one number."""
    vector = torch.full((state.parts.small.dim,), float(value))
    about = {"n": 1, "reply": "update", "version": version, "client": index, **numbers}
    exact = state.layout.counter_views(state.counters)
    return Payload(state.parts.small.views(vector), exact, about)


def commit(algorithm, schedule, state, results):
    """Return the version that (result, n, staleness) make under a schedule."""
    gathered, total = algorithm.new_accumulator(state), 0.0
    for result, n, staleness in results:
        weight = schedule.weight(n, staleness)
        gathered = algorithm.accumulate(gathered, state, Result(0, 0, result, 1), weight)
        total += weight
    return algorithm.commit(state, gathered, schedule.divisor(total, len(results)))


def holder_of(algorithm, state, unit, *, but=()):
    """Return a client whose sub-model has this unit."""
    return next(
        index
        for index in range(1, state.clients)
        if unit in units_of(algorithm, state, index) and index not in but
    )
