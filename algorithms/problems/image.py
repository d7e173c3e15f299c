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
from fedmq.codecs.spec import build, unknown

CACHE_BYTES = 1 << 30
"""Clients' float32 examples are kept up to this size in all; later ones are converted anew."""


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

    def __post_init__(self) -> None:
        if self.name not in DATASETS:
            raise ProblemError(f"name: {unknown('data set', self.name, DATASETS)}")
        if self.model_name not in MODELS:
            raise ProblemError(f"model: {unknown('model', self.model_name, MODELS)}")
        if self.clients < 1:
            raise ProblemError(f"clients: expected at least 1, got {self.clients}")
        if not 0 <= self.seed < 1 << 63:
            raise ProblemError(f"seed: expected 0 to 2**63 - 1, got {self.seed}")
        if self.examples is not None and self.examples < self.clients:
            raise ProblemError(
                f"examples: expected at least one for each of {self.clients} clients, "
                f"got {self.examples}"
            )
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
        if not 0 <= index < self.clients:
            raise ProblemError(
                f"client {index} is out of range: this problem has {self.clients} clients, "
                f"0 to {self.clients - 1}"
            )
        kept = self._kept.get(index)
        if kept is None:
            part = self._parts[index]
            kept = Examples(
                self._data.normalise(self._data.x_train[part]),
                torch.from_numpy(self._data.y_train[part]),
            )
            if sum(each.x.nbytes for each in self._kept.values()) + kept.x.nbytes <= CACHE_BYTES:
                self._kept[index] = kept
        return kept

    def test(self) -> Examples:
        """Return the test examples; x: float32 [n, C, H, W], not to be changed.

        Raises:
            DataError: the data set is not there.
        """
        return self._test

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

    @cached_property
    def _parts(self) -> list[Indices]:
        choose, deal = (np.random.default_rng((self.seed, stream)) for stream in range(2))
        labels, writers = self._data.y_train, self._data.writers
        chosen = np.arange(len(labels))
        if self.examples is not None:
            if self.examples > len(labels):
                raise ProblemError(
                    f"examples: data set {self.name!r} has {len(labels)}, got {self.examples}"
                )
            chosen = np.sort(choose.permutation(len(labels))[: self.examples])
            labels = labels[chosen]
            writers = None if writers is None else writers[chosen]
        return [chosen[part] for part in self._dealer(labels, writers, self.clients, deal)]

    @cached_property
    def _kept(self) -> dict[int, Examples]:
        return {}

    @cached_property
    def _test(self) -> Examples:
        x, y = self._data.x_test, self._data.y_test
        return Examples(self._data.normalise(x), torch.tensor(y))
