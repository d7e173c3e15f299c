"""Encoding of payloads as messages.

The body of a task or a result has ``numbers`` and ``groups``. A group is
``{name, codec, meta, buffers}``; its bytes are the message's next ``buffers`` blobs. In a message
of very many tensors, a blob before these has most of ``meta``
(`fedmq.nodes.messages.tensor_tables`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from msgspec import Struct
from torch import Tensor

from fedmq.algorithms.base import Payload
from fedmq.algorithms.toolkit.returned import payload_of
from fedmq.algorithms.values import kind_of_value, plain_number
from fedmq.broker.errors import WireError
from fedmq.broker.wire.schema import MAX_BUFFERS, Blob, Buffer, Message
from fedmq.codecs.base import MAX_DECODED_BYTES, Codec, Encoded
from fedmq.codecs.errors import CodecError, DecodeError
from fedmq.codecs.formats.streamed import Streamed
from fedmq.codecs.raw import Raw, read_table
from fedmq.codecs.registry import decode
from fedmq.codecs.text import shorten
from fedmq.nodes.messages.tensor_tables import has_table, read_meta

_RAW = Raw()
_GROUPS = ("weights", "exact", "features", "logits")
_OWN = "fedmq."
"""Package of fedmq's own codecs, whose meta has plain values only."""
_MAX_EXACT_RUNS = MAX_BUFFERS // 2
_MAX_RUNS = MAX_BUFFERS - 16
"""Runs of tensors of one dtype, of weights and exact together. The other blobs of a message are
tables, features, logits and a fold."""
STREAMED_BYTES = 64 << 20
"""Raw weights of at least this size are accumulated while they are read, chunk by chunk."""

Read = Callable[[int], Buffer]
"""Returns the bytes of a message's i-th blob."""
Stream = Callable[[int], Iterator[Buffer]]
"""Returns the chunks of a message's i-th blob, in order."""


@dataclass(frozen=True)
class Codecs:
    """The codec of each group of a payload's tensors; exact tensors are always raw."""

    weights: Codec = _RAW
    features: Codec = _RAW
    logits: Codec = _RAW


RAW = Codecs()
"""All groups unencoded."""


class Packed(Struct, frozen=True):
    """A payload as a message's body and blobs, and the blobs' bytes."""

    body: Mapping[str, Any]
    blobs: tuple[Blob, ...]
    data: tuple[Buffer, ...]


def pack(payload: Payload, codecs: Codecs, seed: int, who: str = "") -> Packed:
    """Encode a payload, each group of tensors with its codec.

    Args:
        payload: to send or save.
        codecs: of each group.
        seed: seed of the codecs' randomness.
        who: method that returned the payload; if given, the payload is checked.

    Raises:
        ReturnedError: the method returned something that cannot be sent.
        CodecError: a codec cannot encode the tensors.
    """
    if who:
        payload = payload_of(payload, who)
    groups = []
    data: list[Buffer] = []
    exact = _in_few_runs(payload.exact, _MAX_EXACT_RUNS)
    for name, tensors, chosen in (
        ("weights", _in_few_runs(payload.weights, _MAX_RUNS - _runs(exact)), codecs.weights),
        ("exact", exact, _RAW),
        ("features", payload.features, codecs.features),
        ("logits", payload.logits, codecs.logits),
    ):
        if tensors:
            codec, meta, buffers = _encode(chosen, tensors, seed)
            groups.append({"name": name, "codec": codec, "meta": meta, "buffers": len(buffers)})
            data += buffers
    body = {"numbers": dict(payload.numbers), "groups": groups}
    return Packed(body, tuple(Blob.of(each) for each in data), tuple(data))


def _encode(
    codec: Codec, tensors: Mapping[str, Tensor], seed: int
) -> tuple[str, dict[str, Any], list[memoryview]]:
    """Return a group's codec, its meta of plain values, and its bytes.

    Raises:
        CodecError: the codec fails, or its meta cannot be written into a message.
    """
    try:
        encoded = codec.encode(tensors, seed)
        buffers = [memoryview(each).cast("B") for each in encoded.buffers]
        name, meta = str(encoded.codec), dict(encoded.meta)
    except CodecError:
        raise
    except Exception as error:
        # A user's codec can raise anything.
        raise CodecError(
            f"codec {codec.wire_name} cannot encode: {type(error).__name__}: {error}"[:2000]
        ) from error
    if type(codec).__module__.startswith(_OWN):
        return name, meta, buffers
    try:
        return name, msgspec.to_builtins(meta, enc_hook=_number), buffers
    except (TypeError, ValueError, OverflowError) as error:
        raise CodecError(
            f"codec {codec.wire_name}: expected plain numbers, text, lists and maps in meta: "
            f"{error}"
        ) from None


def _number(value: object) -> int | float:
    number = plain_number(value)
    if number is None:
        raise TypeError(f"got {kind_of_value(value)}")
    return number


def _runs(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of runs of consecutive tensors of one dtype."""
    if isinstance(tensors, Streamed):
        return 1  # all are float32; access to one would read all of them
    return sum(1 for _ in itertools.groupby(each.dtype for each in tensors.values()))


def _in_few_runs(tensors: Mapping[str, Tensor], limit: int) -> Mapping[str, Tensor]:
    """Order tensors so that they have at most ``limit`` runs, if possible.

    Each run of tensors of one dtype has a buffer. The original order is better where it fits: a
    client's unchanged tensors then have an unchanged buffer, which is stored once.
    """
    if len(tensors) <= limit or _runs(tensors) <= limit:
        return tensors
    return dict(sorted(tensors.items(), key=lambda item: str(item[1].dtype)))


def numbers_of(message: Message) -> dict[str, Any]:
    """Return a payload's numbers without decoding its tensors.

    Raises:
        DecodeError: the message has no valid numbers.
    """
    numbers = message.body.get("numbers")
    if not isinstance(numbers, dict) or not all(isinstance(key, str) for key in numbers):
        raise DecodeError("expected numbers as a map in the message's body")
    return numbers


def unpack(
    message: Message,
    read: Read,
    stream: Stream | None = None,
    max_bytes: int = MAX_DECODED_BYTES,
) -> Payload:
    """Decode a payload; its tensors can share memory with the blobs.

    Args:
        message: with the payload.
        read: returns a whole blob.
        stream: returns a blob in chunks; with it, large raw weights are `Streamed`.
        max_bytes: memory limit of decoding: a few bytes can stand for very many zeros.

    Raises:
        DecodeError: the body or the bytes are not a valid payload.
    """
    numbers = numbers_of(message)
    groups = message.body.get("groups")
    if not isinstance(groups, list):
        raise DecodeError("expected groups as a list in the message's body")
    found: dict[str, Mapping[str, Tensor]] = {name: {} for name in _GROUPS}
    first = 0
    for group in groups:
        match group:
            case {
                "name": str(name),
                "codec": str(codec),
                "meta": dict(meta),
                "buffers": int(count),
            }:
                table = has_table(group)
            case _:
                raise DecodeError(f"expected a group of tensors, got {shorten(group)}")
        if name not in found or found[name]:
            raise DecodeError(
                f"expected each of {', '.join(_GROUPS)} at most once, got {shorten(name)}"
            )
        if not 0 <= count <= len(message.blobs) - first - table:
            raise DecodeError(f"group {name!r} has {count} buffers, the message has fewer")
        if table:
            whole = read_meta(meta, message.blobs[first], functools.partial(read, first))
            first += 1
        else:
            whole = meta
        shapes = _streamable(codec, whole) if name == "weights" and count == 1 else None
        if stream is not None and shapes and message.blobs[first].size >= STREAMED_BYTES:
            found[name] = Streamed(shapes, functools.partial(stream, first))
        else:
            buffers = [read(index) for index in range(first, first + count)]
            found[name] = decode(Encoded(codec, whole, buffers), max_bytes)
        first += count
    return Payload(numbers=numbers, **found)


def fail_on_partial_reread(stream: Stream) -> Stream:
    """Raise an error if a blob that was read once cannot be read again.

    The first reading checks the blob, so that a failure there rejects the message. A failure of a
    later reading comes when the result is partly accumulated.

    Raises:
        RuntimeError: on such a failure, while iterating.
    """
    whole = set()

    def chunks(index: int) -> Iterator[Buffer]:
        try:
            yield from stream(index)
        except WireError as error:
            if index in whole:
                raise RuntimeError("a blob that was read cannot be read again") from error
            raise
        whole.add(index)

    return chunks


def _streamable(codec: str, meta: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes by name if the tensors are raw float32 in one buffer, else None."""
    if codec != _RAW.wire_name:
        return None
    table = read_table(meta)
    if any(dtype != torch.float32 for _, dtype, _ in table):
        return None
    return {name: shape for name, _, shape in table}
