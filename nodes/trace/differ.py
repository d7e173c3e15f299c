"""In what two messages differ: which field, and which tensor by how much."""

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
        # Of a node's session, drawn anew at each start.
        "body.session",
        "body.key",
        # Times.
        "body.elapsed_s",
        "fold.at",
        # Numbers in the ledger: they shift with every entry that came sooner or later.
        "body.position",
        "body.interrupted",
        "fold.position",
    }
)
"""Fields in which honest runs of one configuration differ.

``body.device`` is none of them: it is why a worker's numbers differ.
"""

_MAX_FOLD = 16 << 20


@dataclass(frozen=True)
class Operand:
    """One of two messages. ``read`` returns the bytes of its blobs, by index."""

    message: Message
    read: Read


def differences(
    a: Operand, b: Operand, *, names: tuple[str, str] = ("A", "B"), ignore: frozenset[str] = HONEST
) -> list[Difference]:
    """Return all that differs between two messages; nothing if they are equal.

    Blobs are read and decoded only where their digests differ. NaN equals NaN.

    Args:
        a: one message.
        b: the other.
        names: of the two sides.
        ignore: paths of fields that may differ: ``run``, ``body.elapsed_s``, ``fold.at``.
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
                continue  # made from its number in the ledger
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
        sides: tuple[Any, Any],
        gap: Gap | None = None,
    ) -> Difference:
        return Difference(kind, place, sides, self._names, gap)

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
        for index, (side, group) in enumerate(zip((self._a, self._b), (a, b), strict=True)):
            try:
                decoded.append(group.decode(side.read))
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
            sides = tuple(ABSENT if each is None else form_of(each) for each in (a, b))
            yield self._differ(DifferenceKind.MISSING, place, (sides[0], sides[1]))
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            yield self._differ(DifferenceKind.FORM, place, (form_of(a), form_of(b)))
        elif (gap := gap_between(a, b)) is not None:
            yield self._differ(DifferenceKind.VALUES, place, (form_of(a), form_of(b)), gap)

    # ---- blobs that are no tensors

    def _blobs(self, first_a: int, first_b: int) -> Iterator[Difference]:
        ours, theirs = self._a.message.blobs[first_a:], self._b.message.blobs[first_b:]
        if len(ours) != len(theirs):
            yield self._differ(DifferenceKind.BLOBS, InBlob(), (len(ours), len(theirs)))
            return
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a == b:
                continue
            folds = [
                fold_of(side, first + index)
                for side, first in ((self._a, first_a), (self._b, first_b))
            ]
            if isinstance(folds[0], Mapping) and isinstance(folds[1], Mapping):
                yield from self._values(("fold",), *folds)
                continue
            place = InBlob(first_a + index)
            sides = [f"{each.size} bytes {each.digest.hex()}" for each in (a, b)]
            yield self._differ(DifferenceKind.BYTES, place, (sides[0], sides[1]))
            for which, fold in enumerate(folds):
                if isinstance(fold, str):
                    yield self._differ(DifferenceKind.UNDECODABLE, place, _on(which, fold))


def gap_between(a: Tensor, b: Tensor) -> Gap | None:
    """Return by how much two tensors of one shape and dtype differ; None if they do not."""
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


def _on(side: int, reason: str) -> tuple[Any, Any]:
    """Return two sides, of which one has a reason."""
    return (reason, ABSENT) if side == 0 else (ABSENT, reason)


def fold_of(side: Operand, index: int) -> dict[Any, Any] | str:
    """Return the fields of a blob that is a map in msgpack, or why it cannot be read."""
    if side.message.blobs[index].size > _MAX_FOLD:
        return "it is too large to be a map of fields"
    try:
        fold = msgspec.msgpack.decode(side.read(index))
    except LedgerError as error:
        return plain(error)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
        return "it is no map in msgpack"
    whole = isinstance(fold, dict) and not is_deeper(fold, MAX_DEPTH)
    return fold if whole else "it is no map in msgpack"


def _rest(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a body without the groups, which are compared by what is in them."""
    return {key: value for key, value in _opened(body).items() if key != "groups"}


def _opened(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a body with the configuration in it, if there is one, as a map."""
    config = body.get("config")
    if isinstance(config, str):
        try:
            return {**body, "config": tomllib.loads(config)}
        except (ValueError, RecursionError):
            pass
    return body


def _same(a: Any, b: Any) -> bool:
    """Tell whether two values are the same: 1 is not 1.0, 0.0 not -0.0, and NaN is NaN."""
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
