"""What the tests of trainers train: problems that draw and fail, and tasks of each kind."""

import os
import random
import signal
import time

import numpy as np
import torch

from fedmq.algorithms.base import Task
from fedmq.algorithms.problems.base import Examples
from fedmq.nodes.messages.payloads import RAW, pack
from fedmq.nodes.run.config import build
from fedmq.nodes.run.setup import set_up
from fedmq.nodes.simulation.training_jobs import Recipe
from fedmq.nodes.worker.core import Evaluate, Train, Trained
from fedmq.nodes.worker.training import compute
from tests.algorithms.tiny import Tiny

HERE = "tests.nodes.simulation.training"

STATEFUL = {"name": "fedrep", "head_epochs": 1, "final_head_epochs": 1}
CASES = {
    "plain": {},
    "stateful": {"algorithm": STATEFUL, "problem": {"name": f"{HERE}:Headed"}},
    "structured": {"codec": {"up": "limit(0) | lowrank(1)"}},
}


class Drawing(Tiny):
    """Data and metrics that draw from the global generators, as augmentation does."""

    def client(self, index):
        data = super().client(index)
        drawn = random.random() + np.random.random() + torch.rand(()).item()  # noqa: NPY002, S311
        return Examples(data.x + drawn, data.y)

    def client_test(self, index):
        return self.points(200 + index, 5 + index)

    def metrics(self, outputs, y):
        return {**super().metrics(outputs, y), "drawn": torch.rand(()).item()}


class Headed(Drawing):
    """With a body below the last layer."""

    def module(self):
        return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))


class Failing(Tiny):
    """Each client's data fail in another way."""

    def client(self, index):
        match index:
            case 0:
                raise ValueError("photo\udc80.png has no examples")
            case 1:
                raise KeyboardInterrupt
            case 2:
                raise SystemExit(3)
            case 3:
                return Examples(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
            case 4:
                os._exit(3)
            case 5:
                os.kill(os.getpid(), signal.SIGKILL)
            case 7:
                time.sleep(60)
        return super().client(index)

    def metrics(self, outputs, y):
        return {"loss": 0.0, "accuracy": None}


def setup_of(case="plain", **tables):
    """Return the objects of a run of one of the `CASES`."""
    given = {
        "run": {"evaluate_every": 0},
        "problem": {"name": f"{HERE}:Drawing", "clients": 8},
        "algorithm": {"name": "fedavg", "epochs": 1},
        "schedule": {"name": "rounds"},
    }
    for name, table in [*CASES.get(case, {}).items(), *tables.items()]:
        given[name] = {**given.get(name, {}), **table}
    return set_up(build(given))


def recipe_of(setup):
    return Recipe(setup.config.to_toml(), setup.config.allowed)


def actions_of(setup):
    """Return one task of each kind, for different clients; tasks with a local state last."""
    algorithm, problem = setup.algorithm, setup.problem
    state = algorithm.start(problem)
    first = [
        Train(k, Task(k, algorithm.task(state, k), "model"), None, 7 + k, 9 + k) for k in range(4)
    ]
    found: list[Train | Evaluate] = [*first]
    if algorithm.evaluated_by == "model":
        found.append(Evaluate(Task(1, algorithm.evaluation_task(state)), seed=3))
        return found
    for train in first[:2]:
        done = compute(train, setup, "cpu")
        k = train.client
        again = Task(5, algorithm.task(state, k))
        found.append(Train(k, again, done.local, 17 + k, 19 + k))
        found.append(Evaluate(Task(5, algorithm.evaluation_task(state, k)), k, done.local, 3))
    found.append(Evaluate(Task(5, algorithm.evaluation_task(state, 6)), 6, None, 3))
    return found


def failing(client, **tables):
    """Return the set-up of `Failing`, and the task of a client."""
    setup = setup_of(problem={"name": f"{HERE}:Failing"}, **tables)
    payload = setup.algorithm.task(setup.algorithm.start(setup.problem), 0)
    return setup, Train(client, Task(0, payload), None, 7)


def bits(event):
    """Return everything in a result, comparable."""
    if isinstance(event, Trained):
        local = None if event.local is None else _bits(event.local)
        return _bits(event.payload), local, event.device
    return dict(event.metrics), event.device


def _bits(payload):
    packed = pack(payload, RAW, 0)
    return packed.body, [bytes(each) for each in packed.data]


def results(trainer, setup):
    """Return the bits of the tasks, which are asked for in the order in which they are due."""
    actions = actions_of(setup)
    waits = [trainer.start(action, float(due)) for due, action in enumerate(actions)]
    return [bits(wait()) for wait in waits]
