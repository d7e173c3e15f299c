"""Many small learning tasks, one a client, each with its own linear model.

There are two natural data sets, which are read from ``natural/`` in the data folder, and two kinds
of tasks on MNIST. Every client has a quarter of its examples for tests, as in the experiments of
Smith et al., "Federated Multi-Task Learning", NeurIPS 2017.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmq.algorithms.errors import DataError, ProblemError
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.problems.data_files import Array, data_root, read_npz
from fedmq.algorithms.problems.datasets import DATASETS, load_dataset
from fedmq.algorithms.problems.partitions import PARTITIONS
from fedmq.algorithms.rng import derive_rng
from fedmq.codecs.errors import SpecError
from fedmq.codecs.spec import build
from fedmq.codecs.text import unknown

Parts = tuple[Examples, Examples]
"""Training and test examples of one task."""
Digits = Literal["one-vs-rest", "odd-even"]

_PARTS = 4
"""One part in four is for tests."""


class LinearTasks(Problem):
    """Tasks with the same features, of which the last is constant, and one output w^T x.

    Classes are 0 and 1; the loss is the hinge loss of the output and -1 or 1.
    """

    clients: int
    seed: int
    dim: int
    """d, number of features with the constant."""

    @abstractmethod
    def _parts(self, index: int) -> Parts:
        """Return the examples of an existing task."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return [d]."""
        return (self.dim,)

    @property
    def classes(self) -> int:
        """Return 2."""
        return 2

    def model(self) -> nn.Module:
        """Return w = 0; x: float32 [n, d] -> [n, 1]."""
        module = nn.Linear(self.dim, 1, bias=False)
        nn.init.zeros_(module.weight)
        return module

    def client(self, index: int) -> Examples:
        """Return the training examples of a client: x float32 [n, d], y int64 or float32 [n]."""
        return self._checked(index)[0]

    def client_test(self, index: int) -> Examples:
        """Return the test examples of a client."""
        return self._checked(index)[1]

    def test(self) -> Examples:
        """Return the test examples of all clients together."""
        parts = [self.client_test(index) for index in range(self.clients)]
        return Examples(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]))

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the mean hinge loss; outputs: [n, 1]."""
        return (1 - (2 * y - 1) * outputs[:, 0]).clamp(min=0).mean()

    def metrics(self, outputs: Tensor, y: Tensor) -> Mapping[str, float]:
        """Return ``loss``, the mean hinge loss, and ``accuracy``."""
        correct = ((outputs[:, 0] > 0) == (y > 0)).float().mean()
        return {"loss": self.loss(outputs, y).item(), "accuracy": correct.item()}

    def metric_range(self, name: str) -> tuple[float, float]:
        """Return 0 to 1 for ``accuracy``."""
        return (0.0, 1.0) if name == "accuracy" else super().metric_range(name)

    def _checked(self, index: int) -> Parts:
        known = self.clients + self.held_out
        if not 0 <= index < known:
            raise ProblemError(f"expected a client from 0 to {known - 1}, got {index}")
        return self._parts(index)


@dataclass(frozen=True, kw_only=True)
class _File(LinearTasks):
    """A natural data set in a file of arrays x [n, d], y [n] and task [n].

    The features are scaled to zero mean and unit variance over the clients' training examples;
    constant ones are dropped.

    Raises:
        ProblemError: at construction, for a number that is out of range.
    """

    clients: int
    seed: int
    held_out: int = 0
    """Number of tasks beyond the clients, which never train."""

    file = ""
    about = ""
    tasks = 0

    def __post_init__(self) -> None:
        if self.clients < 1 or self.held_out < 0:
            raise ProblemError("problem.clients: expected at least 1, and held_out at least 0")
        if self.clients + self.held_out > self.tasks:
            raise ProblemError(
                f"problem.clients: expected at most {self.tasks} {self.about}, got {self.clients} "
                f"clients and {self.held_out} held out"
            )

    @abstractmethod
    def _labels(self, y: Array) -> Tensor:
        """Return the labels of examples."""

    @abstractmethod
    def _strata(self, y: Array) -> Array:
        """Return the stratum of each example; training and test parts have the same proportions."""

    def _parts(self, index: int) -> Parts:
        return self._all[index]

    @cached_property
    def _all(self) -> list[Parts]:
        rows = self._rows
        x, y, _ = self._arrays
        together = np.concatenate([train for train, _ in rows[: self.clients]])
        mean, std = x[together].mean(axis=0), x[together].std(axis=0)
        scaled = ((x - mean) / np.where(std > 0, std, 1))[:, self._varying]
        features = torch.from_numpy(np.hstack([scaled, np.ones((len(x), 1))])).float()
        labels = self._labels(y)
        pairs = [tuple(torch.from_numpy(part) for part in each) for each in rows]
        return [
            (Examples(features[a], labels[a]), Examples(features[b], labels[b])) for a, b in pairs
        ]

    @cached_property
    def _rows(self) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        _, y, task = self._arrays
        return [
            _split(np.flatnonzero(task == index), self._strata(y), self.seed, index)
            for index in range(self.clients + self.held_out)
        ]

    @cached_property
    def _varying(self) -> NDArray[np.bool_]:
        x = self._arrays[0]
        return np.asarray(x.std(axis=0) > 0)

    @cached_property
    def _arrays(self) -> tuple[Array, Array, Array]:
        path = data_root() / "natural" / self.file
        if not path.is_file():
            raise DataError(
                f"cannot find data set {type(self).__name__}, and it cannot be downloaded: put "
                f"{self.file} into {path.parent}, or set FEDMQ_DATA to the folder around it"
            )
        x, y, task = read_npz(path, "x", "y", "task")
        fits = x.ndim == 2 and x.shape[1] + 1 >= self.dim and y.shape == task.shape == x.shape[:1]
        if not fits or set(np.unique(task).tolist()) != set(range(self.tasks)):
            raise DataError(
                f"{path}: expected arrays x [n, d], y [n] and task [n], got others: replace it"
            )
        x = x.astype(np.float64)
        if int((x.std(axis=0) > 0).sum()) + 1 != self.dim:
            raise DataError(f"{path}: expected {self.dim - 1} features that vary: replace it")
        return x, y, task


@dataclass(frozen=True, kw_only=True)
class LandMine(_File):
    """29 fields; classify land mines (6 %) from 9 features of a radar image."""

    clients: int = 29
    file = "landmine-29fields.npz"
    about = "fields"
    tasks = 29
    dim = 10

    def _labels(self, y: Array) -> Tensor:
        return torch.from_numpy((y > 0).astype(np.int64))

    def _strata(self, y: Array) -> Array:
        return y


@dataclass(frozen=True, kw_only=True)
class School(_File):
    """139 schools; predict a pupil's exam score from 27 features of the pupil and the school.

    Scores are scaled to zero mean and unit variance over the clients' training examples.
    """

    clients: int = 139
    file = "school-139.npz"
    about = "schools"
    tasks = 139
    dim = 28

    @property
    def classes(self) -> int:
        """Raise an error.

        Raises:
            ProblemError: always, because scores are no classes.
        """
        raise ProblemError("expected a problem with classes, exam scores are numbers")

    def _labels(self, y: Array) -> Tensor:
        seen = y[np.concatenate([train for train, _ in self._rows[: self.clients]])]
        return torch.from_numpy((y - seen.mean()) / seen.std()).float()

    def _strata(self, y: Array) -> Array:
        return np.zeros_like(y)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return half the mean squared error."""
        return (outputs[:, 0] - y).square().mean() / 2

    def metrics(self, outputs: Tensor, y: Tensor) -> Mapping[str, float]:
        """Return ``loss``, and as ``accuracy`` the explained variance, 1 - squared error.

        It is relative to the variance of all scores together, so its mean over schools is one too;
        it can be below 0 for a single school.
        """
        loss = self.loss(outputs, y).item()
        return {"loss": loss, "accuracy": 1 - 2 * loss}

    def metric_range(self, name: str) -> tuple[float, float]:
        """Return any number up to 1 for ``accuracy``."""
        return Problem.metric_range(self, name)


@dataclass(frozen=True, kw_only=True)
class DigitTasks(LinearTasks):
    """Binary tasks on MNIST images without common images.

    digits: ``one-vs-rest``: half of the images of client k are of digit k mod 10, which is class
        1, and the others of all other digits, so each digit has another w. ``odd-even``:
        `partition` assigns the images, and class 1 are the odd digits.
    data: ``mnist`` or ``mnist-mini``.
    examples: images a client, for training and tests together; with ``odd-even``, their average.

    Raises:
        ProblemError: at construction, for a value that is out of range.
    """

    clients: int
    seed: int
    digits: Digits = "one-vs-rest"
    data: str = "mnist-mini"
    examples: int = 100
    partition: str = "shards(2)"
    held_out: int = 0
    dim = 785

    def __post_init__(self) -> None:
        if self.digits not in get_args(Digits):
            choices = unknown("tasks", self.digits, dict.fromkeys(get_args(Digits)))
            raise ProblemError(f"problem.digits: {choices}")
        known = {name: source for name, source in DATASETS.items() if name.startswith("mnist")}
        if self.data not in known:
            raise ProblemError(f"problem.data: {unknown('data set', self.data, known)}")
        if self.clients < 1 or self.held_out < 0:
            raise ProblemError("problem.clients: expected at least 1, and held_out at least 0")
        if self.examples < 2 * _PARTS:
            raise ProblemError(
                f"problem.examples: expected at least {2 * _PARTS}, got {self.examples}"
            )
        try:
            partition = build(self.partition, PARTITIONS, "partition")
        except SpecError as error:
            raise ProblemError(f"problem.partition: {error}") from None
        if partition.with_replacement:  # an example could be in a client's training and test data
            raise ProblemError(
                "problem.partition: expected a partition without replacement, got "
                f"{self.partition!r}"
            )

    def _parts(self, index: int) -> Parts:
        kept = self._kept.get(index)
        if kept is None:
            rows, digits = self._assigned[index], load_dataset(self.data).y_train
            y = digits == index % 10 if self.digits == "one-vs-rest" else digits % 2 == 1
            train, test = _split(rows, y, self.seed, index)
            kept = self._kept[index] = (self._examples(train, y), self._examples(test, y))
        return kept

    def _examples(self, rows: NDArray[np.int64], y: NDArray[np.bool_]) -> Examples:
        images = torch.from_numpy(load_dataset(self.data).x_train[rows]).float().div_(255)
        constant = torch.ones(len(rows), 1)
        labels = torch.from_numpy(y[rows].astype(np.int64))
        return Examples(torch.cat([images.flatten(1), constant], dim=1), labels)

    @cached_property
    def _kept(self) -> dict[int, Parts]:
        return {}

    @cached_property
    def _assigned(self) -> list[NDArray[np.int64]]:
        digits, number = load_dataset(self.data).y_train, self.clients + self.held_out
        rng = derive_rng(self.seed, "digit tasks")
        order = rng.permutation(len(digits))
        if number * self.examples > len(digits):
            raise ProblemError(
                f"problem.examples: expected at most {len(digits)} images of {self.data!r}, "
                f"got {number} clients with {self.examples} each"
            )
        if self.digits == "odd-even":
            chosen = np.sort(order[: number * self.examples])
            deal = build(self.partition, PARTITIONS, "partition")
            writers = load_dataset(self.data).writers
            labels, groups = digits[chosen], None if writers is None else writers[chosen]
            return [chosen[part] for part in deal(labels, groups, number, rng)]
        return _one_vs_rest(digits, order, number, self.examples)


def _one_vs_rest(
    digits: NDArray[np.int64], order: NDArray[np.int64], number: int, examples: int
) -> list[NDArray[np.int64]]:
    """Assign each client half of its images of its own digit first, then the rest of others."""
    half = examples // 2
    own = []
    left = np.ones(len(digits), dtype=bool)
    for digit in range(10):
        of_digit = order[digits[order] == digit]
        for turn, index in enumerate(range(digit, number, 10)):
            chosen = of_digit[turn * half : (turn + 1) * half]
            if len(chosen) < half:
                raise ProblemError(
                    f"problem.examples: expected {half} images of digit {digit} for client "
                    f"{index}, got {len(chosen)}"
                )
            own.append((index, chosen))
            left[chosen] = False
    parts = []
    for index, chosen in sorted(own, key=lambda each: each[0]):
        fits = order[left[order] & (digits[order] != index % 10)][: examples - half]
        if len(fits) < examples - half:
            raise ProblemError(
                f"problem.examples: expected more images, got none for client {index}"
            )
        left[fits] = False
        parts.append(np.sort(np.concatenate([chosen, fits])))
    return parts


def _split(
    rows: NDArray[np.int64], strata: Array, seed: int, index: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return training and test rows, with a quarter (rounded) of each stratum for tests."""
    rng = derive_rng(seed, "tasks' test parts", index)
    train, test = [], []
    for value in np.unique(strata[rows]):
        members = rng.permutation(rows[strata[rows] == value])
        count = round(len(members) / _PARTS)
        test.append(members[:count])
        train.append(members[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))
