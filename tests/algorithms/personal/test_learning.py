"""FedRep, FedAvg + fine-tuning and local training on clients with five classes each."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedmq.algorithms.base import Client, Result, Task
from fedmq.algorithms.personal.fedavg_finetune import FedAvgFT, LocalOnly
from fedmq.algorithms.personal.fedrep import FedRep
from fedmq.algorithms.problems import load_problem
from fedmq.algorithms.problems.base import Problem
from fedmq.algorithms.rng import derive_rng, derive_seed

pytestmark = pytest.mark.slow

CLIENTS, COHORT, ROUNDS = 20, 10, 15
SGD = {"lr": 0.1, "batch_size": 20, "momentum": 0.0}
ONE_EPOCH = {**SGD, "epochs": 1}


class Digits(Problem):
    """Digits at a quarter of their size; a client has 60 to 100 of five classes.

    renamed: every client has names of its own for the classes, so that no head suits two.
    """

    def __init__(self, *, renamed):
        self.clients = CLIENTS
        options = {"name": "mnist-mini", "clients": CLIENTS, "partition": "classes(5, 60, 100)"}
        self.digits = load_problem(options, seed=0)
        self.renamed = renamed
        self.parts = {}

    def model(self):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return nn.Sequential(nn.Linear(196, 32), nn.ReLU(), nn.Linear(32, 10))

    def client(self, index):
        return self.part("client", index)

    def client_test(self, index):
        return self.part("client_test", index)

    def part(self, which, index):
        if (which, index) not in self.parts:
            found = getattr(self.digits, which)(index)
            names = np.arange(10)
            if self.renamed:
                names = derive_rng(0, "names", index).permutation(10)
            x = F.avg_pool2d(found.x, 2).flatten(1)
            y = torch.from_numpy(names)[found.y]
            self.parts[which, index] = dataclasses.replace(found, x=x, y=y)
        return self.parts[which, index]

    def test(self):
        raise NotImplementedError

    def loss(self, outputs, y):
        return self.digits.loss(outputs, y)

    def metrics(self, outputs, y):
        return self.digits.metrics(outputs, y)


def accuracy(algorithm, problem, seed=0):
    """Return the mean of all clients' local test accuracies after the rounds."""
    state, kept = algorithm.start(problem), {}
    for version in range(ROUNDS):
        gathered, total = algorithm.new_accumulator(state), 0.0
        task = Task(version, algorithm.task(state, 0))
        for index in derive_rng(seed, "cohort", version).choice(CLIENTS, COHORT, replace=False):
            k, own = int(index), derive_seed(seed, "task", version, int(index))
            at = Client(k, problem, problem.client(k), kept.get(k), own)
            trained = algorithm.train(task, at)
            result, kept[k] = trained.payload, trained.local_state
            n = trained.num_examples
            gathered = algorithm.accumulate(gathered, state, Result(k, 0, result, 1), float(n))
            total += n
        state = algorithm.commit(state, gathered, total)
    task = Task(ROUNDS, algorithm.evaluation_task(state, 0))
    found = [
        algorithm.evaluate_client(
            task, Client(k, problem, problem.client(k), kept.get(k), derive_seed(seed, "score", k))
        )["accuracy"]
        for k in range(CLIENTS)
    ]
    return sum(found) / CLIENTS


def test_fedrep_beats_finetuning_and_local_training_where_heads_differ():
    """What it assumes: one representation, a head for each client. 85.8; 83.8, 76.8, 83.2."""
    problem = Digits(renamed=True)
    rep = accuracy(FedRep(head_epochs=4, **ONE_EPOCH), problem)
    assert rep >= accuracy(FedAvgFT(**ONE_EPOCH), problem) + 0.01
    assert rep >= accuracy(FedAvgFT(head=1, **ONE_EPOCH), problem) + 0.05
    assert rep >= accuracy(LocalOnly(epochs=5, **SGD), problem) + 0.01


def test_fedrep_is_above_local_training_and_near_finetuning_where_one_head_suits_all():
    """Digits mean the same to everyone: a common head is no handicap. 86.8; 84.2, 87.2."""
    problem = Digits(renamed=False)
    rep = accuracy(FedRep(head_epochs=4, **ONE_EPOCH), problem)
    assert rep >= accuracy(LocalOnly(epochs=5, **SGD), problem) + 0.01
    assert rep >= accuracy(FedAvgFT(**ONE_EPOCH), problem) - 0.02
