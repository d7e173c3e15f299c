"""Evaluate a model on one client's test data before and after adaptation to that client."""

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
        task: task with w_t.
        client: client whose data are used.
        adapt: changes the given model with the client's training examples; it never gets test
            examples.
    """
    model, start = load_model(task, client.problem, client.device)
    test = client.problem.client_test(client.index)
    before = metrics_on(model.module, client.problem, test, client.device)
    model.load(start, model.loaded_counters)  # an evaluation changes nothing for the training
    model.module.train()
    with torch.random.fork_rng(devices=cuda_devices(client.device)):
        torch.manual_seed(client.seed)
        adapt(model, client.data.to(client.device))
    model.end_task()
    model.reset()
    after = metrics_on(model.module, client.problem, test, client.device)
    return {**after, **{f"{name}_before": value for name, value in before.items()}}
