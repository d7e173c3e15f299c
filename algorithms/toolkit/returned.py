"""Check what an algorithm's methods return before it is encoded and sent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec
from torch import Tensor

from fedmq.algorithms.tasks import Payload, TrainResult
from fedmq.algorithms.values import ReturnedError, is_utf8, kind_of_value, plain_number
from fedmq.codecs.text import shorten

MAX_NUMBERS_BYTES = 16 * 1024
"""Limit of a payload's numbers, which are in the header of its message."""
_INT_RANGE = range(-(1 << 63), 1 << 64)
"""Integers that msgpack can encode."""


def payload_of(found: object, who: str) -> Payload:
    """Return a payload with its tensors checked and its numbers converted to Python's.

    Args:
        found: value that an algorithm returned.
        who: method, such as ``MyAlgorithm.train``, for the error.

    Raises:
        ReturnedError: it is no payload, or has content that cannot be sent.
    """
    if not isinstance(found, Payload):
        raise ReturnedError(f"{who}: expected a Payload, got {kind_of_value(found)}")
    for group in ("weights", "exact", "features", "logits"):
        check_tensors(getattr(found, group), group, who)
    numbers = {}
    for name, value in _map(found.numbers, "numbers as a map from names to values", who).items():
        if not isinstance(name, str) or not is_utf8(name):
            _refuse_name(name, "numbers", who)
        numbers[str(name)] = _plain(name, value, who)
    size = len(msgspec.msgpack.encode(numbers))
    if size > MAX_NUMBERS_BYTES:
        raise ReturnedError(
            f"{who}: expected at most {MAX_NUMBERS_BYTES} bytes of numbers with their names, "
            f"got {size}; send many numbers as a tensor in exact"
        )
    return Payload(found.weights, found.exact, numbers, found.features, found.logits)


def check_tensors(found: object, what: str, who: str) -> None:
    """Check that a value is a map from names to tensors.

    Args:
        found: value that an algorithm returned.
        what: noun for the error, such as ``weights``.
        who: method, for the error.

    Raises:
        ReturnedError: it is something else.
    """
    tensors = _map(found, f"{what} as a map from names to tensors", who)
    if not tensors or type(tensors) is not dict:
        return  # empty, or streamed: reading a tensor would read all of them
    for name, each in tensors.items():
        if not isinstance(name, str):
            _refuse_name(name, what, who)
        if not isinstance(each, Tensor):
            text = f"expected a tensor for {name!r} of {what}"
            raise ReturnedError(f"{who}: {text}, got {kind_of_value(each)}")
    if not is_utf8("".join(tensors)):
        _refuse_name(next(name for name in tensors if not is_utf8(name)), what, who)


def result_of(found: object, who: str) -> tuple[Payload, Payload | None]:
    """Return the payload to send and the new local state, from the value that ``train`` returned.

    The payload's numbers begin with ``n``, the number of examples.

    Raises:
        ReturnedError: it is no `TrainResult`, or has content that cannot be sent.
    """
    if not isinstance(found, TrainResult):
        hint = " (the form of version 0.1)" if isinstance(found, tuple | list) else ""
        raise ReturnedError(
            f"{who}: expected TrainResult(payload, num_examples, local_state), "
            f"got {kind_of_value(found)}{hint}"
        )
    payload, n = payload_of(found.payload, who), plain_number(found.num_examples)
    if n is None or not math.isfinite(n):
        raise ReturnedError(
            f"{who}: expected num_examples as a number, got {kind_of_value(found.num_examples)}"
        )
    if "n" in payload.numbers:
        raise ReturnedError(f"{who}: num_examples is sent as 'n', choose another name for a number")
    if isinstance(n, float) and n.is_integer():  # a sum of a mask, for example
        n = int(n)
    payload = dataclasses.replace(payload, numbers={"n": n, **payload.numbers})
    local = found.local_state
    return payload, None if local is None else payload_of(local, who)


def _refuse_name(name: object, what: str, who: str) -> NoReturn:
    text = f"expected the names of {what} as text in UTF-8"
    raise ReturnedError(f"{who}: {text}, got {shorten(name)}")


def _map(value: object, expected: str, who: str) -> Mapping[Any, object]:
    if type(value) is not dict and not isinstance(value, Mapping):  # the first is much cheaper
        raise ReturnedError(f"{who}: expected {expected}, got {kind_of_value(value)}")
    return value


def _plain(name: str, value: object, who: str) -> int | float | str:
    if isinstance(value, str) and is_utf8(value):
        return str(value)
    if isinstance(value, bool):
        return value
    number = plain_number(value)
    if number is None or (isinstance(number, int) and number not in _INT_RANGE):
        raise ReturnedError(
            f"{who}: expected a number or text for {name!r}, got {kind_of_value(value)}"
        )
    return number
