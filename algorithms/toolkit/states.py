"""Save and load the states of algorithms: dataclasses of tensors, numbers and nested dataclasses.

What a state holds is derived from its fields, and what a saved state must look like from another
state of the same problem, such as that of version 0:

- a tensor or a numpy array: of the same dtype and shape, its floating-point values finite;
- a whole number: at least 0; a float: finite;
- a map from names to tensors: of the same names, each like the other's;
- a dataclass: saved by the same rules, with the field's name and a dot before each name;
- a dataclass with a `Layout`, ``weights`` and ``counters``: a model, whose weights and counters are
  saved by the tensors' own names (`Layout.write`). Layouts themselves are not saved.

A field declares what differs with ``field(metadata=SavedAs(...).field)``, or with
``field(metadata=DERIVED)`` that it is not saved.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from fedmq.algorithms.errors import AlgorithmError, Fault, ResultError
from fedmq.algorithms.tasks import Payload
from fedmq.algorithms.toolkit.layout import Layout, expect_tensor, misfit
from fedmq.codecs.text import shorten

T = TypeVar("T")
V = TypeVar("V")

_KEY = "saved"
_LARGEST = 10**12
"""Of a whole number: honest counts stay far below."""


@dataclasses.dataclass(frozen=True)
class SavedAs:
    """How a field is saved, if not by default.

    group: group of the payload, for tensors.
    prefix: prefix of the names in a map of tensors.
    least: smallest value of a tensor's elements.
    most: largest magnitude of a tensor's elements.
    finite: whether a tensor must hold no infinity and no NaN.
    any_length: whether a tensor may be longer or shorter in its first dimension.
    """

    group: Literal["weights", "exact"] = "exact"
    prefix: str = ""
    least: float = -math.inf
    most: float = math.inf
    finite: bool = True
    any_length: bool = False

    @property
    def field(self) -> dict[str, SavedAs]:
        """Return the metadata of such a field."""
        return {_KEY: self}


DERIVED = {_KEY: None}
"""Metadata of a field that is not saved: it follows from the problem or from other fields."""


def save_state(state: object) -> Payload:
    """Return everything that is in a state, without copies of its tensors.

    Raises:
        AlgorithmError: it is no dataclass, or has a field of an unsupported type.
    """
    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "exact": {}}
    numbers: dict[str, int | float | str] = {}
    if (model := _model_in(state)) is not None:
        whole = model.layout.write(model.weights, model.counters)
        groups = {"weights": dict(whole.weights), "exact": dict(whole.exact)}
    for name, how, value in _fields(state):
        if isinstance(value, int | float):
            numbers[name] = value
        elif dataclasses.is_dataclass(value):
            inner = save_state(value)
            for group, tensors in (("weights", inner.weights), ("exact", inner.exact)):
                groups[group] |= {f"{name}.{key}": each for key, each in tensors.items()}
            numbers |= {f"{name}.{key}": each for key, each in inner.numbers.items()}
        else:
            groups[how.group] |= _named(name, how, value)
    return Payload(groups["weights"], groups["exact"], numbers)


def load_state(like: T, found: Payload) -> T:
    """Return the state that `save_state` was called on.

    Args:
        like: a state of the same algorithm and problem; what is not saved is taken from it.
        found: what `save_state` returned.

    Raises:
        ResultError: a tensor or number is missing, of another shape or dtype, or out of range.
    """
    groups = {"weights": dict(found.weights), "exact": dict(found.exact)}
    values: dict[str, object] = {}
    for name, how, value in _fields(like):
        if isinstance(value, float):
            values[name] = expect_float(name, found.numbers)
        elif isinstance(value, int):
            values[name] = expect_count(name, found.numbers)
        elif dataclasses.is_dataclass(value):
            weights, exact = (take(groups[key], f"{name}.") for key in ("weights", "exact"))
            numbers = take(dict(found.numbers), f"{name}.")
            values[name] = load_state(value, Payload(weights, exact, numbers))
        else:
            tensors = groups[how.group]
            loaded = {
                key: _checked(key, tensors.pop(key, None), each, how)
                for key, each in _named(name, how, value).items()
            }
            match value:
                case Tensor():
                    values[name] = loaded[name]
                case np.ndarray():
                    values[name] = loaded[name].numpy().copy()
                case _:
                    values[name] = {key.removeprefix(how.prefix): loaded[key] for key in loaded}
    if (model := _model_in(like)) is not None:
        rest = Payload(groups["weights"], groups["exact"])
        values["weights"], values["counters"] = model.layout.read(rest)
    elif extra := sorted({*groups["weights"], *groups["exact"]}):
        raise misfit(f"expected no tensor {shorten(extra[0])}")
    return cast("T", dataclasses.replace(cast("Any", like), **values))


def expect_count(name: str, numbers: Mapping[str, object], end: int = _LARGEST) -> int:
    """Return a whole number that must be among these, from 0 to ``end`` - 1.

    Raises:
        ResultError: it is not.
    """
    value = numbers.get(name)
    if type(value) is not int or not 0 <= value < end:
        raise ResultError(f"expected {name} from 0 to {end - 1}, got {shorten(value)}")
    return value


def expect_float(name: str, numbers: Mapping[str, object], most: float = 1e300) -> float:
    """Return a float that must be among these, of at most this magnitude.

    Raises:
        ResultError: it is not.
    """
    value = numbers.get(name)
    if type(value) is not float or not abs(value) <= most:
        raise ResultError(f"expected {name} as a finite number, got {shorten(value)}")
    return value


def _model_in(state: object) -> Any:
    """Return the state if it is a model, that is, has a layout, weights and counters."""
    is_model = isinstance(getattr(state, "layout", None), Layout) and hasattr(state, "weights")
    return state if is_model else None


def _fields(state: object) -> Iterator[tuple[str, SavedAs, object]]:
    """Yield the fields to save, without the weights and counters of a model."""
    if not dataclasses.is_dataclass(state):
        kind = type(state).__name__
        raise AlgorithmError(f"expected a dataclass as state, got {kind!r}: override save and load")
    model = () if _model_in(state) is None else ("weights", "counters")
    for each in dataclasses.fields(state):
        how, value = each.metadata.get(_KEY, SavedAs()), getattr(state, each.name)
        if how is not None and each.name not in model and not isinstance(value, Layout):
            yield each.name, how, value


def _named(name: str, how: SavedAs, value: object) -> dict[str, Tensor]:
    match value:
        case Tensor():
            return {name: value}
        case np.ndarray():
            return {name: torch.from_numpy(value.copy())}
        case Mapping():
            return {how.prefix + key: each for key, each in value.items()}
    kind = type(value).__name__
    raise AlgorithmError(f"cannot save field {name!r} of type {kind!r}: override save and load")


def take(values: dict[str, V], prefix: str) -> dict[str, V]:
    """Remove the values whose names begin with a prefix; return them by the rest of the names."""
    found = [name for name in values if name.startswith(prefix)]
    return {name.removeprefix(prefix): values.pop(name) for name in found}


def _checked(name: str, tensor: Tensor | None, like: Tensor, how: SavedAs) -> Tensor:
    shape = tuple(like.shape)
    if how.any_length and tensor is not None:
        shape = (len(tensor) if tensor.dim() else 0, *shape[1:])
    tensor = expect_tensor(name, tensor, like.dtype, shape)
    if how.finite and tensor.is_floating_point() and not tensor.isfinite().all():
        raise ResultError(f"expected finite values of {name}", Fault.NOT_FINITE)
    if how.least > -math.inf and bool((tensor < how.least).any()):
        raise ResultError(f"expected values of {name} of at least {how.least:g}")
    if how.most < math.inf and bool((tensor.abs() > how.most).any()):
        raise ResultError(f"expected values of {name} up to {how.most:g} in magnitude")
    return tensor
