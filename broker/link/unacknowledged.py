"""What a node has said and has no receipt for, and the blobs that it serves meanwhile."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from fedmq.broker.link.events import Send
from fedmq.broker.wire.schema import Buffer, ChunkRequest, NumberedFrame


@dataclass
class _Frame:
    """A numbered frame that has no receipt yet."""

    send: Send
    blobs: Sequence[bytes] = ()


@dataclass
class _Served:
    data: Buffer
    posts: int = 0


class UnacknowledgedFrames:
    """Numbered frames, from the first that has no receipt on, and the blobs that they name."""

    def __init__(self) -> None:
        self._frames: OrderedDict[int, _Frame] = OrderedDict()
        self._next_n = 0
        self._served: dict[bytes, _Served] = {}

    def __len__(self) -> int:
        """Return the number of these frames."""
        return len(self._frames)

    @property
    def oldest(self) -> int:
        """Return the number of the oldest frame without a receipt; the next one if all have."""
        return next(iter(self._frames), self._next_n)

    def add(
        self,
        frame: NumberedFrame,
        buffers: Sequence[Buffer] = (),
        blobs: Sequence[bytes] = (),
        data: Sequence[Buffer] = (),
    ) -> Send:
        """Give a frame its number, and keep it until it is receipted; return how it is sent.

        Args:
            frame: without a number.
            buffers: that travel beside it.
            blobs: digests of all that its message names.
            data: the bytes of each.
        """
        send = Send(msgspec.structs.replace(frame, n=self._next_n), buffers)
        self._frames[self._next_n] = _Frame(send, blobs)
        self._next_n += 1
        for digest, each in zip(blobs, data, strict=True):
            self._served.setdefault(digest, _Served(each)).posts += 1
        return send

    def sends(self) -> Iterator[Send]:
        """Yield all that has no receipt, in order, to be sent again."""
        return (each.send for each in self._frames.values())

    def acknowledged(self, upto: int) -> None:
        """Forget the frames up to this number, and the blobs that only they named."""
        while self._frames and next(iter(self._frames)) <= upto:
            _, frame = self._frames.popitem(last=False)
            for digest in frame.blobs:
                served = self._served[digest]
                served.posts -= 1
                if not served.posts:
                    del self._served[digest]

    def serves(self, digest: bytes) -> bool:
        """Tell whether a frame without a receipt names this blob."""
        return digest in self._served

    def chunk(self, want: ChunkRequest) -> Buffer | None:
        """Return a piece of a blob that is served; None if there is no such piece."""
        served = self._served.get(want.digest)
        if served is None or want.start + want.size > memoryview(served.data).nbytes:
            return None
        return memoryview(served.data).cast("B")[want.start : want.start + want.size]


class Stall:
    """Tells whether what is due does not come: twice in a row, then ever more seldom."""

    def __init__(self) -> None:
        self._seen: object = None
        self._count = 0
        self._patience = 2

    def is_stuck(self, *, due: bool, moved: object) -> bool:
        """Look once more. ``moved``: anything that differs if something has come."""
        if not due or moved != self._seen:
            self._seen, self._count, self._patience = moved, 0, 2
            return False
        self._count += 1
        if self._count < self._patience:
            return False
        self._count, self._patience = 0, min(2 * self._patience, 16)
        return True
