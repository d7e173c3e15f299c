"""One step of training before the first task: what a model does to itself shows in it."""

from __future__ import annotations

from collections.abc import Callable

from fedmq.algorithms.errors import AlgorithmError
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.rng import seeded
from fedmq.algorithms.toolkit.flat_model import FlatModel
from fedmq.algorithms.toolkit.results import refuse_unbounded
from fedmq.algorithms.values import ReturnedError

_EXAMPLES = 4


def dry_step(make: Callable[[], FlatModel], problem: Problem, data: Examples, device: str) -> None:
    """Train a model forward and backward on a few examples; nothing of it stays.

    Meanwhile it takes the memory of a step of training.

    Args:
        make: returns a working copy that nobody else uses.
        problem: whose loss it is.
        data: a client's training examples.
        device: of the model.

    Raises:
        ReturnedError: the problem's loss is none.
        ProblemError: the model has tensors that cannot be carried, or does to them what cannot
            be followed. Whatever else goes wrong is left to the task that meets it.
    """
    try:
        model = make()
    except AlgorithmError:
        raise
    except Exception:  # noqa: BLE001 - the task that meets it says what it was
        return
    end = model.layout.parameters
    before = model.weights[end:].clone()
    with seeded(0, device):
        model.module.train()
        try:
            x, y = data.x[:_EXAMPLES].to(device), data.y[:_EXAMPLES].to(device)
            problem.loss(model.module(x), y).backward()  # type: ignore[no-untyped-call] # torch's
        except ReturnedError:
            raise
        except Exception:  # noqa: BLE001 - the task that meets it says what it was
            return
        model.after_backward()
        model.end_task()
    for slot in model.layout.rest:
        refuse_unbounded(slot, slot.view(before, end), slot.view(model.weights))
