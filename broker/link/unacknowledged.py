"""The unacknowledged frames of a node, and the blobs that it serves meanwhile.

Only a window of the frames is sent at a time; acknowledgments open it for more. So a broker that
is slower than its nodes neither loses their frames nor keeps more of them than it allows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from fedmq.broker.link.events import Send
from fedmq.broker.wire.schema import Buffer, ChunkRequest, NumberedFrame
from fedmq.broker.wire.window import RESERVED_BYTES, WINDOW_BYTES, WINDOW_FRAMES, held_bytes

WINDOWS_TO_DOUBLE = 8
"""Windows without a loss after which a window that was shrunk is twice as large."""


@dataclass
class _Frame:
    """An unacknowledged frame, and the digests of the blobs that it names.

    nbytes: what it takes of the window.
    """

    send: Send
    blobs: Sequence[bytes]
    nbytes: int


@dataclass
class _Served:
    """The bytes of a blob, and how often unacknowledged frames name it."""

    data: Buffer
    posts: int = 0


class UnacknowledgedFrames:
    """The unacknowledged frames, in order, and the blobs that they name."""

    def __init__(self) -> None:
        self._frames: OrderedDict[int, _Frame] = OrderedDict()
        """By number; the numbers are consecutive."""
        self._next_n = 0
        """Number of the next frame."""
        self._sent = 0
        """Number after the last frame that was sent over the present connection."""
        self._window_bytes = 0
        """Bytes of the unacknowledged frames among these."""
        self._window = WINDOW_BYTES
        """Most bytes of them."""
        self._asked = -1
        """`_sent` when an acknowledgment was last asked for."""
        self._served: dict[bytes, _Served] = {}
        """The blobs of all these frames, by digest."""

    def __len__(self) -> int:
        """Return the number of these frames."""
        return len(self._frames)

    @property
    def oldest(self) -> int:
        """Return the number of the oldest unacknowledged frame; without one, the next number."""
        return next(iter(self._frames), self._next_n)

    def add(
        self,
        frame: NumberedFrame,
        buffers: Sequence[Buffer] = (),
        blobs: Sequence[bytes] = (),
        data: Sequence[Buffer] = (),
    ) -> None:
        """Number a frame, and keep it until it is acknowledged.

        Args:
            frame: without a number.
            buffers: sent with the frame.
            blobs: digests of all blobs of its message.
            data: the bytes of each blob.
        """
        frame = msgspec.structs.replace(frame, n=self._next_n)
        send = Send(frame, buffers)
        nbytes = held_bytes(frame, len(blobs) - len(buffers))
        for each in buffers:
            nbytes += memoryview(each).nbytes
        self._frames[self._next_n] = _Frame(send, blobs, nbytes)
        self._next_n += 1
        for digest, each in zip(blobs, data, strict=True):
            self._served.setdefault(digest, _Served(each)).posts += 1

    def restart(self) -> None:
        """After a reconnect, send all of these frames again."""
        self._sent, self._window_bytes, self._asked = self.oldest, 0, -1

    def shrink_window(self) -> None:
        """Send less at a time: the broker has dropped frames, because too many wait.

        It would drop most of a large window again and again.
        """
        self._window = RESERVED_BYTES

    def ready(self) -> Iterator[Send]:
        """Yield the actions that send the next frames, in order, as far as the window allows."""
        while (
            self._sent < self._next_n
            and self._sent - self._next_n + len(self._frames) < WINDOW_FRAMES
            and self._window_bytes < self._window
        ):
            frame = self._frames[self._sent]
            self._window_bytes += frame.nbytes
            self._sent += 1
            yield frame.send

    def wants_ack(self) -> bool:
        """Return once whether to ask for an acknowledgment: a window that was shrunk is full.

        A broker acknowledges late, for windows of the usual size.
        """
        full = self._sent < self._next_n and self._window < WINDOW_BYTES
        asks = full and self._asked != self._sent
        if asks:
            self._asked = self._sent
        return asks

    def acknowledged(self, upto: int) -> None:
        """Discard the frames up to this number, and the blobs that no other frame names."""
        while self._frames and next(iter(self._frames)) <= upto:
            n, frame = self._frames.popitem(last=False)
            if n < self._sent:
                self._window_bytes -= frame.nbytes
                grown = self._window + frame.nbytes // WINDOWS_TO_DOUBLE
                self._window = min(WINDOW_BYTES, grown)
            else:
                self._sent = n + 1  # it was sent over an earlier connection
            for digest in frame.blobs:
                served = self._served[digest]
                served.posts -= 1
                if not served.posts:
                    del self._served[digest]

    def serves(self, digest: bytes) -> bool:
        """Return whether an unacknowledged frame names this blob."""
        return digest in self._served

    def chunk(self, request: ChunkRequest) -> Buffer | None:
        """Return the requested bytes of a served blob; None if there are none."""
        served = self._served.get(request.digest)
        if served is None or request.start + request.size > memoryview(served.data).nbytes:
            return None
        return memoryview(served.data).cast("B")[request.start : request.start + request.size]

    def validate_state(self) -> None:
        """Raise AssertionError if the state is inconsistent."""
        if not self._frames and not self._served and not self._window_bytes:
            return  # the usual case
        first = self._next_n - len(self._frames)
        named: dict[bytes, int] = {}
        for number, (n, frame) in enumerate(self._frames.items(), first):
            if n != number:
                raise AssertionError(f"unacknowledged frame {n} is where {number} was expected")
            sent = frame.send.frame
            if not isinstance(sent, NumberedFrame) or sent.n != n:
                raise AssertionError(f"unacknowledged frame {n} would be sent as {sent}")
            for digest in frame.blobs:
                named[digest] = named.get(digest, 0) + 1
        if named != {digest: served.posts for digest, served in self._served.items()}:
            raise AssertionError("the served blobs are not those of the unacknowledged frames")
        if not RESERVED_BYTES <= self._window <= WINDOW_BYTES:
            raise AssertionError(f"the window has {self._window} bytes")
        window = [each.nbytes for n, each in self._frames.items() if n < self._sent]
        if sum(window) != self._window_bytes or len(window) > WINDOW_FRAMES:
            count, nbytes = len(window), self._window_bytes
            raise AssertionError(f"{count} frames of {sum(window)} bytes are sent, not {nbytes}")


class Stall:
    """Detects a stall: at the second check without progress, and then at ever longer intervals."""

    def __init__(self) -> None:
        self._seen: object = None
        """The value at the last check that saw progress."""
        self._count = 0
        """Number of checks without progress since then, or since the last stall."""
        self._patience = 2
        """Number of such checks that make a stall."""

    def is_stuck(self, *, due: bool, moved: object) -> bool:
        """Check once more. ``moved``: a value that changes whenever something arrives."""
        if not due or moved != self._seen:
            self._seen, self._count, self._patience = moved, 0, 2
            return False
        self._count += 1
        if self._count < self._patience:
            return False
        self._count, self._patience = 0, min(2 * self._patience, 16)
        return True
