"""Save and load the states of algorithms: dataclasses of tensors, numbers and nested dataclasses.

What a state holds is derived from its fields, and what a saved state must look like from another
state of the same problem, such as that of version 0:

- a tensor or a numpy array: of the same dtype and shape, its floating-point values finite;
- a whole number: at least 0; a float: finite;
- a map from names to tensors: of the same names, each like the other's;
- a field ``layout``: the dataclass is a model, whose ``weights`` and ``counters`` are saved by
  the tensors' own names (`Layout.write`);
- all else (layouts, partitions, shapes) follows from the problem and is not saved.

A field declares what differs with ``field(metadata=saved(...))``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from fedmq.algorithms.errors import Fault, ResultError
from fedmq.algorithms.tasks import Payload
from fedmq.algorithms.toolkit.layout import Layout
from fedmq.codecs.text import shorten

T = TypeVar("T")

_LARGEST = 10**12
"""Of a whole number: honest counts stay far below."""


@dataclasses.dataclass(frozen=True)
class _Saved:
    group: Literal["weights", "exact"] = "exact"
    prefix: str = ""
    least: float = -math.inf
    most: float = math.inf
    finite: bool = True
    any_length: bool = False


def saved(
    group: Literal["weights", "exact"] = "exact",
    prefix: str = "",
    least: float = -math.inf,
    most: float = math.inf,
    *,
    finite: bool = True,
    any_length: bool = False,
) -> Mapping[str, _Saved]:
    """Return the metadata of a field that is saved otherwise than by default.

    Args:
        group: of the payload, for tensors.
        prefix: of the names in a map of tensors.
        least: smallest value of a tensor's elements.
        most: largest magnitude of a tensor's elements.
        finite: a tensor must hold no infinity and no NaN.
        any_length: the length of a tensor's first dimension may differ from the other state's.
    """
    return {"saved": _Saved(group, prefix, least, most, finite, any_length)}


DERIVED: Mapping[str, None] = MappingProxyType({"saved": None})
"""Metadata of a field that is not saved: it follows from the problem or from other fields."""


def save_state(state: object) -> Payload:
    """Return everything that is in a state, without copies of its tensors."""
    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "exact": {}}
    numbers: dict[str, int | float | str] = {}
    if (model := _model_in(state)) is not None:
        whole = model.layout.write(model.weights, model.counters)
        groups = {"weights": dict(whole.weights), "exact": dict(whole.exact)}
    for name, how, value in _fields(state, model is not None):
        match value:
            case Tensor():
                groups[how.group][name] = value
            case np.ndarray():
                groups[how.group][name] = torch.from_numpy(value.copy())
            case int() | float():
                numbers[name] = value
            case Mapping():
                groups[how.group] |= {how.prefix + key: each for key, each in value.items()}
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
    model = _model_in(like)
    for name, how, value in _fields(like, model is not None):
        tensors = groups[how.group]
        match value:
            case Tensor():
                values[name] = _tensor(name, tensors.pop(name, None), value, how)
            case np.ndarray():
                like_value = torch.from_numpy(value)
                values[name] = (
                    _tensor(name, tensors.pop(name, None), like_value, how).numpy().copy()
                )
            case int():
                values[name] = expect_count(name, found.numbers)
            case float():
                values[name] = expect_float(name, found.numbers)
            case Mapping():
                values[name] = {
                    key: _tensor(how.prefix + key, tensors.pop(how.prefix + key, None), each, how)
                    for key, each in value.items()
                }
    if model is not None:
        rest = Payload(groups["weights"], groups["exact"])
        values["weights"], values["counters"] = model.layout.read(rest)
    elif extra := sorted({*groups["weights"], *groups["exact"]}):
        raise _misfit(f"expected no tensor {shorten(extra[0])}")
    return cast("T", dataclasses.replace(cast("Any", like), **values))


def expect_tensor(
    name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    """Return a tensor that must have this dtype and shape.

    Raises:
        ResultError: it is missing or has others; the sentence has both.
    """
    if tensor is None:
        raise _misfit(f"expected a tensor {name!r}, it is missing")
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise _misfit(
            f"expected {name} as {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
        )
    return tensor


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


def _fields(state: object, is_model: bool) -> Iterator[tuple[str, _Saved, object]]:  # noqa: FBT001 - private
    for each in dataclasses.fields(cast("Any", state)):
        how = each.metadata.get("saved", _Saved())
        if how is not None and not (is_model and each.name in ("weights", "counters")):
            yield each.name, how, getattr(state, each.name)


def _tensor(name: str, tensor: Tensor | None, like: Tensor, how: _Saved) -> Tensor:
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


def _misfit(reason: str) -> ResultError:
    return ResultError(reason, Fault.WRONG_SHAPE)
