"""Problems and algorithms of these tests; nodes name them ``chaos_models:Vector`` and so on."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedmq.algorithms.base import Client, Payload, Task, TrainResult
from fedmq.algorithms.fedavg import Accumulator, FedAvg, ModelState
from fedmq.algorithms.problems.base import Examples, Problem


@dataclass(frozen=True)
class Vector(Problem):
    """A model that is one vector, and no data to speak of."""

    dim: int
    seed: int
    clients: int = 2

    def model(self) -> nn.Module:
        module = nn.Module()
        generator = torch.Generator().manual_seed(self.seed)
        module.vector = nn.Parameter(torch.randn(self.dim, generator=generator))
        return module

    def client(self, index: int) -> Examples:
        return Examples(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))

    def test(self) -> Examples:
        return self.client(0)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        return outputs.sum()

    def metrics(self, outputs: Tensor, y: Tensor) -> Mapping[str, float]:
        return {}


class Unseeded(Vector):
    """Its model has other values at each call."""

    def model(self) -> nn.Module:
        module = nn.Module()
        generator = torch.Generator()
        generator.seed()
        module.vector = nn.Parameter(torch.randn(self.dim, generator=generator))
        return module


class Unlike(Vector):
    """Its model has other values in each process."""

    def model(self) -> nn.Module:
        return Vector(self.dim, os.getpid()).model()


@dataclass(frozen=True)
class Echo(FedAvg):
    """Clients return the model that they receive; the server makes a new one of the mean.

    rest_at, rest_s: from version rest_at on, a task takes rest_s seconds.
    hold_s: seconds for which each task holds the GIL, as a badly written extension would.
    """

    rest_at: int = 0
    rest_s: float = 0.0
    hold_s: float = 0.0

    def commit(self, state: ModelState, gathered: Accumulator, divisor: float) -> ModelState:
        mean = gathered.total.mul_(1.0001 / divisor)
        return ModelState(state.layout, mean, gathered.counters)

    def train(self, task: Task, client: Client) -> TrainResult:
        if self.rest_s and task.version >= self.rest_at:
            time.sleep(self.rest_s)
        if self.hold_s:
            hold_the_gil(self.hold_s)
        return TrainResult(Payload(task.payload.weights, task.payload.exact), 1)

    def evaluate(self, task: Task, problem: Problem, device: str) -> Mapping[str, float]:
        return {"accuracy": 0.0}


@dataclass(frozen=True)
class Paced(FedAvg):
    """FedAvg whose every task takes a little longer, so that runs are as fast on any host."""

    epochs: int = 1
    momentum: float = 0.0
    pause_s: float = 0.0

    def train(self, task: Task, client: Client) -> TrainResult:
        time.sleep(self.pause_s)
        return super().train(task, client)


def hold_the_gil(seconds: float) -> None:
    """Let no other Python thread of this process run: PyDLL's calls do not let go of the GIL."""
    ctypes.PyDLL(None).usleep(round(seconds * 1e6))
