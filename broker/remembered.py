"""Ids of messages that were accepted or refused: what comes again is known again."""

from __future__ import annotations

from collections import deque
from typing import Literal

import xxhash

Known = Literal["new", "same", "other"]
REMEMBERED = 1 << 17
"""Ids kept in memory, of all runs together, about 20 MB.

Far more than a sender can say again: a link resends what has no receipt, and a restarted
aggregator what it said since its last checkpoint.
"""


class Remembered:
    """The newest message ids, each with the digest of its message."""

    def __init__(self, limit: int = REMEMBERED) -> None:
        self._limit = limit
        self._digests: dict[int, int] = {}
        self._order: deque[int] = deque()

    def add(self, run: str, sender: str, name: str, data: bytes) -> None:
        """Remember a message."""
        key = _key(run, sender, name)
        if key not in self._digests:
            self._order.append(key)
        self._digests[key] = xxhash.xxh3_64_intdigest(data)
        if len(self._order) > self._limit:
            del self._digests[self._order.popleft()]

    def look(self, run: str, sender: str, name: str, data: bytes) -> Known:
        """Tell whether this message, or another one of the same id, was here before."""
        known = self._digests.get(_key(run, sender, name))
        if known is None:
            return "new"
        return "same" if known == xxhash.xxh3_64_intdigest(data) else "other"


def _key(run: str, sender: str, name: str) -> int:
    return xxhash.xxh3_128_intdigest(f"{run}\0{sender}\0{name}".encode())
