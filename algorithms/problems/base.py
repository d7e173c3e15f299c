"""The base class of problems: a model, each client's data, test data, loss and metrics."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.problems.examples import Examples
from fedmq.algorithms.problems.guards import guard
from fedmq.algorithms.rng import derive_seed, seeded

__all__ = ["MOST_EXAMPLES", "Examples", "Problem"]

MOST_EXAMPLES = 10**9
"""Largest number of examples that a result may count."""
_OF_DATA = frozenset({"most_examples", "client_size", "label_position"})
"""What a class with data of its own does not inherit."""


class Problem(ABC):
    """A model, the data of each client, test data, loss and metrics.

    All of them depend on the problem's fields and seed alone. Data are read on demand, because the
    aggregator needs only the model.

    The return values of a subclass's methods are checked: numbers of numpy and torch become
    Python's, and unusable values raise `ReturnedError`.
    """

    clients: int
    """Number of clients, K; they are numbered 0 to K-1."""

    seed: int
    """Seed of the run."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        guard(cls, Problem)
        own = vars(cls)
        # A class with other data or other metrics does not inherit the limits of the former ones.
        if "client" in own:
            for name in _OF_DATA - own.keys():
                setattr(cls, name, vars(Problem)[name])
        if "metrics" in own and "metric_range" not in own:
            cls.metric_range = Problem.metric_range  # type: ignore[method-assign] # same signature
        if not isinstance(model := vars(cls).get("model"), staticmethod) and callable(model):
            cls.model = _with_seed(model)  # type: ignore[method-assign] # it keeps its signature

    @abstractmethod
    def model(self) -> nn.Module:
        """Return a freshly initialised model with the same values at every call, on every node.

        The global generators of Python, numpy and torch are seeded with `seed` before each call.
        Other generators (``numpy.random.default_rng()``) need a seed of their own.
        """

    @abstractmethod
    def client(self, index: int) -> Examples:
        """Return the training examples of one client.

        Raises:
            ProblemError: there is no such client.
            DataError: the data set is missing or damaged.
        """

    @abstractmethod
    def test(self) -> Examples:
        """Return the test examples.

        Raises:
            DataError: the data set is missing or damaged.
        """

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one example's x, for algorithms with models of their own.

        Raises:
            ProblemError: the problem does not define it.
        """
        raise ProblemError("expected a problem that defines shape, the shape of its examples")

    @property
    def classes(self) -> int:
        """Return the number of classes, for algorithms that need it.

        Raises:
            ProblemError: the problem does not define it.
        """
        raise ProblemError("expected a problem that defines classes, the number of classes")

    @property
    def most_examples(self) -> int:
        """Return the most training examples that one client can have.

        A result that counts more is rejected (`Algorithm.counts_examples`). The number depends on
        the problem's fields alone, because the aggregator may not have the data.
        """
        return MOST_EXAMPLES

    def client_size(self, index: int) -> int:
        """Return the number of training examples of one client, as `client` returns them."""
        return len(self.client(index))

    def label_position(self, index: int) -> float:
        """Return where the labels of a client are on average, from 0 to 1 (the last class).

        For simulated runs in which availability depends on the data.

        Raises:
            ProblemError: the problem does not define `classes`.
        """
        last = max(1, self.classes - 1)
        return float(self.client(index).y.double().mean()) / last

    def metric_range(self, name: str) -> tuple[float, float]:
        """Return the smallest and the largest possible value of a metric.

        The aggregator rejects a score with a value outside. By default, ``accuracy`` is at most 1,
        and other metrics are any numbers.
        """
        return -math.inf, 1.0 if name == "accuracy" else math.inf

    @property
    def held_out(self) -> int:
        """Return the number of clients beyond `clients` that have data and never train.

        Their numbers are K to K + held_out - 1.
        """
        return 0

    def client_test(self, index: int) -> Examples:
        """Return the test examples of one client, distributed as its training examples are.

        Raises:
            ProblemError: there is no such client, or clients have no test data of their own.
            DataError: the data set is missing or damaged.
        """
        raise ProblemError(
            f"expected a problem with test data of each client, got none for client {index}"
        )

    def public(self) -> Examples:
        """Return the examples that all clients share; no client has them in its own.

        Raises:
            ProblemError: there are none.
            DataError: the data set is missing or damaged.
        """
        raise ProblemError("expected a problem with public examples, got none")

    @abstractmethod
    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss over a batch, as a scalar tensor."""

    @abstractmethod
    def metrics(self, outputs: Tensor, y: Tensor) -> Mapping[str, float]:
        """Return means over a batch: ``loss``, and ``accuracy`` if it is meaningful."""


_making: ContextVar[object] = ContextVar("the problem whose model is being made", default=None)


def _with_seed(model: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Return a method ``model`` that draws the same first values at every call."""

    @functools.wraps(model)
    def with_seed(problem: Any, *args: Any, **options: Any) -> nn.Module:
        if _making.get() is problem:  # super().model(): continue the draws
            return model(problem, *args, **options)
        token = _making.set(problem)
        try:
            with seeded(derive_seed(getattr(problem, "seed", 0), "model")):
                return model(problem, *args, **options)
        finally:
            _making.reset(token)

    return with_seed
