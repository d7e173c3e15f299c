"""One training step before the first task, which reveals unsuitable models."""

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
    """Run a forward and a backward pass on a few examples and discard the result.

    It takes as much memory as a training step.

    Args:
        make: returns an unshared working copy of the model.
        problem: problem with the loss.
        data: a client's training examples.
        device: torch device of the model.

    Raises:
        ReturnedError: the problem's loss is no tensor of one value.
        ProblemError: the model has unsupported tensors, or changes them in an unsupported way.
            Other errors are left to the task that meets them.
    """
    try:
        model = make()
    except AlgorithmError:
        raise
    except Exception:  # noqa: BLE001 - the task that meets it reports it
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
        except Exception:  # noqa: BLE001 - the task that meets it reports it
            return
        model.after_backward()
        model.end_task()
    for slot in model.layout.rest:
        refuse_unbounded(slot, slot.view(before, end), slot.view(model.weights))
