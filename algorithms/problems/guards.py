"""Check the return values of a problem's methods.

`Problem` wraps the methods of its subclasses with these checks, so callers get tensors of the right
kinds and Python's numbers, or an error that names the method.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedmq.algorithms.problems.examples import Examples
from fedmq.algorithms.values import ReturnedError, kind_of_value, metrics_of, plain_number
from fedmq.codecs.text import shorten

_CACHE = ("cache_clear", "cache_info", "cache_parameters")
"""Attributes of a method that `functools.cache` decorates; the wrapper has them too."""


def guard(kind: type, root: type) -> None:
    """Wrap the methods and properties of a class with checks of their return values.

    Args:
        kind: a subclass of ``root``; some methods may come from classes that are no problems.
        root: `Problem`, whose subclasses are all guarded.
    """
    for name, check in _CHECKS.items():
        owner = next((each for each in kind.__mro__ if name in each.__dict__), root)
        if owner is not kind and issubclass(owner, root):
            continue
        found = owner.__dict__.get(name)
        match found:
            case staticmethod():
                setattr(kind, name, staticmethod(_checked(found.__func__, name, check, kind)))
            case property() if found.fget is not None:
                setattr(kind, name, found.getter(_checked(found.fget, name, check)))
            case functools.cached_property():
                cached = functools.cached_property(_checked(found.func, name, check))
                cached.__set_name__(kind, name)
                setattr(kind, name, cached)
            case _ if callable(found) and name not in _VALUES:
                setattr(kind, name, _checked(found, name, check))


def guard_instance(problem: object) -> None:
    """Check a problem's instance attributes that replace methods and properties."""
    own = getattr(problem, "__dict__", {})
    for name, check in _CHECKS.items():
        if name not in own:
            continue
        if name in _VALUES:
            value = check(own[name], f"{type(problem).__name__}.{name}")
        else:
            value = _checked(own[name], name, check, type(problem))
        object.__setattr__(problem, name, value)  # a frozen dataclass has them too


def _checked(
    method: Callable[..., Any],
    name: str,
    check: Callable[[Any, str], Any],
    kind: type | None = None,
) -> Callable[..., Any]:
    """Return a method with a checked return value. ``kind``: owner of a method without self."""

    @functools.wraps(method)
    def checked(*args: Any, **options: Any) -> Any:
        found = method(*args, **options)
        owner = kind if kind is not None else type(args[0])
        return check(found, f"{owner.__name__}.{name}")

    for each in _CACHE:
        if hasattr(method, each):
            setattr(checked, each, getattr(method, each))
    return checked


def _examples(found: object, who: str) -> Examples:
    """Return examples, with integer labels as int64, which torch's losses require."""
    if not isinstance(found, Examples):
        raise ReturnedError(f"{who}: expected Examples, got {kind_of_value(found)}")
    parts: dict[str, object] = {"x": found.x, "y": found.y}
    for name, each in parts.items():
        if not isinstance(each, Tensor) or not each.dim():
            raise ReturnedError(
                f"{who}: expected {name} as a tensor with a row for each example, "
                f"got {kind_of_value(each)}"
            )
    if len(found.x) != len(found.y):
        raise ReturnedError(
            f"{who}: expected as many rows in x as in y, got {len(found.x)} and {len(found.y)}"
        )
    dtype = found.y.dtype
    real = dtype.is_floating_point or dtype.is_complex
    if real or dtype in (torch.int64, torch.bool):
        return found
    # A copy, because a subclass may have other fields.
    changed = copy.copy(found)
    object.__setattr__(changed, "y", found.y.to(torch.int64))
    return changed


def _model(found: object, who: str) -> nn.Module:
    if not isinstance(found, nn.Module):
        raise ReturnedError(f"{who}: expected a torch module, got {kind_of_value(found)}")
    return found


def _loss(found: object, who: str) -> Tensor:
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise ReturnedError(
            f"{who}: expected the mean loss as a tensor of one value, got {kind_of_value(found)}"
        )
    return found


def _count(found: object, who: str) -> int:
    try:
        return int(operator.index(found))  # type: ignore[arg-type] # checked here
    except TypeError:
        text = f"{who}: expected a whole number, got {kind_of_value(found)}"
        raise ReturnedError(text) from None


def _shape(found: object, who: str) -> tuple[int, ...]:
    if not isinstance(found, Iterable):
        raise ReturnedError(f"{who}: expected a shape, got {kind_of_value(found)}")
    return tuple(_count(size, who) for size in found)


def _range(found: object, who: str) -> tuple[float, float]:
    ends = tuple(map(plain_number, found)) if isinstance(found, tuple | list) else ()
    match ends:
        case (int() | float() as low, int() | float() as high) if low <= high:
            return float(low), float(high)
    raise ReturnedError(
        f"{who}: expected the smallest and the largest value, two numbers in this order, "
        f"got {shorten(found) if ends else kind_of_value(found)}"
    )


_VALUES = ("clients", "held_out", "classes", "shape", "most_examples")
"""Properties; a subclass may define them as plain values."""

_CHECKS: Mapping[str, Callable[[Any, str], Any]] = {
    "model": _model,
    "client": _examples,
    "client_test": _examples,
    "test": _examples,
    "public": _examples,
    "loss": _loss,
    "metrics": metrics_of,
    "metric_range": _range,
    "clients": _count,
    "held_out": _count,
    "classes": _count,
    "shape": _shape,
    "most_examples": _count,
}
