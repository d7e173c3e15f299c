"""Parts of FAug (Jeong et al., 2018, section 3): the generator, missing labels, privacy leakage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedmq.algorithms.base import Client, Payload
from fedmq.algorithms.faug.cgan import GanSettings, make_generator, make_images, train_gan
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.toolkit.flat_model import FlatModel
from fedmq.algorithms.toolkit.layout import Layout
from fedmq.algorithms.toolkit.sgd import metrics_on, spans
from fedmq.algorithms.toolkit.states import SavedAs, load_state, save_state

OWN = "faug."
"""Prefix of the names of FAug's own local state."""


# ---- privacy leakage


def device_server_leakage(targets: int, redundant: int) -> float:
    """Return |L_t| / (|L_t| + |L_r|), what the server learns of a device's target labels.

    0 if the device has sent no seeds of target labels.
    """
    return targets / (targets + redundant) if targets else 0.0


def inter_device_leakage(targets: int, union: int) -> float:
    """Return |L_t| / |union over devices j of L_t^j and L_r^j|, what other devices learn.

    They see the labels that the generator makes, ``union`` of them; with all L, the leakage is
    smallest, |L_t| / L. 0 without a generator.
    """
    return targets / union if targets and union else 0.0


def leakage_of(local: Payload | None) -> dict[str, float]:
    """Return both leakages of a device, from its local state."""
    numbers = {} if local is None else local.numbers
    targets, redundant, union = (
        int(numbers.get(f"{OWN}{name}", 0)) for name in ("targets", "redundant", "union")
    )
    return {
        "leakage_device_server": device_server_leakage(targets, redundant),
        "leakage_inter_device": inter_device_leakage(targets, union),
    }


# ---- the generator


@dataclass(frozen=True)
class Gan:
    """A trained generator.

    weights: float32 [dim]; counters: int64, of its BatchNorms.
    labels: int64 [u], ascending, the labels that it was trained on.
    low, high: pixel values of its outputs -1 and 1.
    """

    layout: Layout
    weights: Tensor
    counters: Tensor
    labels: Tensor = field(metadata=SavedAs(any_length=True).field)
    low: float
    high: float

    @classmethod
    def trained(cls, x: Tensor, y: Tensor, classes: int, settings: GanSettings, seed: int) -> Gan:
        """Return a generator trained on seeds, whose darkest and brightest pixels become -1 and 1.

        x: float32 [n, C, H, W]; y: int64 [n].
        """
        low = float(x.min())
        high = max(float(x.max()), low + 1e-3)
        scaled = (x - low) / (high - low) * 2 - 1
        flat = FlatModel(train_gan(scaled, y, classes, settings, seed))
        labels = torch.bincount(y).nonzero()[:, 0]
        weights = flat.weights.detach().clone()
        return cls(flat.layout, weights, flat.read_counters(), labels, low, high)

    def payload(self) -> Payload:
        """Return the generator as a payload: trained weights for the codec, the rest exactly."""
        return save_state(self)

    @classmethod
    def of(cls, payload: Payload, problem: Problem, widths: tuple[int, int, int]) -> Gan:
        """Return the generator in a payload.

        Raises:
            ResultError: it is not a generator of this problem and these widths.
        """
        layout = Layout.of(make_generator(problem.shape, problem.classes, widths))
        empty = torch.zeros(0, dtype=torch.int64)
        return load_state(cls(layout, empty, empty, empty, 0.0, 0.0), payload)

    def make(
        self, labels: Tensor, problem: Problem, widths: tuple[int, int, int], seed: int
    ) -> Tensor:
        """Return an image of each label, uint8 [n, C, H, W], a quarter of float32's memory."""
        generator = make_generator(problem.shape, problem.classes, widths)
        FlatModel(generator).load(self.weights, self.counters)
        images = make_images(generator, labels, seed)
        return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---- at the device


def split_labels(y: Tensor, classes: int, scarce: float) -> tuple[list[int], list[int]]:
    """Return a device's target labels and the others.

    A label is a target if the device has fewer samples of it than ``scarce`` times its mean number
    a label. y: int64 [n].
    """
    few = torch.bincount(y, minlength=classes) < scarce * len(y) / classes
    return few.nonzero()[:, 0].tolist(), (~few).nonzero()[:, 0].tolist()


def missing(y: Tensor, classes: int, scarce: float) -> dict[int, int]:
    """Return the number of samples that a device lacks of each target label.

    With them it has as many as of its other labels on average.
    """
    counts = torch.bincount(y, minlength=classes)
    targets, others = split_labels(y, classes, scarce)
    wanted = round(float(counts[others].double().mean())) if others else 0
    return {label: wanted - int(counts[label]) for label in targets if counts[label] < wanted}


def filled(client: Client) -> Examples:
    """Return a device's own and generated samples."""
    made = {} if client.local is None else _with_prefix(client.local.exact)
    if not made or not len(made[f"{OWN}labels"]):
        return client.data
    numbers = {} if client.local is None else client.local.numbers
    low, high = float(numbers[f"{OWN}low"]), float(numbers[f"{OWN}high"])
    images = made[f"{OWN}images"].float() / 255 * (high - low) + low
    x, y = client.data.x, client.data.y
    return Examples(
        torch.cat([x, images.to(x.device)]), torch.cat([y, made[f"{OWN}labels"].to(y.device)])
    )


def inner_local(local: Payload | None) -> Payload | None:
    """Return the learning algorithm's part of a local state."""
    if local is None or not local.weights:
        return None
    exact = {name: each for name, each in local.exact.items() if not name.startswith(OWN)}
    return Payload(local.weights, exact)


def own_local(local: Payload | None) -> Payload | None:
    """Return FAug's part of a local state."""
    if local is None:
        return None
    return Payload(exact=_with_prefix(local.exact), numbers=local.numbers)


def joined(inner: Payload | None, own: Payload | None) -> Payload | None:
    """Return both parts as one local state."""
    if inner is None or own is None:
        return inner or own
    exact = {**inner.exact, **own.exact}
    return dataclasses.replace(inner, exact=exact, numbers=own.numbers)


def _with_prefix(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: each for name, each in values.items() if name.startswith(OWN)}


# ---- federated averaging instead of distillation


@dataclass(frozen=True)
class Averaging(FedAvg):
    """FedAvg whose clients take about as many steps as devices in federated distillation.

    iterations: steps, rounded to whole epochs, at least one; None: ``epochs`` decides.
    """

    iterations: int | None = None

    def local_epochs(self, client: Client) -> int:
        """Return the number of epochs that comes closest to ``iterations``."""
        if self.iterations is None:
            return self.epochs
        n = len(client.data)
        return max(1, round(self.iterations / len(spans(n, self.batch_size or n))))


def share_metrics(module: nn.Module, client: Client) -> dict[str, float]:
    """Return a module's metrics on every K-th test example, starting at the client's index.

    If K divides the test set, the mean over K clients is that over the whole set.
    """
    problem = client.problem
    data, first = problem.test(), client.index % problem.clients
    x, y = data.x[first :: problem.clients], data.y[first :: problem.clients]
    return metrics_on(module, problem, Examples(x, y), client.device)
