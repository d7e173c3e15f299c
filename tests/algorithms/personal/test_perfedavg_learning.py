"""Per-FedAvg learns what it is for: HF above FO above FedAvg with an update, on real digits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedmq.algorithms.base import Client, Result, Task
from fedmq.algorithms.personal.perfedavg import PerFedAvg
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.problems.image import ImageClassification
from fedmq.algorithms.rng import derive_rng, derive_seed

pytestmark = pytest.mark.slow

CLIENTS, COHORT, ROUNDS, SEED = 20, 5, 50, 1
LAST = 10
"""Single rounds differ by a point."""


class SmallDigits(Problem):
    """The paper's split of mnist-mini at 7x7 pixels, and a small network with its ELU."""

    clients = CLIENTS

    def __init__(self):
        whole = ImageClassification("mnist-mini", "mlp-elu", CLIENTS, "fallah(30)", SEED)
        self.train = [self.small(whole.client(index)) for index in range(CLIENTS)]
        self.tests = [self.small(whole.client_test(index)) for index in range(CLIENTS)]

    def small(self, data):
        return Examples(F.avg_pool2d(data.x, 4).flatten(1), data.y)

    def model(self):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(SEED)
            return nn.Sequential(nn.Linear(49, 30), nn.ELU(), nn.Linear(30, 10))

    def client(self, index):
        return self.train[index]

    def client_test(self, index):
        return self.tests[index]

    def test(self):
        raise NotImplementedError

    def loss(self, outputs, y):
        return F.cross_entropy(outputs, y)

    def metrics(self, outputs, y):
        accuracy = (outputs.argmax(dim=1) == y).float().mean().item()
        return {"loss": self.loss(outputs, y).item(), "accuracy": accuracy}


def learned(problem, variant):
    """Return the clients' metrics after each of the last `LAST` rounds, averaged over all."""
    algorithm = PerFedAvg(variant=variant, inner_lr=0.2, lr=0.1, steps=5, batch_size=20)
    state = algorithm.start(problem)
    found = []

    def client(index, *what):
        seed = derive_seed(SEED, *what, index)
        return Client(index, problem, problem.client(index), None, seed)

    for version in range(ROUNDS):
        cohort = derive_rng(SEED, "cohort", version).permutation(CLIENTS)[:COHORT]
        gathered = algorithm.new_accumulator(state)
        for index in sorted(cohort.tolist()):
            task = Task(version, algorithm.task(state, index))
            result = algorithm.train(task, client(index, "train", version)).payload
            gathered = algorithm.accumulate(gathered, state, Result(index, 0, result, 1), 1.0)
        state = algorithm.commit(state, gathered, float(COHORT))
        if version >= ROUNDS - LAST:
            for index in range(CLIENTS):
                task = Task(version + 1, algorithm.evaluation_task(state, index))
                found.append(algorithm.evaluate_client(task, client(index, "evaluation")))
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


@pytest.fixture(scope="module")
def metrics():
    problem = SmallDigits()
    return {variant: learned(problem, variant) for variant in ("hf", "fo", "fedavg")}


def test_hf_is_above_fo_and_fo_above_fedavg_with_an_update(metrics):
    accuracy = {variant: each["accuracy"] for variant, each in metrics.items()}
    assert accuracy["hf"] > accuracy["fo"] + 0.005
    assert accuracy["fo"] > accuracy["fedavg"] + 0.005
    loss = {variant: each["loss"] for variant, each in metrics.items()}
    assert loss["hf"] < 0.95 * loss["fo"]
    assert loss["fo"] < 0.7 * loss["fedavg"]


def test_what_is_learned_is_a_start_and_one_step_makes_it_a_model(metrics):
    for each in metrics.values():
        assert each["accuracy"] > each["accuracy_before"] + 0.2
