"""pFedHN on mnist-mini: what it is for, in seconds."""

import numpy as np
import pytest
import torch
from torch import nn

from fedmq.algorithms.base import Client, Result, Task
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.pfedhn.algorithm import PFedHN
from fedmq.algorithms.problems.image import ImageClassification
from fedmq.algorithms.rng import derive_seed
from fedmq.algorithms.toolkit.sgd import load_model, metrics_on

pytestmark = pytest.mark.slow

TASKS, SEED = 150, 1


class Small(ImageClassification):
    """Images of 14x14 and 32 hidden units, 6,634 weights: a task takes milliseconds."""

    def model(self):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return nn.Sequential(
                nn.AvgPool2d(2), nn.Flatten(), nn.Linear(196, 32), nn.ReLU(), nn.Linear(32, 10)
            )


@pytest.fixture(scope="module")
def problem():
    """Ten clients with two digits each, 500 images."""
    return Small("mnist-mini", "mlp", 10, "classes(2)", SEED)


def run(algorithm, problem, tasks=TASKS):
    """Return the state after a number of tasks, one client a round, and the local states."""
    rng = np.random.default_rng(SEED)
    state, local = algorithm.start(problem), {}
    for turn in range(tasks):
        k = int(rng.integers(problem.clients))
        seed = derive_seed(SEED, "task", turn, k)
        client = Client(k, problem, problem.client(k), local.get(k), seed)
        trained = algorithm.train(Task(turn, algorithm.task(state, k)), client)
        result, local[k] = trained.payload, trained.local_state
        gathered = algorithm.accumulate(
            algorithm.new_accumulator(state), state, Result(k, 0, result, 1), 1.0
        )
        state = algorithm.commit(state, gathered, 1.0)
    return state, local


def personal(problem, tasks=TASKS, **options):
    """Return the mean accuracy of pFedHN on the clients' own test data."""
    algorithm = PFedHN(batches=24, **options)
    state, local = run(algorithm, problem, tasks)
    found = []
    for k in range(problem.clients):
        client = Client(k, problem, problem.client(k), local.get(k), 0)
        found.append(algorithm.evaluate_client(Task(0, algorithm.task(state, k)), client))
    return np.mean([each["accuracy"] for each in found])


def averaged(problem):
    """Return the same of FedAvg, with the same local training: 3 epochs of 8 batches."""
    algorithm = FedAvg(lr=5e-3, momentum=0.9, weight_decay=5e-5, epochs=3, batch_size=64)
    state, _ = run(algorithm, problem)
    model, _ = load_model(Task(0, algorithm.task(state, 0)), problem, "cpu")
    tests = [problem.client_test(k) for k in range(problem.clients)]
    return np.mean([metrics_on(model.module, problem, test, "cpu")["accuracy"] for test in tests])


def test_pfedhn_is_at_least_5_points_above_fedavg_on_two_class_clients(problem):
    """At equal tasks and bytes; pFedHN-PC, which sends less, after half of the tasks already."""
    fedavg = averaged(problem)
    assert personal(problem) >= fedavg + 0.05
    assert personal(problem, TASKS // 2, personal_classifier=True) >= fedavg + 0.05
