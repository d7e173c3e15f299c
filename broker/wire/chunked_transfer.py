"""Pull blobs over one link: in order, in chunks, a window at a time.

The end that lacks a blob requests it chunk by chunk, with at most a window of chunks in flight.
This byte credit bounds the memory of both ends, and how long a small message waits behind a large
one. The end that has the blob keeps no state, so a transfer resumes by requesting again.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import xxhash
from msgspec import Struct

from fedmq.broker.wire.schema import CHUNK_BYTES, Blob, Buffer, Chunk, ChunkRequest

WINDOW_CHUNKS = 4


class Owned(Struct, frozen=True, gc=False):
    """A blob within one run: the node that named it, and its digest."""

    owner: str
    digest: bytes


class ReceivedChunk(Struct, frozen=True):
    """A chunk as received: bytes ``start...`` of a blob of ``size`` bytes."""

    name: Owned
    size: int
    start: int
    data: Buffer


@dataclass
class _Transfer:
    size: int
    received: int = 0
    requested: int = 0
    hasher: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)


class Fetcher:
    """The receiving end of blob transfers over one link."""

    def __init__(self, window_chunks: int = WINDOW_CHUNKS) -> None:
        self._window = window_chunks
        self._transfers: OrderedDict[Owned, _Transfer] = OrderedDict()
        self._outstanding = 0
        self.missing_bytes = 0
        """Bytes of all these blobs that have not been received."""

    def __contains__(self, name: Owned) -> bool:
        return name in self._transfers

    def __len__(self) -> int:
        return len(self._transfers)

    @property
    def outstanding(self) -> int:
        """Return the number of chunks that were requested and have not arrived."""
        return self._outstanding

    def add(
        self, owner: str, blob: Blob, received: int = 0, hasher: xxhash.xxh3_128 | None = None
    ) -> None:
        """Fetch a blob, after those added before; does nothing if it is being fetched.

        Args:
            owner: the node that named it.
            blob: its digest and size.
            received: bytes from its start that were received before.
            hasher: the hash of these bytes.
        """
        name = Owned(owner, blob.digest)
        if name not in self._transfers:
            hasher = hasher or xxhash.xxh3_128()
            self._transfers[name] = _Transfer(blob.size, received, received, hasher)
            self.missing_bytes += blob.size - received

    def requests(self, window: int | None = None) -> list[ChunkRequest]:
        """Return the requests that fit a window, by default the fetcher's own."""
        limit = self._window if window is None else min(window, self._window)
        requests = []
        for name, transfer in self._transfers.items():
            while transfer.requested < transfer.size and self._outstanding < limit:
                size = min(CHUNK_BYTES, transfer.size - transfer.requested)
                requests.append(
                    ChunkRequest(
                        owner=name.owner, digest=name.digest, start=transfer.requested, size=size
                    )
                )
                transfer.requested += size
                self._outstanding += 1
            if self._outstanding >= limit:
                break
        return requests

    def receive(self, chunk: Chunk, data: Buffer) -> ReceivedChunk | None:
        """Take a chunk; return None if it is not the next one of a requested blob.

        A link keeps order, so the chunks of a blob arrive in the order of the requests. After
        `restart`, late chunks are recognised by their start.
        """
        name = Owned(chunk.owner, chunk.digest)
        transfer = self._transfers.get(name)
        if (
            transfer is None
            or chunk.start != transfer.received
            or chunk.start >= transfer.requested
        ):
            return None
        if memoryview(data).nbytes != min(CHUNK_BYTES, transfer.size - chunk.start):
            return None
        transfer.hasher.update(data)
        transfer.received += memoryview(data).nbytes
        self.missing_bytes -= memoryview(data).nbytes
        self._outstanding -= 1
        return ReceivedChunk(name, transfer.size, chunk.start, data)

    def check_complete(self, name: Owned) -> bool | None:
        """Remove a complete blob, and return whether its bytes match its digest.

        Returns None, and removes nothing, while bytes are missing.
        """
        transfer = self._transfers[name]
        if transfer.received < transfer.size:
            return None
        del self._transfers[name]
        return transfer.hasher.digest() == name.digest

    def discard(self, name: Owned) -> None:
        """Stop fetching a blob."""
        transfer = self._transfers.pop(name, None)
        if transfer is not None:
            self.missing_bytes -= transfer.size - transfer.received
            self._outstanding -= -(-(transfer.requested - transfer.received) // CHUNK_BYTES)

    def restart(self) -> None:
        """After a reconnect, request again what has not arrived."""
        self._outstanding = 0
        for transfer in self._transfers.values():
            transfer.requested = transfer.received
