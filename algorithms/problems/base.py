"""What is learned: a model, each client's data, test data, loss and metric."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.problems.examples import Examples
from fedmq.algorithms.problems.guards import guard
from fedmq.algorithms.rng import derive_seed, seeded

__all__ = ["Examples", "Problem"]


class Problem(ABC):
    """A model, the data of each client, test data, and what is measured.

    Everything is a deterministic function of the problem's fields and seed. Data are
    read only when asked for: the aggregator needs the model alone.

    What the methods of a subclass return is checked wherever they are called: numbers of numpy
    and of torch become Python's own, and what is of another kind raises `ReturnedError`.
    """

    clients: int
    """Number of clients, K; they are numbered 0 to K-1."""

    seed: int
    """Of the run."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        guard(cls, Problem)
        if not isinstance(model := vars(cls).get("model"), staticmethod) and callable(model):
            cls.model = _with_seed(model)  # type: ignore[method-assign] # it keeps its signature

    @abstractmethod
    def model(self) -> nn.Module:
        """Return a freshly initialised model; the same values at every call, on every node.

        The global generators of Python, numpy and torch are seeded with `seed` before each call.
        What is drawn from others (``numpy.random.default_rng()``) needs a seed of its own.
        """

    @abstractmethod
    def client(self, index: int) -> Examples:
        """Return the training examples of one client.

        Raises:
            ProblemError: there is no such client.
            DataError: the data set is not there.
        """

    @abstractmethod
    def test(self) -> Examples:
        """Return the test examples.

        Raises:
            DataError: the data set is not there.
        """

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one example's x, for algorithms that bring their own models.

        Raises:
            ProblemError: the problem does not say.
        """
        raise ProblemError("this problem does not say which shape its examples have")

    @property
    def classes(self) -> int:
        """Return the number of classes, for algorithms that need to know it.

        Raises:
            ProblemError: the problem does not say.
        """
        raise ProblemError("this problem does not say how many classes it has")

    @property
    def held_out(self) -> int:
        """Return how many clients beyond `clients` have data and never train.

        Their numbers are K to K + held_out - 1.
        """
        return 0

    def client_test(self, index: int) -> Examples:
        """Return the test examples of one client, distributed as its training examples are.

        Raises:
            ProblemError: there is no such client, or clients have no test data of their own.
            DataError: the data set is not there.
        """
        raise ProblemError(f"this problem has no test data for client {index} alone")

    def public(self) -> Examples:
        """Return the examples that all clients share, which are in no client's own.

        Raises:
            ProblemError: there are none.
            DataError: the data set is not there.
        """
        raise ProblemError("this problem has no public examples")

    @abstractmethod
    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss over a batch, as a scalar tensor."""

    @abstractmethod
    def metrics(self, outputs: Tensor, y: Tensor) -> Mapping[str, float]:
        """Return means over a batch, at least ``loss``, and ``accuracy`` where it has a meaning."""


_making: ContextVar[object] = ContextVar("the problem whose model is being made", default=None)


def _with_seed(model: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Let a problem's model draw the same first values at every call."""

    @functools.wraps(model)
    def with_seed(problem: Any, *args: Any, **options: Any) -> nn.Module:
        if _making.get() is problem:  # super().model(): draws go on
            return model(problem, *args, **options)
        token = _making.set(problem)
        try:
            with seeded(derive_seed(getattr(problem, "seed", 0), "model")):
                return model(problem, *args, **options)
        finally:
            _making.reset(token)

    return with_seed
