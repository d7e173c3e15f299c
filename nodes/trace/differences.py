"""Differences between two messages as values: which kind, where, and by how much.

Code that decides on a difference reads its kind and its place. ``str(difference)`` is a sentence
for people.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from fedmq.nodes.process.terminal import literal, plain

_SHOWN = 60
"""Characters of a long text, from where it differs."""


class Absent:
    """The type of `ABSENT`, a value that one operand does not have."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = Absent()


class DifferenceKind(enum.Enum):
    """Kind of a difference."""

    FIELD = "field"
    """The values of a field differ; a missing one is `ABSENT`."""
    MISSING = "missing"
    """Only one operand has this group of tensors, or this tensor."""
    CODEC = "codec"
    """The groups were encoded by different codecs."""
    FORM = "form"
    """The shapes or dtypes of a tensor differ."""
    VALUES = "values"
    """The values of a tensor differ, see `Difference.gap`; shape and dtype are equal."""
    ENCODING = "encoding"
    """The values are equal, but not their bytes: -0.0 and 0.0, or another compression."""
    BYTES = "bytes"
    """The bytes differ, and cannot be decoded or are no tensors."""
    UNDECODABLE = "undecodable"
    """One operand cannot be decoded or read; ``operands`` contains the reason."""
    BLOBS = "blobs"
    """The numbers of blobs that belong to no tensor differ."""
    MESSAGE = "message"
    """The messages have different senders or ids."""


@dataclass(frozen=True)
class Field:
    """A field of a message's header, body, or map in a blob: the keys of its path."""

    path: tuple[str | int, ...]

    def is_under(self, *keys: str) -> bool:
        """Return whether the path starts with these keys."""
        return self.path[: len(keys)] == keys

    def __str__(self) -> str:
        first, *rest = self.path
        keys = (f"[{key}]" if isinstance(key, int) else f".{plain(key)}" for key in rest)
        return f"{plain(first)}{''.join(keys)}"


@dataclass(frozen=True)
class InGroup:
    """A group of tensors, or one tensor of it."""

    group: str
    tensor: str | None = None

    def __str__(self) -> str:
        tensor = "" if self.tensor is None else f" {plain(self.tensor)}"
        return f"{plain(self.group)}{tensor}"


@dataclass(frozen=True)
class InBlob:
    """A blob by its index in the message; None: all that belong to no tensor."""

    index: int | None = None

    def __str__(self) -> str:
        return "blobs besides the tensors" if self.index is None else f"blob {self.index}"


@dataclass(frozen=True)
class Gap:
    """By how much the values of a tensor differ.

    differing: number of elements that differ.
    elements: number of all elements.
    largest: largest absolute difference; None if only NaN differs.
    nans: number of differing elements that are NaN in each operand.
    rounded: whether rounding can change the values: they are real or complex, not integers.
    """

    differing: int
    elements: int
    largest: float | None
    nans: tuple[int, int] = (0, 0)
    rounded: bool = True


@dataclass(frozen=True)
class Difference:
    """One difference between two messages.

    kind: its kind.
    place: where it is.
    operands: the two values: of a field, a codec, shape and dtype, or sizes and digests. A
        missing one is `ABSENT`.
    names: of the two operands, for people.
    gap: for `DifferenceKind.VALUES`.
    """

    kind: DifferenceKind
    place: Field | InGroup | InBlob
    operands: tuple[Any, Any] = (ABSENT, ABSENT)
    names: tuple[str, str] = ("A", "B")
    gap: Gap | None = None

    def __str__(self) -> str:
        ours, theirs = self.operands
        match self.kind:
            case DifferenceKind.FIELD:
                return f"{self.place}: {self._two(*_pair(ours, theirs))}"
            case DifferenceKind.MISSING:
                there, here = self.names if ours is ABSENT else self.names[::-1]
                return f"{self.place}: only in {here}, not in {there}"
            case DifferenceKind.CODEC:
                return f"{self.place} codec: {self._two(plain(ours), plain(theirs))}"
            case DifferenceKind.ENCODING:
                return f"{self.place}: equal values, different bytes: {self._two(ours, theirs)}"
            case DifferenceKind.UNDECODABLE:
                name, reason = next(
                    (name, each)
                    for name, each in zip(self.names, self.operands, strict=True)
                    if each is not ABSENT
                )
                verb = "read" if isinstance(self.place, InBlob) else "decoded"
                return f"{self.place}: cannot be {verb} in {name}: {reason}"
            case DifferenceKind.VALUES if self.gap is not None:
                return f"{self.place}: {self._numbers(self.gap)}"
            case DifferenceKind.MESSAGE:
                return "different message"
            case _:
                return f"{self.place}: {self._two(ours, theirs)}"

    def _two(self, ours: object, theirs: object) -> str:
        return f"{ours} in {self.names[0]}, {theirs} in {self.names[1]}"

    def _numbers(self, gap: Gap) -> str:
        text = f"{gap.differing} of {gap.elements} elements differ"
        if gap.largest is not None:
            text += f", by at most {gap.largest:.3g}"
        for number, here, there in zip(gap.nans, self.names, self.names[::-1], strict=True):
            if number:
                text += f", {number} NaN in {here} but not in {there}"
        return text


def _pair(a: Any, b: Any) -> tuple[str, str]:
    """Return two values as text that includes their first difference."""
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
    return repr(value) if value is ABSENT else literal(value, 1 << 20)
