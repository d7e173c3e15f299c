"""A problem whose devices lack labels, and FAug on it without a network."""

import numpy as np
import torch

from fedmq.algorithms.base import Client, Result, Task
from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.rng import derive_seed
from tests.algorithms.distilling import Pictures

TINY = {"gan_steps": 2, "gan_batch": 4, "gan_widths": (4, 4, 4), "seed": 1}


class Skewed(Pictures):
    """Images of 6 x 6: device k has 12 of each of three labels, but only two of label k."""

    def client(self, index):
        data = self.points(100 + index, 36)
        keep = torch.ones(36, dtype=torch.bool)
        keep[(data.y == index).nonzero()[2:, 0]] = False
        return Examples(data.x[keep], data.y[keep])


class Run:
    """Rounds of an algorithm, of all devices or of those who are there."""

    def __init__(self, algorithm, problem, seed=0):
        self.algorithm, self.problem, self.seed = algorithm, problem, seed
        self.state, self.version = algorithm.start(problem), 0
        self.locals = [None] * problem.clients
        self.phases, self.examples = [], {}

    def at(self, k):
        seed = derive_seed(self.seed, "task", self.version, k)
        return Client(k, self.problem, self.problem.client(k), self.locals[k], seed)

    def round(self, devices=None):
        """One round; return what was sent up, by device."""
        devices = range(self.problem.clients) if devices is None else devices
        gathered, total, sent = self.algorithm.new_accumulator(self.state), 0, {}
        for k in devices:
            task = Task(self.version, self.algorithm.task(self.state, k))
            self.phases.append((k, task.payload.numbers.get("phase")))
            trained = self.algorithm.train(task, self.at(k))
            sent[k], self.locals[k] = trained.payload, trained.local_state
            n = self.examples[k] = trained.num_examples
            gathered = self.algorithm.accumulate(
                gathered, self.state, Result(k, 0, sent[k], 1), float(n)
            )
            total += n
        self.state = self.algorithm.commit(self.state, gathered, float(total))
        self.version += 1
        return sent

    def rounds(self, count):
        for _ in range(count):
            self.round()
        return self

    def metrics(self):
        """Return the devices' mean of each metric."""
        found = []
        for k in range(self.problem.clients):
            task = Task(self.version, self.algorithm.evaluation_task(self.state, k))
            found.append(self.algorithm.evaluate_client(task, self.at(k)))
        return {name: np.mean([each[name] for each in found]) for name in found[0]}
