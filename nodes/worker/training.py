"""Training and evaluation for a worker's core, shared by programs, simulations and replays.

The same task, from the same state of its client and on the same kind of device, gives the same
bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from fedmq.algorithms.problems.base import Problem
from fedmq.algorithms.rng import seeded
from fedmq.algorithms.toolkit.returned import result_of
from fedmq.algorithms.values import ReturnedError
from fedmq.codecs.text import shorten
from fedmq.nodes.errors import exits_as_errors
from fedmq.nodes.messages.metrics import within
from fedmq.nodes.run.devices import kind_of
from fedmq.nodes.run.setup import Setup
from fedmq.nodes.worker.core import Evaluate, Evaluated, Train, Trained

Compute = Callable[[Train | Evaluate], Trained | Evaluated]


class RemoteError(Exception):
    """A user's code raised an error in a process that trains for this one.

    Attributes:
        name: name of the exception's type there.
        reason: type and text of the exception, as `described` returns them.
        code: code of the reason, see `fedmq.broker.rejections.Code`.
        where: file and line of the user's code that raised it, or "".
    """

    def __init__(self, text: str, name: str, reason: str, code: str, where: str) -> None:
        super().__init__(text)
        self.name, self.reason, self.code, self.where = name, reason, code, where


class RemoteReturnedError(RemoteError, ReturnedError):
    """A method returned an unusable value in a process that trains for this one."""


def compute(action: Train | Evaluate, setup: Setup, device: str) -> Trained | Evaluated:
    """Train or evaluate, with the global generators seeded for model, data and loss.

    Returns:
        The event for the core; the caller adds the elapsed time.

    Raises:
        ReturnedError: a method of the problem or the algorithm returned an invalid value.
        Exception: any error of those methods; ``exit()`` is converted to an error.
    """
    with exits_as_errors(), seeded(action.seed, device):
        if isinstance(action, Train):
            client = action.at(setup, device)
            found = setup.algorithm.train(action.task, client)
            payload, local = result_of(found, f"{type(setup.algorithm).__name__}.train")
            return Trained(payload, local, 0.0, kind_of(device))
        return Evaluated(action.metrics(setup, device), kind_of(device))


def check_ranges(metrics: Mapping[str, float], problem: Problem) -> None:
    """Check the metrics that a node computed before it sends them.

    Raises:
        ReturnedError: a finite one is outside of `Problem.metric_range`.
    """
    for name, value in metrics.items():
        low, high = problem.metric_range(name)
        if math.isfinite(value) and not within(value, low, high):
            raise ReturnedError(
                f"{type(problem).__name__}.metrics: expected {shorten(name)} from {low:g} to "
                f"{high:g}, got {value:g}; define metric_range for other values"
            )
