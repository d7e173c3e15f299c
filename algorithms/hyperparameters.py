"""Check hyper-parameters at construction, by a configuration or by a program.

The fields of an algorithm or a schedule state their range in their type, as in
``lr: Annotated[float, Field(gt=0)] = 0.05``; this module reads it there.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from fedmq.algorithms.errors import AlgorithmError

_CONFIG = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)


def check_hyperparameters(instance: Any) -> None:
    """Check each field of a dataclass against its type.

    Lists become tuples and numpy's numbers become Python's. Text and booleans are not numbers.

    Raises:
        AlgorithmError: a value does not fit; the message begins with the field.
    """
    for name, adapter in _adapters(type(instance)).items():  # type: ignore[arg-type] # has a hash
        given = getattr(instance, name)
        try:
            value = adapter.validate_python(given)
        except ValidationError as error:
            raise AlgorithmError(f"{name}: {fault_of(error.errors()[0])}") from None
        if value is not given:
            if isinstance(given, bool | str) and isinstance(value, int | float):
                raise AlgorithmError(f"{name}: expected a number, got {given!r:.200}")
            object.__setattr__(instance, name, value)  # the dataclass is frozen


def fault_of(error: ErrorDetails) -> str:
    """Return what pydantic expected of a value and what it got, as one clause."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    kinds = {"int": "a whole number", "float": "a number"}
    kind, _, fault = error["type"].partition("_")
    if kind in kinds and fault in {"from_float", "parsing", "type"}:
        return f"expected {kinds[kind]}, got {error['input']!r:.200}"
    noise = r"^(Input|Value) should be |, (unable to|got a number with) .*$"
    expected = re.sub(noise, "", error["msg"])
    expected = re.sub(r"^(?=greater|less)", "a number ", expected)
    return f"expected {expected[0].lower()}{expected[1:]}, got {error['input']!r:.200}"


def refuse_old_names(cls: type, renamed: Mapping[str, str]) -> None:
    """Refuse a class that defines a method or attribute under the name it had in 0.1.0.

    Args:
        cls: a user's class.
        renamed: the new name by the old one.

    Raises:
        AlgorithmError: the message has the new name.
    """
    for old, new in renamed.items():
        if hasattr(cls, old):
            raise AlgorithmError(f"{cls.__name__}.{old} is now called {new}: rename it")


@functools.cache
def _adapters(cls: type[Any]) -> Mapping[str, TypeAdapter[Any]]:
    try:
        types = typing.get_type_hints(cls, include_extras=True)
    except NameError as error:
        raise AlgorithmError(
            f"{cls.__name__}: cannot read the types of its fields: {error}"
        ) from None
    fields = dataclasses.fields(cls)
    return {each.name: _adapter(types[each.name]) for each in fields if each.init}


def _adapter(kind: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(kind, config=_CONFIG)
    except PydanticUserError:  # a dataclass or a model, which has a configuration of its own
        return TypeAdapter(kind)
