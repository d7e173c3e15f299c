"""Image classification: one of the data sets, dealt to clients, and one of the models."""

from __future__ import annotations

from collections.abc import Mapping
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
from fedmq.algorithms.problems.partitions import PARTITIONS, Indices, Partition
from fedmq.codecs.errors import SpecError
from fedmq.codecs.spec import build
from fedmq.codecs.text import unknown

CACHE_BYTES = 1 << 30
"""Clients' float32 examples are kept up to this size in all; later ones are converted anew."""


class _Kept:
    """Examples of clients, as many as there is room for."""

    def __init__(self) -> None:
        self._nbytes = 0
        self._examples: dict[int, Examples] = {}

    def get(self, index: int) -> Examples | None:
        """Return a client's examples, if they are here."""
        return self._examples.get(index)

    def keep(self, index: int, examples: Examples) -> None:
        """Keep them if they fit; their size is counted once."""
        if self._nbytes + examples.x.nbytes <= CACHE_BYTES:
            self._nbytes += examples.x.nbytes
            self._examples[index] = examples


@dataclass(frozen=True)
class ImageClassification(Problem):
    """A classification problem on images, divided among clients.

    Names and numbers are checked at construction; data are read, and downloaded where
    they are not there yet, only when examples are asked for.

    Raises:
        ProblemError: at construction, for a field that is unknown, out of range or does
            not fit the others; the message begins with the name of the field.
    """

    name: str
    """The data set, a key of `DATASETS`."""
    model_name: str
    """The model, a key of `MODELS`."""
    clients: int
    """Number of clients, K."""
    partition: str
    """How the examples are dealt, a spec of `PARTITIONS` such as ``"dirichlet(0.5)"``."""
    seed: int
    """What the model's first parameters, the choice of examples and the partition depend on."""
    examples: int | None = None
    """Deal only so many training examples, chosen at random; the test examples stay all."""
    held_out: int = 0
    """Deal to so many clients more, which never train; their numbers come after the others."""
    public_examples: int = 0
    """Set so many training examples aside, chosen at random, for all to share."""

    def __post_init__(self) -> None:
        if self.name not in DATASETS:
            raise ProblemError(f"name: {unknown('data set', self.name, DATASETS)}")
        if self.model_name not in MODELS:
            raise ProblemError(f"model: {unknown('model', self.model_name, MODELS)}")
        if self.clients < 1:
            raise ProblemError(f"clients: expected at least 1, got {self.clients}")
        if not 0 <= self.seed < 1 << 63:
            raise ProblemError(f"seed: expected 0 to 2**63 - 1, got {self.seed}")
        hands = self.clients + self.held_out
        if self.examples is not None and self.examples < hands:
            raise ProblemError(
                f"examples: expected at least one for each of {hands} clients, got {self.examples}"
            )
        for key, value in (("held_out", self.held_out), ("public", self.public_examples)):
            if value < 0:
                raise ProblemError(f"{key}: expected at least 0, got {value}")
        needs_writers = self._dealer.needs_writers
        if needs_writers and DATASETS[self.name].read_writers is None:
            known = ", ".join(name for name, source in DATASETS.items() if source.read_writers)
            raise ProblemError(
                f"partition: {self.partition!r} needs to know who wrote each example, which "
                f"data set {self.name!r} does not say; choose from {known}"
            )
        try:
            self.model()
        except ProblemError as error:
            raise ProblemError(f"model: {error}") from None

    def model(self) -> nn.Module:
        """Return a freshly initialised model; the same values at every call.

        Nobody else's random numbers change.
        """
        source = DATASETS[self.name]
        # torch.manual_seed would reseed every GPU too, which fork_rng does not undo here.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(self.seed)
            return MODELS[self.model_name](source.shape, source.classes)

    def client(self, index: int) -> Examples:
        """Return the training examples of one client; x: float32 [n, C, H, W], not to be changed.

        Raises:
            ProblemError: there is no such client, or the data cannot be dealt as asked.
            DataError: the data set is not there.
        """
        self._check(index)
        kept = self._kept.get(index)
        if kept is None:
            part = self._parts[index]
            kept = Examples(
                self._data.normalise(self._data.x_train[part]),
                torch.from_numpy(self._data.y_train[part]),
            )
            self._kept.keep(index, kept)
        return kept

    def test(self) -> Examples:
        """Return the test examples; x: float32 [n, C, H, W], not to be changed.

        Raises:
            DataError: the data set is not there.
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
        """Return the test examples of one client; x: float32 [n, C, H, W], not to be changed.

        Their classes are in the proportions of the client's training examples, as exactly as
        whole numbers allow, and there are at most as many. They are drawn from all test
        examples, so clients may share some.

        Raises:
            ProblemError, DataError: as `client`.
        """
        self._check(index)
        chosen = self._tests.get(index)
        if chosen is None:
            trained = np.bincount(self._data.y_train[self._parts[index]], minlength=self.classes)
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
        """Return the shared training examples; x: float32 [n, C, H, W], not to be changed.

        Raises:
            ProblemError: there are none; or as `client`.
            DataError: the data set is not there.
        """
        if not self.public_examples:
            raise ProblemError("this problem has no public examples: set problem.public")
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

    @cached_property
    def _dealer(self) -> Partition:
        try:
            return build(self.partition, PARTITIONS, "partition")
        except SpecError as error:
            raise ProblemError(f"partition: {error}") from None

    @cached_property
    def _data(self) -> DataSet:
        return load_dataset(self.name)

    def _check(self, index: int) -> None:
        if not 0 <= index < self.clients + self.held_out:
            also = f", and {self.held_out} that never train" if self.held_out else ""
            raise ProblemError(
                f"client {index} is out of range: this problem has {self.clients} clients, "
                f"0 to {self.clients - 1}{also}"
            )

    @cached_property
    def _order(self) -> Indices:
        """All training examples, shuffled."""
        return np.random.default_rng((self.seed, 0)).permutation(len(self._data.y_train))

    @cached_property
    def _parts(self) -> list[Indices]:
        labels, writers = self._data.y_train, self._data.writers
        first, beside = self.public_examples, ""
        left = len(labels) - first
        if first:
            beside = f" beside {first} public ones"
        if left < (self.examples or 0) or left < 1:
            raise ProblemError(
                f"examples: data set {self.name!r} has {left}{beside}, got {self.examples}"
            )
        chosen = np.arange(len(labels))
        if self.examples is not None or first:
            count = left if self.examples is None else self.examples
            chosen = np.sort(self._order[first : first + count])
            labels = labels[chosen]
            writers = None if writers is None else writers[chosen]
        deal = np.random.default_rng((self.seed, 1))
        hands = self._dealer(labels, writers, self.clients + self.held_out, deal)
        return [chosen[part] for part in hands]

    @cached_property
    def _tests(self) -> dict[int, Indices]:
        return {}

    @cached_property
    def _kept(self) -> _Kept:
        return _Kept()

    @cached_property
    def _test(self) -> Examples:
        x, y = self._data.x_test, self._data.y_test
        return Examples(self._data.normalise(x), torch.tensor(y))
