"""Ids of messages that were accepted or refused: what comes again is known again."""

from __future__ import annotations

from typing import Literal

import xxhash
from msgspec import Struct

Known = Literal["new", "same", "other"]
DEDUP_WINDOW = 1 << 17
"""Ids kept in memory, of all runs together: up to twice as many, 32 MB.

Far more than a sender can say again: a link resends what has no receipt, and a restarted
aggregator what it said since its last checkpoint.
"""


class PostFingerprint(Struct, frozen=True, gc=False):
    """A message as it is remembered: the digest of its full id, and of its bytes."""

    name: int
    data: int

    @classmethod
    def of(cls, run: str, sender: str, name: str, data: bytes) -> PostFingerprint:
        """Return the mark of a message."""
        full = xxhash.xxh3_128_intdigest(f"{run}\0{sender}\0{name}".encode())
        return cls(full, xxhash.xxh3_64_intdigest(data))

    def to_bytes(self) -> bytes:
        """Return it as 24 bytes."""
        return self.name.to_bytes(16, "big") + self.data.to_bytes(8, "big")

    @classmethod
    def from_bytes(cls, data: bytes) -> PostFingerprint:
        """Read what `to_bytes` wrote."""
        return cls(int.from_bytes(data[:16], "big"), int.from_bytes(data[16:24], "big"))


class DedupWindow:
    """The newest message ids, each with the digest of its message.

    Two halves: when the newer one is full, the older one is forgotten as a whole.

    Args:
        limit: how many there are at least to be, as soon as there were so many; at most twice.
    """

    def __init__(self, limit: int = DEDUP_WINDOW) -> None:
        self._limit = limit
        self._newer: dict[int, int] = {}
        self._older: dict[int, int] = {}

    def add(self, mark: PostFingerprint) -> None:
        """Remember a message."""
        self._newer[mark.name] = mark.data
        if len(self._newer) >= self._limit:
            self._newer, self._older = {}, self._newer

    def seen(self, mark: PostFingerprint) -> Known:
        """Tell whether this message, or another one of the same id, was here before."""
        known = self._newer.get(mark.name, self._older.get(mark.name))
        if known is None:
            return "new"
        return "same" if known == mark.data else "other"
