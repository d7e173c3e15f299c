"""Small problems to distill on, and distillation on them without a network."""

import numpy as np
import torch
from torch import nn

from fedmq.algorithms.base import Client, Payload, Result, Task
from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.problems.image import ImageClassification
from fedmq.algorithms.problems.models import MODELS
from fedmq.algorithms.rng import derive_seed
from tests.algorithms.tiny import Tiny

CLASSES = 3


class Blobs(Tiny):
    """Three labels of points around the corners of a triangle; client 0 has no label 2."""

    shape = (2,)
    classes = CLASSES

    def module(self):
        return nn.Linear(2, CLASSES)

    def points(self, seed, n, labels=CLASSES):
        source = torch.Generator().manual_seed(seed)
        y = torch.arange(n) % labels
        corners = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
        return Examples(corners[y] + torch.randn(n, 2, generator=source), y)

    def client(self, index):
        return self.points(100 + index, 9 + 3 * index, CLASSES - 1 if index == 0 else CLASSES)


class Pictures(Blobs):
    """Images of 6 x 6, for models by name."""

    shape = (1, 6, 6)

    def module(self):
        return MODELS["mlp"](self.shape, CLASSES)

    def points(self, seed, n, labels=CLASSES):
        source = torch.Generator().manual_seed(seed)
        y = torch.arange(n) % labels
        return Examples(torch.randn(n, *self.shape, generator=source) + y.view(-1, 1, 1, 1), y)


class Scarce(Blobs):
    """mnist-mini: so many images each, IID, but of three labels a device keeps only ``keep``."""

    shape, classes = (1, 28, 28), 10

    def __init__(self, clients=4, each=300, keep=5, seed=0, tests=500, model="mlp-elu"):
        self.clients, self.seed = clients, seed
        self.whole = ImageClassification("mnist-mini", model, 1, "iid", seed)
        data, rng = self.whole.client(0), np.random.default_rng(seed)
        order, self.parts, self.targets = rng.permutation(len(data)), [], []
        for k in range(clients):
            part = order[k * each : (k + 1) * each]
            targets, y = rng.permutation(10)[:3], data.y[part].numpy()
            kept = np.ones(each, bool)
            for label in targets:
                kept[np.flatnonzero(y == label)[keep:]] = False
            rows = torch.from_numpy(part[kept])
            self.targets.append(sorted(targets.tolist()))
            self.parts.append(Examples(data.x[rows], data.y[rows]))
        test = self.whole.test()
        self.tests = Examples(test.x[:tests], test.y[:tests])

    def module(self):
        return self.whole.model()

    def client(self, index):
        return self.parts[index]

    def test(self):
        return self.tests


def client(problem, index=0, local=None, seed=7):
    return Client(index, problem, problem.client(index), local, seed)


def first_task(algorithm, problem, index=0):
    return Task(0, algorithm.task(algorithm.start(problem), index))


def report(means, counts, n=5, **others):
    logits = {"logits": torch.as_tensor(means).float(), "counts": torch.as_tensor(counts)}
    return Payload(numbers={"n": n}, logits=logits, **others)


def rounds(algorithm, problem, count, seed=0):
    """Return the state and what each device keeps, after rounds of all of them."""
    state, locals_ = algorithm.start(problem), [None] * problem.clients
    for version in range(count):
        gathered = algorithm.new_accumulator(state)
        for k in range(problem.clients):
            at = client(problem, k, locals_[k], derive_seed(seed, "task", version, k))
            trained = algorithm.train(Task(version, algorithm.task(state, k)), at)
            result, locals_[k] = trained.payload, trained.local_state
            algorithm.accumulate(gathered, state, Result(k, 0, result, 1), 1.0)
        state = algorithm.commit(state, gathered, 1.0)
    return state, locals_


def accuracy(algorithm, problem, count, seed=0):
    """Return the devices' mean accuracy on the whole test set."""
    state, locals_ = rounds(algorithm, problem, count, seed)
    return np.mean(
        [
            algorithm.evaluate_client(
                Task(count, algorithm.evaluation_task(state, k)), client(problem, k, locals_[k])
            )["accuracy"]
            for k in range(problem.clients)
        ]
    )


def absorbed(algorithm, state, reports):
    gathered = algorithm.new_accumulator(state)
    for device, payload in reports.items():
        algorithm.accumulate(gathered, state, Result(device, 0, payload, 1), 1.0)
    return algorithm.commit(state, gathered, 1.0)
