"""What FAug is made of beside its phases: the generator as it travels, what a device keeps of
it, which labels a device lacks, and what its labels leak (Jeong et al., 2018, section 3).
"""  # noqa: D205 - one sentence

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedmq.algorithms.base import Client, Payload
from fedmq.algorithms.faug.cgan import GanSettings, make_generator, make_images, train_gan
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.toolkit.flat_model import FlatModel
from fedmq.algorithms.toolkit.layout import Layout
from fedmq.algorithms.toolkit.sgd import spans
from fedmq.algorithms.toolkit.states import load_state, save_state, saved

V = TypeVar("V")
OWN = "faug."
"""What begins the names of what a device keeps beside its model."""
_BATCH = 500


# ---- privacy leakage


def device_server_leakage(targets: int, redundant: int) -> float:
    """Return |L_t| / (|L_t| + |L_r|), what the server learns of a device's target labels.

    0 where the device has shown none.
    """
    return targets / (targets + redundant) if targets else 0.0


def inter_device_leakage(targets: int, union: int) -> float:
    """Return |L_t| / |union over devices j of L_t^j and L_r^j|, what other devices learn.

    They see which labels the generator makes, ``union`` of them; with all L, it is the least
    there can be, |L_t| / L. 0 where there is no generator.
    """
    return targets / union if targets and union else 0.0


def leakage_of(local: Payload | None) -> dict[str, float]:
    """Return both leakages by what a device keeps: 0 before it has shown anything."""
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
    labels: int64 [u], rising: those that it was trained on.
    low, high: the pixel values that its -1 and 1 stand for.
    """

    layout: Layout
    weights: Tensor
    counters: Tensor
    labels: Tensor = field(metadata=saved(any_length=True))
    low: float
    high: float

    @classmethod
    def trained(cls, x: Tensor, y: Tensor, classes: int, settings: GanSettings, seed: int) -> Gan:
        """Return one trained on seeds; their darkest and brightest pixels are -1 and 1.

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
        """Return it as it travels: what is trained by the codec, the rest exactly."""
        return save_state(self)

    @classmethod
    def of(cls, payload: Payload, problem: Problem, widths: tuple[int, int, int]) -> Gan:
        """Return the generator in a payload.

        Raises:
            ResultError: it is not one of this problem and these widths.
        """
        layout = Layout.of(make_generator(problem.shape, problem.classes, widths))
        empty = torch.zeros(0, dtype=torch.int64)
        return load_state(cls(layout, empty, empty, empty, 0.0, 0.0), payload)

    def make(
        self, labels: Tensor, problem: Problem, widths: tuple[int, int, int], seed: int
    ) -> Tensor:
        """Return an image of each label, uint8 [n, C, H, W]: a quarter of the memory."""
        generator = make_generator(problem.shape, problem.classes, widths)
        FlatModel(generator).load(self.weights, self.counters)
        images = make_images(generator, labels, seed)
        return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---- at the device


def split_labels(y: Tensor, classes: int, scarce: float) -> tuple[list[int], list[int]]:
    """Return a device's target labels and the others.

    A label is a target if the device has fewer samples of it than ``scarce`` times its mean
    number by label. y: int64 [n].
    """
    few = torch.bincount(y, minlength=classes) < scarce * len(y) / classes
    return few.nonzero()[:, 0].tolist(), (~few).nonzero()[:, 0].tolist()


def missing(y: Tensor, classes: int, scarce: float) -> dict[int, int]:
    """Return how many samples a device lacks of each target to be IID.

    It then has as many as of the mean label that is no target.
    """
    counts = torch.bincount(y, minlength=classes)
    targets, others = split_labels(y, classes, scarce)
    wanted = round(float(counts[others].double().mean())) if others else 0
    return {label: wanted - int(counts[label]) for label in targets if counts[label] < wanted}


def filled(client: Client) -> Examples:
    """Return a device's samples: its own, and those that it has made."""
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
    """Return what the algorithm that learns has kept, without what FAug has."""
    if local is None or not local.weights:
        return None
    exact = {name: each for name, each in local.exact.items() if not name.startswith(OWN)}
    return Payload(local.weights, exact)


def own_local(local: Payload | None) -> Payload | None:
    """Return what FAug has kept, without what the algorithm that learns has."""
    if local is None:
        return None
    return Payload(exact=_with_prefix(local.exact), numbers=local.numbers)


def joined(inner: Payload | None, own: Payload | None) -> Payload | None:
    """Return both as one."""
    if inner is None or own is None:
        return inner or own
    exact = {**inner.exact, **own.exact}
    return dataclasses.replace(inner, exact=exact, numbers=own.numbers)


def under(values: Mapping[str, V], prefix: str) -> dict[str, V]:
    """Return the values whose names begin so, by the rest of their names."""
    return {name[len(prefix) :]: each for name, each in values.items() if name.startswith(prefix)}


def _with_prefix(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: each for name, each in values.items() if name.startswith(OWN)}


# ---- federated averaging in its place


@dataclass(frozen=True)
class Averaging(FedAvg):
    """FedAvg whose clients do about as many steps as devices in federated distillation do.

    iterations: rounded to whole epochs, at least one; None: ``epochs``.
    """

    iterations: int | None = None

    def local_epochs(self, client: Client) -> int:
        """Return how many epochs come closest to the steps."""
        if self.iterations is None:
            return self.epochs
        n = len(client.data)
        return max(1, round(self.iterations / len(spans(n, self.batch_size or n))))


def share_metrics(module: nn.Module, client: Client) -> dict[str, float]:
    """Return a module's metrics on every K-th test example, from the client's number on.

    The mean over K clients is over the whole test set, if K divides it.
    """
    problem = client.problem
    data, first = problem.test(), client.index % problem.clients
    x, y = data.x[first :: problem.clients], data.y[first :: problem.clients]
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    module.eval()
    with torch.no_grad():
        for start in range(0, len(y), _BATCH):
            part = x[start : start + _BATCH].to(client.device)
            of = y[start : start + _BATCH].to(client.device)
            for name, value in problem.metrics(module(part), of).items():
                sums[name] = sums.get(name, 0.0) + value * len(of)
                counts[name] = counts.get(name, 0) + len(of)
    return {name: value / counts[name] for name, value in sums.items()}
