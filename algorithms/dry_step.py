"""One step of training before the first task: what a model does to itself shows in it."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch

from fedmq.algorithms.errors import AlgorithmError
from fedmq.algorithms.model import FlatModel
from fedmq.algorithms.problems.base import Examples, Problem

_EXAMPLES = 4


def dry_step(make: Callable[[], FlatModel], problem: Problem, data: Examples, device: str) -> None:
    """Train a model forward and backward on a few examples; nothing of it stays.

    Args:
        make: returns a working copy, which is loaded before it is used.
        problem: whose loss it is.
        data: a client's training examples.
        device: of the model.

    Raises:
        ProblemError: the model has tensors that cannot be carried, or does to them what cannot
            be followed. Whatever else goes wrong is left to the task that meets it.
    """
    try:
        model = make()
    except AlgorithmError:
        raise
    except Exception:  # noqa: BLE001 - as above
        return
    devices = [torch.device(device)] if device.startswith("cuda") else []
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - a model may draw from it
    try:
        with torch.random.fork_rng(devices=devices):
            model.reset()
            model.module.train()
            try:
                x, y = data.x[:_EXAMPLES].to(device), data.y[:_EXAMPLES].to(device)
                problem.loss(model.module(x), y).backward()  # type: ignore[no-untyped-call] # torch's
            except Exception:  # noqa: BLE001 - the task that meets it says what it was
                return
            model.after_backward()
            model.end_task()
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002 - as above
        model.reset()
