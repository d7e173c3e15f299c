"""How well a model does on one client's test data, before and after it adapted to that client."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.tasks import Client, Task
from fedmq.algorithms.toolkit.flat_model import FlatModel
from fedmq.algorithms.toolkit.sgd import cuda_devices, load_model, metrics_on


def before_and_after(
    task: Task, client: Client, adapt: Callable[[FlatModel, Examples], None]
) -> Mapping[str, float]:
    """Return a client's metrics with the adapted model, and with w_t as ``<name>_before``.

    Args:
        task: holds w_t.
        client: whose test data it is.
        adapt: changes the model it is given; its examples are the client's training examples.
            Test examples never reach it.
    """
    model, start = load_model(task, client.problem, client.device)
    test = client.problem.client_test(client.index)
    before = metrics_on(model.module, client.problem, test, client.device)
    model.load(start, model.loaded_counters)  # an evaluation leaves no trace in the training
    model.module.train()
    with torch.random.fork_rng(devices=cuda_devices(client.device)):
        torch.manual_seed(client.seed)
        adapt(model, client.data.to(client.device))
    model.end_task()
    model.reset()
    after = metrics_on(model.module, client.problem, test, client.device)
    return {**after, **{f"{name}_before": value for name, value in before.items()}}
