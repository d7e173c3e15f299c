"""Recognise duplicates of messages that were accepted or rejected, by their ids."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Literal

import xxhash
from msgspec import Struct

Known = Literal["new", "same", "other"]
Sender = tuple[str, str]
"""A run, and the name of one of its nodes."""
DEDUP_WINDOW = 1 << 16
"""Least number of ids kept in memory of all runs, at most twice as many: of all aggregators, and as
many of all other nodes.

Far more than a sender can repeat: a link resends what is unacknowledged, and a restarted
aggregator what it posted since its last checkpoint.
"""
REJECTED_WINDOW = 1 << 15
"""Least number of ids of rejected posts kept in memory, at most twice as many."""


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
    """The newest message ids of each sender, each with the digest of its message.

    Once twice the limit is kept, the window is trimmed to the limit: the senders with most ids lose
    their oldest, so that a sender cannot push out the ids of another that has fewer.

    Args:
        limit: number of ids that trimming leaves; below twice this number are kept.
        has_ended: returns whether a run has ended; the ids of those are trimmed first.

    Attributes:
        size: number of ids that are kept.
    """

    def __init__(
        self, limit: int = DEDUP_WINDOW, has_ended: Callable[[str], bool] = lambda _: False
    ) -> None:
        self._limit, self._has_ended = limit, has_ended
        self._ids: dict[Sender, dict[int, int]] = {}
        self.size = 0

    def add(self, run: str, name: str, fingerprint: PostFingerprint) -> None:
        """Add a message, its sender's newest; ``name``: of the sender."""
        sender = run, name
        ids = self._ids.get(sender)
        if ids is None:
            ids = self._ids[sender] = {}
        if ids.pop(fingerprint.name, None) is None:
            self.size += 1
        ids[fingerprint.name] = fingerprint.data
        if self.size >= 2 * self._limit:
            self._trim()

    def seen(self, run: str, name: str, fingerprint: PostFingerprint) -> Known:
        """Return whether the id is new, or belongs to the same or to another message."""
        ids = self._ids.get((run, name))
        known = None if ids is None else ids.get(fingerprint.name)
        if known is None:
            return "new"
        return "same" if known == fingerprint.data else "other"

    def _trim(self) -> None:
        left = self._limit
        kept: dict[Sender, dict[int, int]] = {}
        for ended in (False, True):
            part = {k: ids for k, ids in self._ids.items() if self._has_ended(k[0]) == ended}
            trimmed = _share(part, left)
            left -= sum(map(len, trimmed.values()))
            kept |= trimmed
        self._ids, self.size = kept, self._limit - left

    def validate_state(self) -> None:
        """Raise AssertionError if more ids are kept than may be, or another number than counted."""
        size = sum(map(len, self._ids.values()))
        if size != self.size or size >= 2 * self._limit or not all(self._ids.values()):
            raise AssertionError(f"{size} ids are kept: {self.size} count, limit {self._limit}")


def _share(senders: dict[Sender, dict[int, int]], room: int) -> dict[Sender, dict[int, int]]:
    """Return the newest ids of each sender: all of those with few, an equal share of the others."""
    kept: dict[Sender, dict[int, int]] = {}
    order = sorted(senders.items(), key=lambda item: len(item[1]))
    for index, (sender, ids) in enumerate(order):
        share = min(len(ids), room // (len(order) - index))
        room -= share
        if share:
            kept[sender] = dict(islice(ids.items(), len(ids) - share, None))
    return kept
