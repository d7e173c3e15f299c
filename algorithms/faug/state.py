"""FAug's state: phases of devices, seeds, the generator, and the learning algorithm's state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmq.algorithms.base import OpaqueAccumulator, OpaqueState, Payload
from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.faug.augmentation import Gan
from fedmq.algorithms.problems.base import Problem
from fedmq.algorithms.toolkit.layout import expect_tensor
from fedmq.algorithms.toolkit.states import take
from fedmq.codecs.text import shorten

_LARGEST_PIXEL = 50.0
"""Limit of a normalised pixel: a larger one would leave the others no contrast."""
_THEN = "then."


@dataclass(frozen=True)
class AugState:
    """One version.

    then: state of the algorithm that learns.
    given, served: int64 [M], 1 for a device that has sent seeds, or has filled its targets.
    seeds: by device, (float32 [m, C, H, W], int64 [m]); empty once the generator is trained.
    gan: the generator; None until it is trained.
    shape, classes: shape of an example, and L.
    """

    then: OpaqueState
    given: Tensor
    served: Tensor
    seeds: Mapping[int, tuple[Tensor, Tensor]]
    gan: Gan | None
    shape: tuple[int, ...]
    classes: int


@dataclass
class AugAccumulator:
    """Results for the next version, by phase.

    then: accumulator of the algorithm that learns.
    seeds, served: seeds by device, and devices that have filled their targets.
    weight, total: sum of the weights of the learning algorithm's results, and of all.
    """

    then: OpaqueAccumulator
    seeds: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    served: set[int] = field(default_factory=set)
    weight: float = 0.0
    total: float = 0.0


def seeds_of(state: AugState, payload: Payload, most: int) -> tuple[Tensor, Tensor]:
    """Return a device's seeds, at most ``most`` of a label.

    Raises:
        ResultError: they are not labelled images of this problem, or too many.
    """
    found = payload.features
    check_empty(dataclasses.replace(payload, features={}))
    if not found:
        return torch.zeros((0, *state.shape)), torch.zeros(0, dtype=torch.int64)
    if set(found) != {"features", "ids", "labels"}:
        raise ResultError(f"expected features, ids and labels, got {shorten(sorted(found))}")
    x, y = found["features"], found["labels"]
    expect_tensor("labels", y, torch.int64, (len(x),))
    expect_tensor("features", x, torch.float32, (len(x), *state.shape))
    if not len(y) or int(y.min()) < 0 or int(y.max()) >= state.classes:
        raise ResultError(f"expected seeds with labels from 0 to {state.classes - 1}")
    if int(y.bincount().max()) > most:
        raise ResultError(f"expected at most {most} seeds of a label")
    if not bool((x.abs() <= _LARGEST_PIXEL).all()):  # NaN is not less
        raise ResultError(f"expected pixels of at most {_LARGEST_PIXEL:g} in magnitude")
    return x, y


def check_empty(payload: Payload) -> None:
    """Raise ResultError if a payload has tensors."""
    found = [*payload.weights, *payload.exact, *payload.features, *payload.logits]
    if found:
        raise ResultError(f"expected no tensors, got {shorten(sorted(found))}")


def save_aug_state(state: AugState, then: Payload) -> Payload:
    """Return a state for a checkpoint. then: saved state of the algorithm that learns."""
    devices = sorted(state.seeds)
    each = [state.seeds[device] for device in devices]
    nothing = (torch.zeros((0, *state.shape)), torch.zeros(0, dtype=torch.int64))
    exact = {
        "given": state.given,
        "served": state.served,
        "seeds.of": torch.tensor(devices, dtype=torch.int64),
        "seeds.sizes": torch.tensor([len(y) for _, y in each], dtype=torch.int64),
        "seeds.x": torch.cat([nothing[0], *(x for x, _ in each)]),
        "seeds.y": torch.cat([nothing[1], *(y for _, y in each)]),
    }
    exact |= {f"{_THEN}weights.{name}": tensor for name, tensor in then.weights.items()}
    exact |= {f"{_THEN}exact.{name}": tensor for name, tensor in then.exact.items()}
    numbers = {f"{_THEN}{name}": number for name, number in then.numbers.items()}
    if state.gan is None:
        return Payload(exact=exact, numbers=numbers)
    # Its weights alone are in this group, with the same bytes as in a task.
    gan = state.gan.payload()
    exact |= {f"gan.{name}": tensor for name, tensor in gan.exact.items()}
    return Payload(gan.weights, exact, {**numbers, **gan.numbers})


def inner_saved(saved: Payload) -> Payload:
    """Return the saved state of the algorithm that learns."""
    weights, exact = (take(dict(saved.exact), f"{_THEN}{group}.") for group in ("weights", "exact"))
    return Payload(weights, exact, take(dict(saved.numbers), _THEN))


def load_aug_state(
    first: AugState,
    then: OpaqueState,
    saved: Payload,
    problem: Problem,
    widths: tuple[int, int, int],
) -> AugState:
    """Return a saved state. first: state of version 0; then: state of the algorithm that learns.

    Raises:
        ResultError: it is not a state of this problem.
    """
    exact = saved.exact
    names = ("given", "served", "seeds.of", "seeds.sizes", "seeds.x", "seeds.y")
    if absent := [name for name in names if name not in exact]:
        raise ResultError(f"expected a tensor {absent[0]!r}, it is missing")
    given, served, of, sizes, x, y = (exact[name] for name in names)
    devices = len(first.given)
    expect_tensor("given", given, torch.int64, (devices,))
    expect_tensor("served", served, torch.int64, (devices,))
    expect_tensor("seeds.of", of, torch.int64, (sizes.numel(),))
    expect_tensor("seeds.sizes", sizes, torch.int64, (sizes.numel(),))
    expect_tensor("seeds.y", y, torch.int64, (y.numel(),))
    expect_tensor("seeds.x", x, torch.float32, (y.numel(), *first.shape))
    lengths = sizes.tolist()
    if sum(lengths) != len(y) or any(length < 0 for length in lengths):
        raise ResultError(f"expected seeds.sizes with a sum of {len(y)}, got {shorten(lengths)}")
    if any(not 0 <= device < devices for device in of.tolist()):
        raise ResultError(f"expected seeds of devices from 0 to {devices - 1}")
    parts = zip(torch.split(x, lengths), torch.split(y, lengths), strict=True)
    seeds = dict(zip(of.tolist(), parts, strict=True))
    gan = None
    if saved.weights:
        part = Payload(saved.weights, take(dict(exact), "gan."), saved.numbers)
        gan = Gan.of(part, problem, widths)
    return AugState(then, given, served, seeds, gan, first.shape, first.classes)
