"""Devices that keep models of their own, and train them by plain SGD."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from fedmq.algorithms.base import Accumulator, Algorithm, Client, Payload, State
from fedmq.algorithms.errors import AlgorithmError
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.problems.models import MODELS
from fedmq.algorithms.rng import derive_rng, derive_seed
from fedmq.algorithms.toolkit.dry_step import dry_step
from fedmq.algorithms.toolkit.flat_model import FlatModel
from fedmq.algorithms.toolkit.sgd import batches, cuda_devices
from fedmq.codecs.text import unknown


@dataclass(frozen=True)
class DeviceModels(Algorithm[State, Accumulator]):
    """Base of algorithms whose devices keep their models; see `Distillation` for the fields."""

    schedules: ClassVar[frozenset[str]] = frozenset({"rounds", "buffered", "stream"})
    task_per_client: ClassVar[bool] = True
    evaluated_by: ClassVar[Literal["model", "clients"]] = "clients"

    lr: Annotated[float, Field(gt=0)] = 0.05
    gamma: Annotated[float, Field(ge=0)] = 0.5
    iterations: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[int, Field(ge=1)] = 2
    batch_size: Annotated[int, Field(ge=1)] | None = 64
    models: tuple[str, ...] = ()
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for each in self.models:
            if each not in MODELS:
                raise AlgorithmError(f"models: {unknown('model', each, MODELS)}")

    def try_model(self, problem: Problem, data: Examples, device: str) -> None:
        """Try a step of the problem's model, if the devices use it."""
        if not self.models:
            dry_step(lambda: FlatModel(problem.model(), device), problem, data, device)

    def steps(self, model: FlatModel, client: Client) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a round's batches; after each, step along the gradient that the caller computed."""
        data = client.data.to(client.device)
        rng = derive_rng(client.seed, "batches")
        model.module.train()
        with torch.random.fork_rng(devices=cuda_devices(client.device)):
            torch.manual_seed(client.seed)
            for x, y in self._batches(data, rng):
                model.gradient.zero_()
                yield x, y
                model.after_backward()
                with torch.no_grad():
                    model.trained.add_(model.gradient, alpha=-self.lr)
        model.end_task()

    def _batches(self, data: Examples, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        if self.iterations is None:
            return batches(data, self.batch_size, self.epochs, rng)
        endless = batches(data, self.batch_size, self.iterations, rng)
        return itertools.islice(endless, self.iterations)

    def own_model(self, client: Client) -> FlatModel:
        """Return the device's local model, or its first one."""
        make = functools.partial(self._first, client.problem, client.index)
        model = FlatModel(make(), client.device, make)
        if client.local is not None:
            model.load(*model.layout.read(client.local))
        return model

    def _first(self, problem: Problem, index: int) -> nn.Module:
        if not self.models:
            return problem.model()
        make = MODELS[self.models[index % len(self.models)]]
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            seed = derive_seed(self.seed or 0, "device model", index)
            torch.default_generator.manual_seed(seed)
            channels, height, width = problem.shape
            return make((channels, height, width), problem.classes)


def kept(model: FlatModel) -> Payload:
    """Return a device's model as its local state."""
    weights = model.layout.views(model.weights.detach().clone().cpu())
    return Payload(weights, model.layout.counter_views(model.read_counters()))
