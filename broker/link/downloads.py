"""The blobs that a node pulls over its link: whole, or in pieces as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedmq.broker.link.events import Action, ChunkStreamed, Fetch, Fetched
from fedmq.broker.wire.chunked_transfer import WINDOW_CHUNKS, Fetcher, Owned
from fedmq.broker.wire.schema import Blob, Buffer, Chunk, ChunkRequest


@dataclass
class _Arriving:
    blob: Blob
    data: memoryview | None
    """None if it is handed on in pieces."""


class Arrivals:
    """Blobs that were asked for and are not complete."""

    def __init__(self) -> None:
        self._fetcher = Fetcher()
        self._arriving: dict[Owned, _Arriving] = {}
        self._unread = 0
        """Pieces that were handed on, and that the node is not done with."""

    @property
    def outstanding(self) -> int:
        """Return the number of chunks that were asked for and have not come."""
        return self._fetcher.outstanding

    def fetch(self, request: Fetch, out: list[Action]) -> None:
        """Begin to fetch a blob, unless it is on its way already."""
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

    def piece_was_read(self) -> None:
        """The node is done with a piece: there is room for another."""
        self._unread -= 1

    def leave(self, owner: str, blob: Blob) -> None:
        """The node does not want the rest of a blob."""
        name = Owned(owner, blob.digest)
        self._unread = 0
        self._fetcher.discard(name)
        self._arriving.pop(name, None)

    def receive(self, chunk: Chunk, buffers: Sequence[Buffer], out: list[Action]) -> None:
        """Take a chunk, or the answer that nobody has the blob (no buffer)."""
        name = Owned(chunk.owner, chunk.digest)
        arriving = self._arriving.get(name)
        if arriving is None:
            return
        if not buffers:
            self._fetcher.discard(name)
            out.append(Fetched(name.owner, arriving.blob, None))
            del self._arriving[name]
            return
        piece = self._fetcher.receive(chunk, buffers[0])
        if piece is None:
            return
        if arriving.data is None:
            self._unread += 1
            out.append(ChunkStreamed(piece.data))
        else:
            end = piece.start + memoryview(piece.data).nbytes
            arriving.data[piece.start : end] = piece.data
        good = self._fetcher.finished(name)
        if good is not None:
            data = arriving.data if arriving.data is not None else b""
            out.append(Fetched(name.owner, arriving.blob, data if good else None))
            del self._arriving[name]

    def restart(self) -> None:
        """After a reconnect: what was asked for and did not come is asked for again."""
        self._fetcher.restart()

    def wants(self) -> list[ChunkRequest]:
        """Return the requests that there is room for."""
        return self._fetcher.wants(max(0, WINDOW_CHUNKS - self._unread))
