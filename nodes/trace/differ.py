"""Compare two messages: which fields and tensors differ, and by how much."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from fedmq.broker.errors import LedgerError
from fedmq.broker.wire.addresses import BROKER
from fedmq.broker.wire.encoding import is_deeper
from fedmq.broker.wire.schema import MAX_DEPTH, Message
from fedmq.codecs.errors import CodecError
from fedmq.nodes.process.terminal import plain
from fedmq.nodes.trace.differences import (
    ABSENT,
    Difference,
    DifferenceKind,
    Field,
    Gap,
    InBlob,
    InGroup,
)
from fedmq.nodes.trace.groups import Group, Read, groups_of

HONEST = frozenset(
    {
        "run",
        "body.config.run.id",
        # Random for each session of a node.
        "body.session",
        "body.key",
        "body.owner",
        # Times.
        "body.elapsed_s",
        "fold.at",
        # Entry numbers: other runs have other numbers.
        "body.position",
        "body.interrupted",
        "fold.position",
    }
)
"""Fields that differ between correct runs of one configuration.

``body.device`` is not one of them: it explains why a worker's numbers differ.
"""

_MAX_FOLD = 16 << 20
_NO_MAP = "not a msgpack map"


@dataclass(frozen=True)
class Operand:
    """One of two messages; ``read`` returns the bytes of a blob by its index."""

    message: Message
    read: Read


def differences(
    a: Operand, b: Operand, *, names: tuple[str, str] = ("A", "B"), ignore: frozenset[str] = HONEST
) -> list[Difference]:
    """Return all differences between two messages.

    Blobs are read and decoded only where their digests differ. NaN equals NaN.

    Args:
        a: one message.
        b: the other.
        names: of the two operands, for people.
        ignore: paths of fields that may differ, such as ``body.elapsed_s``.
    """
    return list(_Differ(a, b, names, ignore).all())


class _Differ:
    def __init__(
        self, a: Operand, b: Operand, names: tuple[str, str], ignore: frozenset[str]
    ) -> None:
        self._a, self._b = a, b
        self._names = names
        self._ignore = ignore

    def all(self) -> Iterator[Difference]:
        a, b = self._a.message, self._b.message
        for name in ("kind", "id", "run", "sender", "to", "re"):
            if name == "id" and a.sender == b.sender == BROKER:
                continue  # it contains the entry number
            yield from self._values((name,), getattr(a, name), getattr(b, name))
        try:
            (ours, rest_a), (theirs, rest_b) = groups_of(a), groups_of(b)
        except CodecError:
            yield from self._values(("body",), _opened(a.body), _opened(b.body))
            yield from self._blobs(0, 0)
            return
        yield from self._values(("body",), _rest(a.body), _rest(b.body))
        yield from self._groups({each.name: each for each in ours}, {e.name: e for e in theirs})
        yield from self._blobs(rest_a, rest_b)

    def _differ(
        self,
        kind: DifferenceKind,
        place: Field | InGroup | InBlob,
        operands: tuple[Any, Any],
        gap: Gap | None = None,
    ) -> Difference:
        return Difference(kind, place, operands, self._names, gap)

    # ---- fields

    def _values(self, path: tuple[str | int, ...], a: Any, b: Any) -> Iterator[Difference]:
        place = Field(path)
        if str(place) in self._ignore or _same(a, b):
            return
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            for key in dict.fromkeys([*a, *b]):
                below = (*path, key if isinstance(key, str) else plain(key))
                yield from self._values(below, a.get(key, ABSENT), b.get(key, ABSENT))
        elif _is_list(a) and _is_list(b) and len(a) == len(b):
            for index, (one, other) in enumerate(zip(a, b, strict=True)):
                yield from self._values((*path, index), one, other)
        else:
            yield self._differ(DifferenceKind.FIELD, place, (a, b))

    # ---- tensors

    def _groups(
        self, ours: Mapping[str, Group], theirs: Mapping[str, Group]
    ) -> Iterator[Difference]:
        for name in dict.fromkeys([*ours, *theirs]):
            a, b = ours.get(name), theirs.get(name)
            if a is None or b is None:
                yield self._differ(
                    DifferenceKind.MISSING, InGroup(name), (a or ABSENT, b or ABSENT)
                )
                continue
            if a.codec != b.codec:
                yield self._differ(DifferenceKind.CODEC, InGroup(name), (a.codec, b.codec))
            elif (a.blobs, a.table) == (b.blobs, b.table) and _same(a.meta, b.meta):
                continue
            yield from self._group(name, a, b)

    def _group(self, name: str, a: Group, b: Group) -> Iterator[Difference]:
        digests = _digests(a), _digests(b)
        decoded: list[dict[str, Tensor]] = []
        for index, (operand, group) in enumerate(zip((self._a, self._b), (a, b), strict=True)):
            try:
                decoded.append(group.decode(operand.read))
            except (CodecError, LedgerError) as error:
                yield self._differ(DifferenceKind.BYTES, InGroup(name), digests)
                reason = _on(index, plain(error))
                yield self._differ(DifferenceKind.UNDECODABLE, InGroup(name), reason)
                return
        one, other = decoded
        found = [
            difference
            for tensor in dict.fromkeys([*one, *other])
            for difference in self._tensor(
                InGroup(name, tensor), one.get(tensor), other.get(tensor)
            )
        ]
        yield from found
        if not found and a.codec == b.codec:
            yield self._differ(DifferenceKind.ENCODING, InGroup(name), digests)

    def _tensor(self, place: InGroup, a: Tensor | None, b: Tensor | None) -> Iterator[Difference]:
        if a is None or b is None:
            forms = tuple(ABSENT if each is None else form_of(each) for each in (a, b))
            yield self._differ(DifferenceKind.MISSING, place, (forms[0], forms[1]))
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            yield self._differ(DifferenceKind.FORM, place, (form_of(a), form_of(b)))
        elif (gap := gap_between(a, b)) is not None:
            yield self._differ(DifferenceKind.VALUES, place, (form_of(a), form_of(b)), gap)

    # ---- other blobs

    def _blobs(self, first_a: int, first_b: int) -> Iterator[Difference]:
        ours, theirs = self._a.message.blobs[first_a:], self._b.message.blobs[first_b:]
        if len(ours) != len(theirs):
            yield self._differ(DifferenceKind.BLOBS, InBlob(), (len(ours), len(theirs)))
            return
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a == b:
                continue
            folds = [
                fold_of(operand, first + index)
                for operand, first in ((self._a, first_a), (self._b, first_b))
            ]
            if isinstance(folds[0], Mapping) and isinstance(folds[1], Mapping):
                yield from self._values(("fold",), *folds)
                continue
            place = InBlob(first_a + index)
            texts = [f"{each.size} bytes {each.digest.hex()}" for each in (a, b)]
            yield self._differ(DifferenceKind.BYTES, place, (texts[0], texts[1]))
            for which, fold in enumerate(folds):
                if isinstance(fold, str):
                    yield self._differ(DifferenceKind.UNDECODABLE, place, _on(which, fold))


def gap_between(a: Tensor, b: Tensor) -> Gap | None:
    """Return the difference of two tensors of equal shape and dtype; None if they are equal."""
    where = ~((a == b) | (a.isnan() & b.isnan()))
    differing = int(where.sum())
    if not differing:
        return None
    wide = torch.complex128 if a.is_complex() else torch.float64
    ours, theirs = a[where].to(wide), b[where].to(wide)
    gaps = (ours - theirs).abs()
    gaps = gaps[~gaps.isnan()]
    return Gap(
        differing,
        a.numel(),
        gaps.max().item() if gaps.numel() else None,
        (int(ours.isnan().sum()), int(theirs.isnan().sum())),
        rounded=a.is_floating_point() or a.is_complex(),
    )


def _on(index: int, reason: str) -> tuple[Any, Any]:
    """Return a reason as the operand of this index, and `ABSENT` as the other."""
    return (reason, ABSENT) if index == 0 else (ABSENT, reason)


def fold_of(operand: Operand, index: int) -> dict[Any, Any] | str:
    """Return the fields of a blob that is a msgpack map, or why it cannot be read."""
    if operand.message.blobs[index].size > _MAX_FOLD:
        return f"not decoded: larger than {_MAX_FOLD:,} bytes"
    try:
        fold = msgspec.msgpack.decode(operand.read(index))
    except LedgerError as error:
        return plain(error)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
        return _NO_MAP
    valid = isinstance(fold, dict) and not is_deeper(fold, MAX_DEPTH)
    return fold if valid else _NO_MAP


def _rest(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a body without the groups, whose tensors are compared instead."""
    return {key: value for key, value in _opened(body).items() if key != "groups"}


def _opened(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a body with its configuration, if any, as a map."""
    config = body.get("config")
    if isinstance(config, str):
        try:
            return {**body, "config": tomllib.loads(config)}
        except (ValueError, RecursionError):
            pass
    return body


def _same(a: Any, b: Any) -> bool:
    """Return whether two values are equal: 1 is not 1.0, 0.0 is not -0.0, NaN is NaN."""
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    if a is ABSENT or b is ABSENT:
        return a is b
    try:
        return msgspec.msgpack.encode(a) == msgspec.msgpack.encode(b)
    except (TypeError, ValueError, OverflowError):
        return type(a) is type(b) and bool(a == b)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _digests(group: Group) -> str:
    names = ", ".join(blob.digest.hex() for blob in group.blobs)
    return f"{group.nbytes} bytes ({names})"


def form_of(tensor: Tensor) -> str:
    """Return a tensor's dtype and shape as text."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
