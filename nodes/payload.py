"""Payloads as messages: which codec wrote which tensors, and where their bytes are.

The body of a task or a result holds ``numbers`` and ``groups``; a group is
``{name, codec, meta, buffers}``, and its bytes are the message's next ``buffers`` blobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedmq.algorithms.base import Payload
from fedmq.broker.wire import Blob, Buffer, Message
from fedmq.codecs.base import Codec, Encoded, brief
from fedmq.codecs.errors import DecodeError
from fedmq.codecs.raw import Raw
from fedmq.codecs.registry import decode
from fedmq.nodes.inbox import Read

_RAW = Raw()


@dataclass(frozen=True)
class Packed:
    """A payload ready to be put into a message."""

    body: Mapping[str, Any]
    blobs: tuple[Blob, ...]
    data: tuple[Buffer, ...]


def pack(payload: Payload, codec: Codec, seed: int) -> Packed:
    """Encode a payload: its weights with the codec, exact tensors as they are."""
    groups = []
    data: list[Buffer] = []
    for name, tensors, chosen in (
        ("weights", payload.weights, codec),
        ("exact", payload.exact, _RAW),
    ):
        if tensors:
            encoded = chosen.encode(tensors, seed)
            buffers = [memoryview(each).cast("B") for each in encoded.buffers]
            groups.append(
                {
                    "name": name,
                    "codec": encoded.codec,
                    "meta": dict(encoded.meta),
                    "buffers": len(buffers),
                }
            )
            data += buffers
    body = {"numbers": dict(payload.numbers), "groups": groups}
    return Packed(body, tuple(Blob.of(each) for each in data), tuple(data))


def numbers_of(message: Message) -> dict[str, Any]:
    """Return the numbers of a payload, without touching its bytes.

    Raises:
        DecodeError: they are not there.
    """
    numbers = message.body.get("numbers")
    if not isinstance(numbers, dict) or not all(isinstance(key, str) for key in numbers):
        raise DecodeError("expected numbers as a map in the message's body")
    return numbers


def unpack(message: Message, read: Read) -> Payload:
    """Decode a payload; the tensors may share memory with the blobs.

    Raises:
        DecodeError: the body or the bytes are not a payload.
    """
    numbers = numbers_of(message)
    groups = message.body.get("groups")
    if not isinstance(groups, list):
        raise DecodeError("expected groups as a list in the message's body")
    found: dict[str, dict[str, Tensor]] = {"weights": {}, "exact": {}}
    first = 0
    for group in groups:
        match group:
            case {
                "name": str(name),
                "codec": str(codec),
                "meta": dict(meta),
                "buffers": int(count),
            }:
                pass
            case _:
                raise DecodeError(f"expected a group of tensors, got {brief(group)}")
        if name not in found or found[name]:
            raise DecodeError(f"expected each of weights and exact at most once, got {brief(name)}")
        if not 0 <= count <= len(message.blobs) - first:
            raise DecodeError(f"group {name!r} has {count} buffers, the message has fewer")
        buffers = [read(index) for index in range(first, first + count)]
        first += count
        found[name] = decode(Encoded(codec, meta, buffers))
    return Payload(found["weights"], found["exact"], numbers)
