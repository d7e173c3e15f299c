"""Read the blobs of deliveries: from the delivery, from the ledger's files, or over the link."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np

from fedmq.broker.errors import WireError
from fedmq.broker.link.events import Delivery, Event, Fetch, Leave, More, ReadInPlace
from fedmq.broker.link.local_blobs import LocalBlobs
from fedmq.broker.rejections import Code
from fedmq.broker.wire.schema import Blob, Buffer


class BlobReader:
    """Reads the blobs of deliveries: their `BlobSource`.

    Args:
        lock: of the link.
        handle: passes an event to the Link core.
        turn_until: runs the loop of the link until a condition is true.

    Attributes:
        files: the ledger's files, if the node is on the broker's host.
        fetched: fetched blobs by owner and digest, until they are read; None if nobody has it.
        streamed: chunks of the blob that is being streamed, until they are read.
    """

    def __init__(
        self,
        lock: AbstractContextManager[object],
        handle: Callable[[Event], None],
        turn_until: Callable[[Callable[[], object]], None],
    ) -> None:
        self._lock, self._handle, self._turn_until = lock, handle, turn_until
        self.files = LocalBlobs()
        self.fetched: dict[tuple[str, bytes], Buffer | None] = {}
        self.streamed: deque[Buffer] = deque()
        self._last: tuple[str, bytes, Buffer] | None = None
        """Owner, digest and bytes of the last large blob: consecutive tasks have the same model."""

    def read(self, delivery: Delivery, index: int) -> Buffer:
        """Return the bytes of a delivery's blob; fetches them if they did not come with it.

        Raises:
            WireError: nobody has the blob any more.
            LinkClosed: the link ended meanwhile.
        """
        if index in delivery.inline:
            return delivery.inline[index]
        owner, blob = delivery.message.sender, delivery.message.blobs[index]
        if self._last and self._last[:2] == (owner, blob.digest):
            return self._last[2]
        self._last = None
        data: Buffer | None = None
        if index in delivery.extents:
            buffer = np.empty(blob.size, np.uint8).data
            found = sum(map(len, self._in_place(delivery, index, buffer)))
            data = buffer if found == blob.size else None
        if data is None:
            self._handle(Fetch(owner, blob))
            self._turn_until(lambda: (owner, blob.digest) in self.fetched)
            data = self.fetched.pop((owner, blob.digest))
        if data is None:
            raise _missing(owner, blob)
        self._last = (owner, blob.digest, data)
        return data

    def chunks(self, delivery: Delivery, index: int) -> Iterator[Buffer]:
        """Yield the bytes of a delivery's blob in order, without holding all of them.

        Read it to its end before you read another blob.

        Raises:
            WireError: nobody has the blob any more; or, after the last chunk, its digest does
                not match.
            LinkClosed: the link ended meanwhile.
        """
        owner, blob = delivery.message.sender, delivery.message.blobs[index]
        if index in delivery.inline or not blob.size:
            yield self.read(delivery, index)
            return
        found = 0
        for chunk in self._in_place(delivery, index):
            yield chunk
            found += len(chunk)
        if found == blob.size:
            return
        name = (owner, blob.digest)
        self._handle(Fetch(owner, blob, in_pieces=True))
        try:
            while name not in self.fetched or self.streamed:
                self._turn_until(lambda: self.streamed or name in self.fetched)
                if self.streamed:
                    data = memoryview(self.streamed.popleft())
                    skip = min(found, data.nbytes)
                    found -= skip
                    if skip < data.nbytes:
                        yield data[skip:]
                    self._handle(More())
            if self.fetched[name] is None:
                raise _missing(owner, blob)
        finally:
            self._handle(Leave(owner, blob))
            self.streamed.clear()
            self.fetched.pop(name, None)

    def _in_place(
        self, delivery: Delivery, index: int, into: memoryview | None = None
    ) -> Iterator[memoryview]:
        """Yield a blob's bytes from the ledger's files; stops early if they cannot be read."""
        extents = delivery.extents.get(index, ())
        chunks = self.files.chunks(delivery.message.blobs[index], extents, into)
        while True:
            with self._lock:  # not while the link's thread opens another ledger
                chunk = next(chunks, None)
                if chunk is None:
                    return
                self._handle(ReadInPlace(chunk.nbytes))
            yield chunk


def _missing(owner: str, blob: Blob) -> WireError:
    text = f"nobody has blob {blob.digest.hex()} of {owner} any more"
    return WireError(text, Code.MISSING_BLOB)
