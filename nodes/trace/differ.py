"""In what two messages differ: which field, and which tensor by how much."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from torch import Tensor

from fedmq.broker.errors import LedgerError
from fedmq.broker.headers import is_deeper
from fedmq.broker.state import BROKER
from fedmq.broker.wire import MAX_DEPTH, Message
from fedmq.codecs.errors import CodecError
from fedmq.nodes.trace.groups import Group, Read, groups_of
from fedmq.nodes.trace.text import literal, plain

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

_SHOWN = 60
"""Of a long text, this much is shown from where it differs."""
_MAX_FOLD = 16 << 20
_ABSENT = object()


@dataclass(frozen=True)
class Side:
    """One of two messages. ``read`` returns the bytes of its blobs, by index."""

    message: Message
    read: Read


def differences(
    a: Side, b: Side, *, names: tuple[str, str] = ("A", "B"), ignore: frozenset[str] = HONEST
) -> list[str]:
    """Return sentences on all that differs between two messages; none if they are equal.

    Blobs are read and decoded only where their digests differ. NaN equals NaN.

    Args:
        a: one message.
        b: the other.
        names: of the two sides, for the sentences.
        ignore: paths of fields that may differ: ``run``, ``body.elapsed_s``, ``fold.at``.
    """
    return list(_Differ(a, b, names, ignore).all())


class _Differ:
    def __init__(self, a: Side, b: Side, names: tuple[str, str], ignore: frozenset[str]) -> None:
        self._a, self._b = a, b
        self._names = names
        self._ignore = ignore

    def all(self) -> Iterator[str]:
        a, b = self._a.message, self._b.message
        for name in ("kind", "id", "run", "sender", "to", "re"):
            if name == "id" and a.sender == b.sender == BROKER:
                continue  # made from its number in the ledger
            yield from self._values(name, getattr(a, name), getattr(b, name))
        try:
            (ours, rest_a), (theirs, rest_b) = groups_of(a), groups_of(b)
        except CodecError:
            yield from self._values("body", _opened(a.body), _opened(b.body))
            yield from self._blobs(0, 0)
            return
        yield from self._values("body", _rest(a.body), _rest(b.body))
        yield from self._groups({each.name: each for each in ours}, {e.name: e for e in theirs})
        yield from self._blobs(rest_a, rest_b)

    # ---- fields

    def _values(self, path: str, a: Any, b: Any) -> Iterator[str]:
        if path in self._ignore or _same(a, b):
            return
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            for key in dict.fromkeys([*a, *b]):
                name = f"{path}.{plain(key)}"
                yield from self._values(name, a.get(key, _ABSENT), b.get(key, _ABSENT))
        elif _is_list(a) and _is_list(b) and len(a) == len(b):
            for index, (one, other) in enumerate(zip(a, b, strict=True)):
                yield from self._values(f"{path}[{index}]", one, other)
        else:
            ours, theirs = _pair(a, b)
            yield f"{path}: {self._two(ours, theirs)}"

    def _two(self, ours: str, theirs: str) -> str:
        return f"{ours} in {self._names[0]}, {theirs} in {self._names[1]}"

    # ---- tensors

    def _groups(self, ours: Mapping[str, Group], theirs: Mapping[str, Group]) -> Iterator[str]:
        for name in dict.fromkeys([*ours, *theirs]):
            a, b = ours.get(name), theirs.get(name)
            if a is None or b is None:
                there, here = self._names if a is None else self._names[::-1]
                yield f"{plain(name)}: only in {here}, not in {there}"
                continue
            if a.codec != b.codec:
                yield f"{plain(name)} codec: {self._two(plain(a.codec), plain(b.codec))}"
            elif a.blobs == b.blobs and _same(a.meta, b.meta):
                continue
            yield from self._group(plain(name), a, b)

    def _group(self, name: str, a: Group, b: Group) -> Iterator[str]:
        decoded: list[dict[str, Tensor]] = []
        for side, group, label in zip((self._a, self._b), (a, b), self._names, strict=True):
            try:
                decoded.append(group.decode(side.read))
            except (CodecError, LedgerError) as error:
                yield f"{name}: {self._two(_digests(a), _digests(b))}"
                yield f"{name}: cannot be decoded in {label}: {plain(error)}"
                return
        one, other = decoded
        said = False
        for tensor in dict.fromkeys([*one, *other]):
            sentence = self._tensor(one.get(tensor), other.get(tensor))
            if sentence:
                said = True
                yield f"{name} {plain(tensor)}: {sentence}"
        if not said and a.codec == b.codec:
            yield f"{name}: the same values from other bytes, {self._two(_digests(a), _digests(b))}"

    def _tensor(self, a: Tensor | None, b: Tensor | None) -> str:
        if a is None or b is None:
            there, here = self._names if a is None else self._names[::-1]
            return f"only in {here}, not in {there}"
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return self._two(_form(a), _form(b))
        where = ~((a == b) | (a.isnan() & b.isnan()))
        differing = int(where.sum())
        if not differing:
            return ""
        ours, theirs = a[where].double(), b[where].double()
        nans = [int(each.isnan().sum()) for each in (ours, theirs)]
        gaps = (ours - theirs).abs()
        gaps = gaps[~gaps.isnan()]
        said = f"{differing} of {a.numel()} elements differ"
        if gaps.numel():
            said += f", by at most {gaps.max().item():.3g}"
        for number, here, there in zip(nans, self._names, self._names[::-1], strict=True):
            if number:
                said += f", {number} NaN in {here} and not in {there}"
        return said

    # ---- blobs that are no tensors

    def _blobs(self, first_a: int, first_b: int) -> Iterator[str]:
        ours, theirs = self._a.message.blobs[first_a:], self._b.message.blobs[first_b:]
        if len(ours) != len(theirs):
            yield f"blobs besides the tensors: {self._two(str(len(ours)), str(len(theirs)))}"
            return
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a == b:
                continue
            folds = [
                fold_of(side, first + index)
                for side, first in ((self._a, first_a), (self._b, first_b))
            ]
            if isinstance(folds[0], Mapping) and isinstance(folds[1], Mapping):
                yield from self._values("fold", *folds)
                continue
            two = self._two(f"{a.size} bytes {a.digest.hex()}", f"{b.size} bytes {b.digest.hex()}")
            yield f"blob {first_a + index}: {two}"
            for label, fold in zip(self._names, folds, strict=True):
                if isinstance(fold, str):
                    yield f"blob {first_a + index}: cannot be read in {label}: {fold}"


def fold_of(side: Side, index: int) -> dict[Any, Any] | str:
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
    if a is _ABSENT or b is _ABSENT:
        return a is b
    try:
        return msgspec.msgpack.encode(a) == msgspec.msgpack.encode(b)
    except (TypeError, ValueError, OverflowError):
        return type(a) is type(b) and bool(a == b)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _pair(a: Any, b: Any) -> tuple[str, str]:
    """Return two values as text in which their difference is seen."""
    ours, theirs = (_shown(each) for each in (a, b))
    if max(len(ours), len(theirs)) <= 2 * _SHOWN:
        return ours, theirs
    start = next(
        (n for n, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y),
        min(len(ours), len(theirs)),
    )
    start = max(0, start - _SHOWN // 3)
    before = "..." if start else ""
    first, second = (
        before + each[start : start + _SHOWN] + ("..." if len(each) > start + _SHOWN else "")
        for each in (ours, theirs)
    )
    return first, second


def _shown(value: Any) -> str:
    return "nothing" if value is _ABSENT else literal(value, 1 << 20)


def _digests(group: Group) -> str:
    names = ", ".join(blob.digest.hex() for blob in group.blobs)
    return f"{group.nbytes} bytes ({names})"


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
