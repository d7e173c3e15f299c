"""The blobs that a node downloads over its link: whole, or streamed in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedmq.broker.link.events import Action, ChunkStreamed, Fetch, Fetched
from fedmq.broker.wire.chunked_transfer import WINDOW_CHUNKS, Fetcher, Owned
from fedmq.broker.wire.schema import Blob, Buffer, Chunk, ChunkRequest


@dataclass
class _Arriving:
    """A blob on its way."""

    blob: Blob
    data: memoryview | None
    """The bytes so far; None if chunks are streamed to the node."""


class Arrivals:
    """Blobs that were requested and are incomplete."""

    def __init__(self) -> None:
        self._fetcher = Fetcher()
        """Requests the chunks, and checks the digests."""
        self._arriving: dict[Owned, _Arriving] = {}
        """The blobs that the fetcher requests."""
        self._unread = 0
        """Streamed chunks that the node has not read yet."""

    @property
    def outstanding(self) -> int:
        """Return the number of chunks that were requested and have not arrived."""
        return self._fetcher.outstanding

    def fetch(self, request: Fetch, out: list[Action]) -> None:
        """Start fetching a blob, unless it is being fetched."""
        owner, blob = request.owner, request.blob
        name = Owned(owner, blob.digest)
        if blob.size == 0:
            out.append(Fetched(owner, blob, b""))
        elif name not in self._arriving:
            try:
                data = None if request.in_pieces else np.empty(blob.size, np.uint8).data
            except MemoryError:
                out.append(Fetched(owner, blob, None))
                return
            self._arriving[name] = _Arriving(blob, data)
            self._fetcher.add(owner, blob)

    def chunk_was_read(self) -> None:
        """Return the credit of a streamed chunk that the node has read."""
        self._unread -= 1

    def leave(self, owner: str, blob: Blob) -> None:
        """Stop streaming a blob."""
        name = Owned(owner, blob.digest)
        self._unread = 0
        self._fetcher.discard(name)
        self._arriving.pop(name, None)

    def receive(self, chunk: Chunk, buffers: Sequence[Buffer], out: list[Action]) -> None:
        """Handle a chunk; without a buffer, it says that nobody has the blob."""
        name = Owned(chunk.owner, chunk.digest)
        arriving = self._arriving.get(name)
        if arriving is None:
            return
        if not buffers:
            self._fetcher.discard(name)
            out.append(Fetched(name.owner, arriving.blob, None))
            del self._arriving[name]
            return
        received = self._fetcher.receive(chunk, buffers[0])
        if received is None:
            return
        if arriving.data is None:
            self._unread += 1
            out.append(ChunkStreamed(received.data))
        else:
            end = received.start + memoryview(received.data).nbytes
            arriving.data[received.start : end] = received.data
        good = self._fetcher.check_complete(name)
        if good is not None:
            data = arriving.data if arriving.data is not None else b""
            out.append(Fetched(name.owner, arriving.blob, data if good else None))
            del self._arriving[name]

    def validate_state(self) -> None:
        """Raise AssertionError if the state is inconsistent."""
        requested = self._fetcher
        found = [name for name in self._arriving if name in requested]
        if not len(found) == len(self._arriving) == len(requested):
            raise AssertionError("the blobs on their way are not those that are requested")
        if not 0 <= requested.outstanding <= WINDOW_CHUNKS or self._unread < 0:
            raise AssertionError(f"{self.outstanding} chunks requested, {self._unread} unread")

    def restart(self) -> None:
        """After a reconnect, request again what has not arrived."""
        self._fetcher.restart()

    def requests(self) -> list[ChunkRequest]:
        """Return the requests that fit the window."""
        return self._fetcher.requests(max(0, WINDOW_CHUNKS - self._unread))
