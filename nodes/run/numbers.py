"""Checks of the numbers in a configuration: finite, and of a numeric type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedmq.broker.settings import EVERYTHING, HEADERS, LEAST_RETAIN_BYTES, Retained
from fedmq.codecs.errors import SpecError
from fedmq.codecs.spec import parse
from fedmq.nodes.errors import ConfigError

_SPECS = frozenset(
    {
        *("down", "up", "features", "logits", "partition", "staleness", "slowdown"),
        *("compute", "jitter", "latency", "bandwidth_down", "bandwidth_up", "availability"),
        "examples",  # also a number, of a problem
    }
)
"""Keys whose text is a spec with numbers, such as ``dirichlet(0.5)``."""

RETAINED: Mapping[str, Retained] = {
    "everything": EVERYTHING,
    "unfinished": 0,
    "headers": HEADERS,
}
"""The words for ``broker.retain``; any other value is a number of bytes."""
RETAIN_CHOICES = (
    f"{', '.join(map(repr, RETAINED))} or a number of bytes, at least {LEAST_RETAIN_BYTES:,}"
)
_NO_NUMBERS = frozenset({"inf", "-inf", "infinity", "nan", "true", "false"})


def check_finite(given: Any, where: str = "") -> None:
    """Check that a configuration contains no infinity and no NaN.

    Args:
        given: a configuration, or a part of one.
        where: key of the part.

    Raises:
        ConfigError: names the key.
    """
    if isinstance(given, Mapping):
        for key, value in given.items():
            check_finite(value, f"{where}.{key}" if where else str(key))
    elif isinstance(given, list | tuple):
        for value in given:
            check_finite(value, where)
    elif isinstance(given, float) and not math.isfinite(given):
        raise ConfigError(f"{where}: expected a finite number, got {given}")
    elif isinstance(given, str) and where.rpartition(".")[2] in _SPECS:
        _check_spec(given, where)


def check_types(given: Mapping[str, Any], taken: Mapping[str, Any], where: str = "") -> None:
    """Check that no boolean and no text was converted to a number.

    Args:
        given: values of a table.
        taken: the values that pydantic made of them.
        where: key of the table.

    Raises:
        ConfigError: names the key.
    """
    for key, value in given.items():
        name, made = f"{where}.{key}" if where else str(key), taken.get(key)
        if isinstance(value, Mapping) and isinstance(made, Mapping):
            check_types(value, made, name)
        elif (
            isinstance(value, bool | str)
            and isinstance(made, int | float)
            and not isinstance(made, bool)
        ):
            raise ConfigError(f"{name}: expected a number, got {_shown(value)}")


def _check_spec(text: str, where: str) -> None:
    try:
        calls = parse(text)
    except SpecError:
        return  # the code that uses the spec raises the error
    for call in calls:
        for value in (*call.args, *call.kwargs.values()):
            if isinstance(value, bool) or str(value).lower() in _NO_NUMBERS:
                raise ConfigError(f"{where}: expected finite numbers, got {text!r:.200}")


def _shown(value: bool | str) -> str:  # noqa: FBT001 - a value of a configuration, no flag
    return repr(value)[:200] if isinstance(value, str) else str(value).lower()


def check_retain(value: Any) -> Any:
    """Return a value for ``broker.retain``.

    Raises:
        ValueError: it is none; the message lists the choices.
    """
    is_size = isinstance(value, int | float) and value >= 0
    if is_size or (isinstance(value, str) and value in RETAINED):
        return value
    raise ValueError(f"expected {RETAIN_CHOICES}, got {value!r:.200}")
