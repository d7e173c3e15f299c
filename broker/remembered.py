"""Ids of messages that were accepted or refused: what comes again is known again."""

from __future__ import annotations

from collections import deque
from typing import Literal, NamedTuple

import xxhash

Known = Literal["new", "same", "other"]
REMEMBERED = 1 << 17
"""Ids kept in memory, of all runs together, about 20 MB.

Far more than a sender can say again: a link resends what has no receipt, and a restarted
aggregator what it said since its last checkpoint.
"""


class Mark(NamedTuple):
    """A message as it is remembered: the digest of its full id, and of its bytes."""

    name: int
    data: int

    @classmethod
    def of(cls, run: str, sender: str, name: str, data: bytes) -> Mark:
        """Return the mark of a message."""
        full = f"{run}\0{sender}\0{name}".encode()
        return cls(xxhash.xxh3_128_intdigest(full), xxhash.xxh3_64_intdigest(data))

    def to_bytes(self) -> bytes:
        """Return it as 24 bytes."""
        return self.name.to_bytes(16, "big") + self.data.to_bytes(8, "big")

    @classmethod
    def from_bytes(cls, data: bytes) -> Mark:
        """Read what `to_bytes` wrote."""
        return cls(int.from_bytes(data[:16], "big"), int.from_bytes(data[16:24], "big"))


class Remembered:
    """The newest message ids, each with the digest of its message."""

    def __init__(self, limit: int = REMEMBERED) -> None:
        self._limit = limit
        self._digests: dict[int, int] = {}
        self._order: deque[int] = deque()

    def add(self, mark: Mark) -> None:
        """Remember a message."""
        if mark.name not in self._digests:
            self._order.append(mark.name)
        self._digests[mark.name] = mark.data
        if len(self._order) > self._limit:
            del self._digests[self._order.popleft()]

    def look(self, mark: Mark) -> Known:
        """Tell whether this message, or another one of the same id, was here before."""
        known = self._digests.get(mark.name)
        if known is None:
            return "new"
        return "same" if known == mark.data else "other"
