"""Recognise duplicates of messages that were accepted or rejected, by their ids."""

from __future__ import annotations

from typing import Literal

import xxhash
from msgspec import Struct

Known = Literal["new", "same", "other"]
DEDUP_WINDOW = 1 << 17
"""Least number of ids kept in memory for all runs; at most twice as many, 32 MB.

Far more than a sender can repeat: a link resends what is unacknowledged, and a restarted
aggregator what it posted since its last checkpoint.
"""


class PostFingerprint(Struct, frozen=True, gc=False):
    """The digests of a message's full id (XXH3-128) and of its bytes (XXH3-64)."""

    name: int
    data: int

    @classmethod
    def of(cls, run: str, sender: str, name: str, data: bytes) -> PostFingerprint:
        """Return the fingerprint of a message."""
        full = xxhash.xxh3_128_intdigest(f"{run}\0{sender}\0{name}".encode())
        return cls(full, xxhash.xxh3_64_intdigest(data))

    def to_bytes(self) -> bytes:
        """Encode as 24 bytes, big endian."""
        return self.name.to_bytes(16, "big") + self.data.to_bytes(8, "big")

    @classmethod
    def from_bytes(cls, data: bytes) -> PostFingerprint:
        """Decode what `to_bytes` returned."""
        return cls(int.from_bytes(data[:16], "big"), int.from_bytes(data[16:24], "big"))


class DedupWindow:
    """The newest message ids, each with the digest of its message.

    It has two halves: once the newer half is full, the older half is discarded.

    Args:
        limit: number of ids that fill a half; between this and twice this number are kept.
    """

    def __init__(self, limit: int = DEDUP_WINDOW) -> None:
        self._limit = limit
        self._newer: dict[int, int] = {}
        self._older: dict[int, int] = {}

    def add(self, fingerprint: PostFingerprint) -> None:
        """Add a message."""
        self._newer[fingerprint.name] = fingerprint.data
        if len(self._newer) >= self._limit:
            self._newer, self._older = {}, self._newer

    def seen(self, fingerprint: PostFingerprint) -> Known:
        """Return whether the id is new, or belongs to the same or to another message."""
        known = self._newer.get(fingerprint.name, self._older.get(fingerprint.name))
        if known is None:
            return "new"
        return "same" if known == fingerprint.data else "other"

    def validate_state(self) -> None:
        """Raise AssertionError if the newer half is full, or the older one is not."""
        if len(self._newer) >= self._limit or len(self._older) not in (0, self._limit):
            sizes = f"{len(self._newer)} and {len(self._older)}"
            raise AssertionError(f"halves of {self._limit} ids have {sizes}")
