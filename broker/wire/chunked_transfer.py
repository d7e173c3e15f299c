"""Pulling blobs over one link: in order, in chunks, a window at a time.

The end that lacks a blob asks for it, chunk by chunk, and never has more than a window
of chunks on the way: that is the byte credit, and it bounds the memory of both ends and
the time that a small message can wait behind a large one. The end that has the blob
keeps no state at all, so a transfer resumes by asking again.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import xxhash
from msgspec import Struct

from fedmq.broker.wire.schema import CHUNK_BYTES, Blob, Buffer, Chunk, ChunkRequest

WINDOW_CHUNKS = 4


class Owned(Struct, frozen=True, gc=False):
    """A blob within one run: whose it is, and its digest."""

    owner: str
    digest: bytes


class ReceivedChunk(Struct, frozen=True):
    """What a chunk brought: bytes ``start...`` of a blob of ``size``."""

    name: Owned
    size: int
    start: int
    data: Buffer


@dataclass
class _Transfer:
    size: int
    received: int = 0
    asked: int = 0
    hasher: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)


class Fetcher:
    """The receiving end of blob transfers over one link."""

    def __init__(self, window_chunks: int = WINDOW_CHUNKS) -> None:
        self._window = window_chunks
        self._transfers: OrderedDict[Owned, _Transfer] = OrderedDict()
        self._outstanding = 0

    def __contains__(self, name: Owned) -> bool:
        return name in self._transfers

    def __len__(self) -> int:
        return len(self._transfers)

    @property
    def outstanding(self) -> int:
        """Return the number of chunks that were asked for and have not come."""
        return self._outstanding

    def add(
        self, owner: str, blob: Blob, received: int = 0, hasher: xxhash.xxh3_128 | None = None
    ) -> None:
        """Fetch a blob, after those added before; a blob that is on its way is not added twice.

        Args:
            owner: the node that named it.
            blob: its digest and size.
            received: bytes that are here already, from its start.
            hasher: what has hashed them.
        """
        name = Owned(owner, blob.digest)
        if name not in self._transfers:
            hasher = hasher or xxhash.xxh3_128()
            self._transfers[name] = _Transfer(blob.size, received, received, hasher)

    def wants(self, window: int | None = None) -> list[ChunkRequest]:
        """Return the requests that a window (by default this fetcher's) has room for."""
        limit = self._window if window is None else min(window, self._window)
        wants = []
        for name, transfer in self._transfers.items():
            while transfer.asked < transfer.size and self._outstanding < limit:
                size = min(CHUNK_BYTES, transfer.size - transfer.asked)
                wants.append(
                    ChunkRequest(
                        owner=name.owner, digest=name.digest, start=transfer.asked, size=size
                    )
                )
                transfer.asked += size
                self._outstanding += 1
            if self._outstanding >= limit:
                break
        return wants

    def receive(self, chunk: Chunk, data: Buffer) -> ReceivedChunk | None:
        """Take a chunk; None if it is not the next piece of a blob that was asked for.

        Chunks of a blob come in the order in which they were asked for, because a link
        keeps order. After `restart`, late ones from before are told by their start.
        """
        name = Owned(chunk.owner, chunk.digest)
        transfer = self._transfers.get(name)
        if transfer is None or chunk.start != transfer.received or chunk.start >= transfer.asked:
            return None
        if memoryview(data).nbytes != min(CHUNK_BYTES, transfer.size - chunk.start):
            return None
        transfer.hasher.update(data)
        transfer.received += memoryview(data).nbytes
        self._outstanding -= 1
        return ReceivedChunk(name, transfer.size, chunk.start, data)

    def finished(self, name: Owned) -> bool | None:
        """Forget a blob whose bytes are all here, and tell whether they match its digest.

        Returns None, and forgets nothing, while bytes are missing.
        """
        transfer = self._transfers[name]
        if transfer.received < transfer.size:
            return None
        del self._transfers[name]
        return transfer.hasher.digest() == name.digest

    def discard(self, name: Owned) -> None:
        """Give up on a blob."""
        transfer = self._transfers.pop(name, None)
        if transfer is not None:
            self._outstanding -= -(-(transfer.asked - transfer.received) // CHUNK_BYTES)

    def restart(self) -> None:
        """After a reconnect: what was asked for and did not come is asked for again."""
        self._outstanding = 0
        for transfer in self._transfers.values():
            transfer.asked = transfer.received
