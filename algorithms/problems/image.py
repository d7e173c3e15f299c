"""Image classification: a data set, a partition among clients, and a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.problems.datasets import DATASETS, DataSet, load_dataset
from fedmq.algorithms.problems.models import MODELS
from fedmq.algorithms.problems.partitions import PARTITIONS, Bootstrap, Indices, Partition
from fedmq.codecs.errors import SpecError
from fedmq.codecs.spec import build
from fedmq.codecs.text import unknown

CACHE_BYTES = 1 << 30
"""Size limit of the cache of clients' float32 examples; others are converted each time."""


class _ExampleCache:
    """Examples of clients, up to `CACHE_BYTES`."""

    def __init__(self) -> None:
        self._nbytes = 0
        self._examples: dict[int, Examples] = {}

    def get(self, index: int) -> Examples | None:
        """Return a client's examples, or None."""
        return self._examples.get(index)

    def keep(self, index: int, examples: Examples) -> None:
        """Store a client's examples, if they fit."""
        if self._nbytes + examples.x.nbytes <= CACHE_BYTES:
            self._nbytes += examples.x.nbytes
            self._examples[index] = examples


@dataclass(frozen=True)
class ImageClassification(Problem):
    """A classification problem on images, divided among clients.

    Names and numbers are checked at construction; data are read, and downloaded if missing, when
    examples are requested.

    Raises:
        ProblemError: at construction, for a field that is unknown, out of range or does not fit the
            others; the message begins with the name of the field.
    """

    name: str
    """The data set, a key of `DATASETS`."""
    model_name: str
    """The model, a key of `MODELS`."""
    clients: int
    """Number of clients, K."""
    partition: str
    """The partition, a spec of `PARTITIONS` such as ``"dirichlet(0.5)"``."""
    seed: int
    """Seed of the model's first parameters, the choice of examples and the partition."""
    examples: int | None = None
    """Number of training examples, chosen at random; None is all. All test examples are used."""
    held_out: int = 0
    """Number of additional clients, which never train; their numbers follow the others."""
    public_examples: int = 0
    """Number of training examples, chosen at random, that all clients share."""

    def __post_init__(self) -> None:
        if self.name not in DATASETS:
            raise ProblemError(f"name: {unknown('data set', self.name, DATASETS)}")
        if self.model_name not in MODELS:
            raise ProblemError(f"model: {unknown('model', self.model_name, MODELS)}")
        if self.clients < 1:
            raise ProblemError(f"clients: expected at least 1, got {self.clients}")
        if not 0 <= self.seed < 1 << 63:
            raise ProblemError(f"seed: expected 0 to 2**63 - 1, got {self.seed}")
        parts = 1 if self._partition.with_replacement else self.clients + self.held_out
        if self.examples is not None and self.examples < parts:
            raise ProblemError(
                f"examples: expected at least one for each of {parts} clients, got {self.examples}"
            )
        for key, value in (("held_out", self.held_out), ("public", self.public_examples)):
            if value < 0:
                raise ProblemError(f"{key}: expected at least 0, got {value}")
        needs_writers = self._partition.needs_writers
        if needs_writers and DATASETS[self.name].read_writers is None:
            known = ", ".join(name for name, source in DATASETS.items() if source.read_writers)
            raise ProblemError(
                f"partition: expected a data set with writers for {self.partition!r}, got "
                f"{self.name!r}; choose from {known}"
            )
        try:
            self.model()
        except ProblemError as error:
            raise ProblemError(f"model: {error}") from None

    def model(self) -> nn.Module:
        """Return a freshly initialised model with the same values at every call.

        The states of global random generators are restored.
        """
        source = DATASETS[self.name]
        # torch.manual_seed would also reseed every GPU, which fork_rng does not undo here.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(self.seed)
            return MODELS[self.model_name](source.shape, source.classes)

    @property
    def most_examples(self) -> int:
        """Return the number of training examples, or of those that each client draws."""
        if isinstance(self._partition, Bootstrap):
            return self._partition.size
        return DATASETS[self.name].examples if self.examples is None else self.examples

    def client_size(self, index: int) -> int:
        """Return the number of a client's training examples; arguments and errors as `client`."""
        self._check(index)
        if isinstance(self._partition, Bootstrap):
            return self._partition.size
        return len(self._parts[index])

    def label_position(self, index: int) -> float:
        """Return where a client's labels are on average, from 0 to 1; errors as `client`."""
        self._check(index)
        return float(self._data.y_train[self._part(index)].mean()) / max(1, self.classes - 1)

    def client(self, index: int) -> Examples:
        """Return the training examples of one client; x: float32 [n, C, H, W], read-only.

        Raises:
            ProblemError: there is no such client, or the partition does not fit the data.
            DataError: the data set is missing or damaged.
        """
        self._check(index)
        found = self._cache.get(index)
        if found is None:
            part = self._part(index)
            found = Examples(
                self._data.normalise(self._data.x_train[part]),
                torch.from_numpy(self._data.y_train[part]),
            )
            if not self._partition.with_replacement:  # whose clients are too many to be kept
                self._cache.keep(index, found)
        return found

    def test(self) -> Examples:
        """Return the test examples; x: float32 [n, C, H, W], read-only.

        Raises:
            DataError: the data set is missing or damaged.
        """
        return self._test

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (C, H, W)."""
        return DATASETS[self.name].shape

    @property
    def classes(self) -> int:
        """Return the number of classes."""
        return DATASETS[self.name].classes

    def client_test(self, index: int) -> Examples:
        """Return the test examples of one client; x: float32 [n, C, H, W], read-only.

        Their classes have the proportions of the client's training examples, up to rounding, and
        they are at most as many. They are drawn from all test examples, so clients may share some.

        Raises:
            ProblemError, DataError: as `client`.
        """
        self._check(index)
        chosen = self._tests.get(index)
        if chosen is None:
            trained = np.bincount(self._data.y_train[self._part(index)], minlength=self.classes)
            there = np.bincount(self._data.y_test, minlength=self.classes)
            both = np.flatnonzero((trained > 0) & (there > 0))
            share = min(1.0, float((there[both] / trained[both]).min()))
            rng = np.random.default_rng((self.seed, 2, index))
            picked = [
                rng.permutation(np.flatnonzero(self._data.y_test == label))[
                    : max(1, int(share * trained[label]))
                ]
                for label in both
            ]
            chosen = self._tests[index] = np.sort(np.concatenate(picked))
        x, y = self._data.x_test[chosen], self._data.y_test[chosen]
        return Examples(self._data.normalise(x), torch.from_numpy(y))

    def public(self) -> Examples:
        """Return the shared training examples; x: float32 [n, C, H, W], read-only.

        Raises:
            ProblemError: there are none; or as `client`.
            DataError: the data set is missing or damaged.
        """
        if not self.public_examples:
            raise ProblemError(
                "expected a problem with public examples, got none: set problem.public"
            )
        part = np.sort(self._order[: self.public_examples])
        x, y = self._data.x_train[part], self._data.y_train[part]
        return Examples(self._data.normalise(x), torch.from_numpy(y))

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy; outputs: logits [n, classes], y: int64 [n]."""
        return F.cross_entropy(outputs, y)

    def metrics(self, outputs: Tensor, y: Tensor) -> Mapping[str, float]:
        """Return ``loss``, the mean cross-entropy, and ``accuracy``, from 0 to 1."""
        correct = (outputs.argmax(dim=1) == y).float().mean()
        return {"loss": self.loss(outputs, y).item(), "accuracy": correct.item()}

    def metric_range(self, name: str) -> tuple[float, float]:
        """Return 0 to 1 for ``accuracy``."""
        return (0.0, 1.0) if name == "accuracy" else super().metric_range(name)

    @cached_property
    def _partition(self) -> Partition:
        try:
            return build(self.partition, PARTITIONS, "partition")
        except SpecError as error:
            raise ProblemError(f"partition: {error}") from None

    @cached_property
    def _data(self) -> DataSet:
        return load_dataset(self.name)

    def _check(self, index: int) -> None:
        if not 0 <= index < self.clients + self.held_out:
            last = self.clients + self.held_out - 1
            raise ProblemError(f"expected a client from 0 to {last}, got {index}")

    @cached_property
    def _order(self) -> Indices:
        """Return the indices of all training examples, shuffled."""
        return np.random.default_rng((self.seed, 0)).permutation(len(self._data.y_train))

    def _part(self, index: int) -> Indices:
        """Return the indices of a client's training examples, sorted."""
        return self._chosen[self._parts[index]]

    @cached_property
    def _chosen(self) -> Indices:
        """Return the indices of the training examples of all clients, sorted."""
        first, total = self.public_examples, len(self._data.y_train)
        left = total - first
        if left < (self.examples or 0) or left < 1:
            raise ProblemError(
                f"examples: expected at most {left} of data set {self.name!r} with {first} public "
                f"ones, got {self.examples}"
            )
        if self.examples is None and not first:
            return np.arange(total)
        count = left if self.examples is None else self.examples
        return np.sort(self._order[first : first + count])

    @cached_property
    def _parts(self) -> Sequence[Indices]:
        """Return the places of each client's examples in `_chosen`."""
        labels, writers = self._data.y_train[self._chosen], self._data.writers
        writers = None if writers is None else writers[self._chosen]
        deal = np.random.default_rng((self.seed, 1))
        return self._partition(labels, writers, self.clients + self.held_out, deal)

    @cached_property
    def _tests(self) -> dict[int, Indices]:
        return {}

    @cached_property
    def _cache(self) -> _ExampleCache:
        return _ExampleCache()

    @cached_property
    def _test(self) -> Examples:
        x, y = self._data.x_test, self._data.y_test
        return Examples(self._data.normalise(x), torch.tensor(y))
