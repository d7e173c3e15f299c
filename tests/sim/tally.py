"""A problem and an algorithm so small that a history takes milliseconds, and still tells.

A client's result depends on its task and on what it kept from the last one, so a task that
was trained twice, or a local state that was lost, changes the model.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from fedmq.algorithms.base import Payload, TrainResult
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.problems.base import Examples, Problem


@dataclass(frozen=True)
class Vector(Problem):
    dim: int = 40
    clients: int = 4
    seed: int = 0

    def model(self):
        module = nn.Module()
        module.vector = nn.Parameter(torch.linspace(-1.0, 1.0, self.dim))
        return module

    def client(self, index):
        return Examples(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))

    def test(self):
        return self.client(0)

    def loss(self, outputs, y):
        return outputs.sum()

    def metrics(self, outputs, y):
        return {}

    def metric_range(self, name):
        return 0.0, math.inf  # an "accuracy" counts tasks, see `BesideTally`


@dataclass(frozen=True)
class Tally(FedAvg):
    """A result is a multiple of the model: by client, and by how many tasks it has done."""

    def train(self, task, client):
        done = 1 + (client.local.numbers["tasks"] if client.local else 0)
        weights = task.payload.weights["vector"] * (0.01 * (client.index + 1) * done)
        payload = Payload({"vector": weights}, {}, {"reply": task.reply, "tasks": done})
        return TrainResult(payload, client.index + 1, Payload(numbers={"tasks": done}))

    def evaluate(self, task, problem, device):
        return {"accuracy": 0.0}


@dataclass(frozen=True)
class BesideTally(Tally):
    """Its versions are made beside the inbox, and evaluated by clients with what they keep."""

    commits_in_background = True
    evaluated_by = "clients"

    def evaluate_client(self, task, client):
        done = client.local.numbers["tasks"] if client.local else 0
        return {"accuracy": float(task.payload.weights["vector"].abs().mean()) + done}
