"""Differences between two messages, as values: what kind, where, by how much; text comes last.

Whoever decides something about a difference looks at its kind and its place. The sentence is
for people: ``str(difference)``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from fedmq.nodes.process.terminal import literal, plain

_SHOWN = 60
"""Of a long text, this much is shown from where it differs."""


class Absent:
    """Stands for a value that one side does not have."""

    def __repr__(self) -> str:
        return "nothing"


ABSENT = Absent()


class DifferenceKind(enum.Enum):
    """What kind of difference it is."""

    FIELD = "field"
    """Another value of a field; a value that one side does not have is `ABSENT`."""
    MISSING = "missing"
    """Only one side has this group of tensors, or this tensor."""
    CODEC = "codec"
    """Another codec wrote the group."""
    FORM = "form"
    """Another shape or dtype of a tensor."""
    VALUES = "values"
    """Other values of a tensor, of the same shape and dtype; `Difference.gap` says by how much."""
    ENCODING = "encoding"
    """The same values from other bytes: -0.0 and 0.0, or another way to compress them."""
    BYTES = "bytes"
    """Other bytes, which could not be decoded or are no tensors."""
    UNDECODABLE = "undecodable"
    """One side cannot be decoded or read; ``sides`` has the reason on that side."""
    BLOBS = "blobs"
    """Another number of blobs that belong to no tensor."""
    MESSAGE = "message"
    """Another message altogether: it has another sender or id."""


@dataclass(frozen=True)
class Field:
    """A place in a message's header, body, or map in a blob: the keys that lead there."""

    path: tuple[str | int, ...]

    def is_under(self, *keys: str) -> bool:
        """Tell whether these are the first keys of the path."""
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
    """A blob by its number in the message; None: all that belong to no tensor."""

    index: int | None = None

    def __str__(self) -> str:
        return "blobs besides the tensors" if self.index is None else f"blob {self.index}"


@dataclass(frozen=True)
class Gap:
    """By how much the values of a tensor differ.

    differing, elements: so many of the tensor's elements differ.
    largest: the largest absolute difference; None if there is none but from or to NaN.
    nans: how many of the differing elements are NaN on each side.
    rounded: whether these are numbers that rounding can change: real or complex, no integers.
    """

    differing: int
    elements: int
    largest: float | None
    nans: tuple[int, int] = (0, 0)
    rounded: bool = True


@dataclass(frozen=True)
class Difference:
    """One difference between two messages.

    kind: of which kind it is.
    place: where it is.
    sides: what stands there on each side: values of a field, a codec, shape and dtype, sizes
        and digests. A side that has nothing there is `ABSENT`.
    names: of the two sides.
    gap: of `Kind.VALUES`.
    """

    kind: DifferenceKind
    place: Field | InGroup | InBlob
    operands: tuple[Any, Any] = (ABSENT, ABSENT)
    names: tuple[str, str] = ("A", "B")
    gap: Gap | None = None

    def __str__(self) -> str:
        return self.sentence()

    def sentence(self) -> str:
        """Return the difference as one line of text."""
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
                return f"{self.place}: the same values from other bytes, {self._two(ours, theirs)}"
            case DifferenceKind.UNDECODABLE:
                name, reason = next(
                    (name, side)
                    for name, side in zip(self.names, self.operands, strict=True)
                    if side is not ABSENT
                )
                verb = "read" if isinstance(self.place, InBlob) else "decoded"
                return f"{self.place}: cannot be {verb} in {name}: {reason}"
            case DifferenceKind.VALUES if self.gap is not None:
                return f"{self.place}: {self._numbers(self.gap)}"
            case DifferenceKind.MESSAGE:
                return "another message"
            case _:
                return f"{self.place}: {self._two(ours, theirs)}"

    def _two(self, ours: object, theirs: object) -> str:
        return f"{ours} in {self.names[0]}, {theirs} in {self.names[1]}"

    def _numbers(self, gap: Gap) -> str:
        said = f"{gap.differing} of {gap.elements} elements differ"
        if gap.largest is not None:
            said += f", by at most {gap.largest:.3g}"
        for number, here, there in zip(gap.nans, self.names, self.names[::-1], strict=True):
            if number:
                said += f", {number} NaN in {here} and not in {there}"
        return said


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
    return repr(value) if value is ABSENT else literal(value, 1 << 20)
