"""Local SGD: load a model, iterate over random batches, make the result, compute metrics."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.tasks import Client, Payload, Reply, Task
from fedmq.algorithms.toolkit.flat_model import FlatModel, scratch_model
from fedmq.algorithms.toolkit.layout import Layout
from fedmq.algorithms.toolkit.results import Vectors, result_payload
from fedmq.algorithms.values import ReturnedError

_EVALUATION_BATCH = 500


@dataclass(frozen=True)
class SGDSettings:
    """SGD steps: w <- w - lr * v, with v <- momentum * v + gradient + weight_decay * w.

    lr: learning rate.
    batch_size: examples a step; None is the whole local set.
    momentum: in [0, 1); v starts from zero at each task.
    weight_decay: of all trained parameters.
    """

    lr: float
    batch_size: int | None
    momentum: float
    weight_decay: float


def load_model(task: Task, problem: Problem, device: str) -> tuple[FlatModel, Tensor]:
    """Return the working copy of the model, loaded with w_t, and w_t itself, float32 [dim]."""
    model = scratch_model(problem, device)
    weights, counters = model.layout.read(task.payload)
    start = weights.to(device)
    model.load(start, counters)
    return model, start


def learned(
    model: FlatModel,
    start: Tensor,
    numbers: Mapping[str, int | float | str],
    reply: Reply = "update",
    trained: Tensor | None = None,
) -> Payload:
    """Return the result of a model that was loaded with w_t, ``start``, and trained.

    Other arguments as in `result_payload`.
    """
    before = Vectors(start, model.loaded_counters)
    after = Vectors(model.weights, model.read_counters())
    return result_payload(model.layout, before, after, numbers, reply, trained)


def project(client: Client, layout: Layout, gradient: Tensor) -> None:
    """Project a gradient, float32 [parameters], in place: see `Client.project`."""
    if client.project is not None:
        client.project(layout.trained_views(gradient))


def batches(
    data: Examples, batch_size: int | None, epochs: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches (x [b, ...], y [b]), each epoch in a new order, cut by `spans`."""
    n = len(data)
    size = n if batch_size is None else batch_size
    for _ in range(epochs):
        order = torch.from_numpy(rng.permutation(n)).to(data.y.device)
        for start, end in spans(n, size):
            chosen = order[start:end]
            yield data.x[chosen], data.y[chosen]


def spans(n: int, size: int) -> list[tuple[int, int]]:
    """Return the (start, end) of batches of n examples; the last one may be shorter.

    A last batch of one example joins the one before, because a BatchNorm cannot train on it.
    """
    starts = list(range(0, n, size))
    if size > 1 and len(starts) > 1 and n % size == 1:
        starts.pop()
    return list(itertools.pairwise([*starts, n]))


def evaluate_module(module: torch.nn.Module, problem: Problem, device: str) -> dict[str, float]:
    """Return a module's metrics on the problem's test data, averaged over examples."""
    return metrics_on(module, problem, problem.test(), device)


def metrics_on(
    module: torch.nn.Module, problem: Problem, data: Examples, device: str
) -> dict[str, float]:
    """Return a module's metrics on some examples, averaged over them.

    A metric that is missing in some batches is averaged over the others.

    Raises:
        ReturnedError: there are no examples.
    """
    if not len(data):
        name = type(problem).__name__
        raise ReturnedError(f"{name}: expected at least one example to evaluate on, got none")
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    module.eval()
    with torch.no_grad():
        for start in range(0, len(data), _EVALUATION_BATCH):
            x = data.x[start : start + _EVALUATION_BATCH].to(device)
            y = data.y[start : start + _EVALUATION_BATCH].to(device)
            for name, value in problem.metrics(module(x), y).items():
                sums[name] = sums.get(name, 0.0) + value * len(y)
                counts[name] = counts.get(name, 0) + len(y)
    return {name: value / counts[name] for name, value in sums.items()}


def cuda_devices(device: str) -> list[torch.device]:
    """Return the devices, besides the CPU, whose generators a task on ``device`` uses."""
    return [torch.device(device)] if device.startswith("cuda") else []
