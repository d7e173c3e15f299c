"""A node's connection to its broker, as programs use it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from msgspec import UNSET

from fedmq.broker.errors import WireError
from fedmq.broker.link import events as link
from fedmq.broker.link.dealer import Dealer
from fedmq.broker.link.events import Delivery
from fedmq.broker.rejections import Code
from fedmq.broker.wire.schema import (
    Buffer,
    Done,
    Goodbye,
    Hello,
    Message,
    RunEnded,
    Welcome,
)

_MAX_UNACKNOWLEDGED = 4096
_TAKEN_TOGETHER = 64
"""Of so many messages that were taken, the core is told at once."""


class NodeLink(Dealer):
    """A node's connection to its broker.

    All methods but `stop` and `hand_in` are the main thread's.

    Args:
        endpoint: where the broker listens.
        hello: what the node says of itself.

    Raises:
        LinkClosed: the endpoint is no address, or its name has none.
    """

    def __init__(self, endpoint: str, hello: Hello) -> None:
        super().__init__(endpoint, hello)
        self._last_fetched: tuple[str, bytes, Buffer] | None = None

    def give_up_after(self, seconds: float) -> None:
        """Make what waits raise GaveUp once the broker, or the run, is away for so long."""
        with self._handoff:
            self._core.give_up_after(seconds)

    def welcome(self) -> Welcome:
        """Wait until the broker admits this node, and return what it said.

        Raises:
            Rejected: it does not; the message is its reason.
            LinkClosed: the link was stopped.
        """
        with self._handoff:
            while self._welcome is None:
                self._turn_or_raise()
            return self._welcome

    def wait(self, timeout_s: float) -> bool:
        """Wait for a message for a while; tell whether `get` has one.

        Raises:
            LinkClosed: the run is over, or the link was stopped.
            Rejected: the broker does not admit this node any more.
        """
        if not self._inbox:
            deadline = self._clock() + timeout_s
            with self._handoff:
                while not self._inbox and self._clock() < deadline:
                    self._turn_or_raise(deadline)
        return bool(self._inbox)

    def get(self) -> Delivery:
        """Wait for the next message.

        Raises:
            LinkClosed: the run is over, or the link was stopped.
            Rejected: the broker does not admit this node any more.
        """
        if not self._inbox:
            with self._handoff:
                while not self._inbox:
                    self._turn_or_raise()
        delivery = self._inbox.popleft()
        self._taken.append(delivery)
        if len(self._taken) >= _TAKEN_TOGETHER:
            with self._handoff:
                self._catch_up()
                self._send_all()
        return delivery

    def post(
        self, message: Message, data: Sequence[Buffer] = (), consumes: tuple[int, ...] = ()
    ) -> None:
        """Post a message; ``data`` must stay as it is from now on.

        Waits while very many posts have no receipt, so that they do not fill the memory.

        Raises:
            LinkClosed: the link ended meanwhile.
        """
        self._tell(link.Outgoing(message, data, consumes))
        if self._core.unacknowledged > _MAX_UNACKNOWLEDGED:
            self.flush(_MAX_UNACKNOWLEDGED // 2)

    def hand_in(self, message: Message) -> None:
        """Have a message without data posted soon; may be called from another thread.

        Once the link has ended, nothing comes of it.
        """
        self._handed_in.append(message)
        if not self._over():
            self._handoff.wake()

    def flush(self, limit: int = 0) -> None:
        """Wait until at most ``limit`` of all that was said have no receipt.

        Raises:
            LinkClosed: the link ended meanwhile.
        """
        with self._handoff:
            self._catch_up()
            while self._core.unacknowledged > limit:
                self._turn_or_raise()

    def read(self, delivery: Delivery, index: int) -> Buffer:
        """Return the bytes of a delivery's blob, pulling them from the broker if need be.

        Raises:
            WireError: nobody holds the blob any more.
            LinkClosed: the link ended meanwhile.
        """
        if index in delivery.inline:
            return delivery.inline[index]
        owner, blob = delivery.message.sender, delivery.message.blobs[index]
        # Successive tasks often carry the same model: the last large blob is kept.
        if self._last_fetched and self._last_fetched[:2] == (owner, blob.digest):
            return self._last_fetched[2]
        self._last_fetched = None
        data: Buffer | None = None
        if index in delivery.extents:
            whole = np.empty(blob.size, np.uint8).data
            found = sum(map(len, self._in_place(delivery, index, whole)))
            data = whole if found == blob.size else None
        if data is None:
            with self._handoff:
                self._tell(link.Fetch(owner, blob))
                while (owner, blob.digest) not in self._fetched:
                    self._turn_or_raise()
                data = self._fetched.pop((owner, blob.digest))
        if data is None:
            text = f"blob {blob.digest.hex()} of {owner} cannot be had"
            raise WireError(text, Code.MISSING_BLOB)
        self._last_fetched = (owner, blob.digest, data)
        return data

    def chunks(self, delivery: Delivery, index: int) -> Iterator[Buffer]:
        """Yield the bytes of a delivery's blob in order, without holding all of them.

        It must be read to its end before anything else is read.

        Raises:
            WireError: nobody holds the blob any more, or its bytes are not what it says;
                that is known after the last piece.
            LinkClosed: the link ended meanwhile.
        """
        owner, blob = delivery.message.sender, delivery.message.blobs[index]
        if index in delivery.inline or not blob.size:
            yield self.read(delivery, index)
            return
        found = 0
        for piece in self._in_place(delivery, index):
            yield piece
            found += len(piece)
        if found == blob.size:
            return
        name = (owner, blob.digest)
        self._tell(link.Fetch(owner, blob, in_pieces=True))
        try:
            while name not in self._fetched or self._streamed:
                with self._handoff:
                    while not self._streamed and name not in self._fetched:
                        self._turn_or_raise()
                if self._streamed:
                    came = memoryview(self._streamed.popleft())
                    known = min(found, came.nbytes)
                    found -= known
                    if known < came.nbytes:
                        yield came[known:]
                    self._tell(link.More())
            if self._fetched[name] is None:
                text = f"blob {blob.digest.hex()} of {owner} cannot be had"
                raise WireError(text, Code.MISSING_BLOB)
        finally:
            self._tell(link.Leave(owner, blob))
            self._streamed.clear()
            self._fetched.pop(name, None)

    def _in_place(
        self, delivery: Delivery, index: int, into: memoryview | None = None
    ) -> Iterator[memoryview]:
        """Yield a blob's bytes from the ledger's files; it ends early where that cannot be done."""
        places = delivery.extents.get(index, ())
        pieces = self._files.chunks(delivery.message.blobs[index], places, into)
        while True:
            with self._handoff:  # not while the link's thread hears of another ledger
                piece = next(pieces, None)
                if piece is None:
                    return
                self._tell(link.ReadInPlace(piece.nbytes))
            yield piece

    def done(
        self,
        seqs: Sequence[int],
        refused: Mapping[int, str] | None = None,
        codes: Mapping[int, str] | None = None,
    ) -> None:
        """Say that deliveries are done with; ``refused``: why some could not be used.

        One that is refused, but not among ``seqs``, is delivered again to a new session.
        ``codes``: of the reasons, for programs: see `rejections.Code`.
        """
        reasons = {seq: why[:2000] for seq, why in (refused or {}).items()}
        if reasons:
            frame = Done(seqs=tuple(seqs), refused=reasons, codes=dict(codes) if codes else UNSET)
            self._tell(link.Publish(frame))
        used = tuple(seq for seq in seqs if seq not in reasons)
        if used:
            self._tell(link.Publish(Done(seqs=used)))

    def over(self, reason: str) -> None:
        """End the run; `get` raises LinkClosed once the broker has recorded it."""
        self._tell(link.Publish(RunEnded(reason=reason)))

    def away(self) -> contextlib.AbstractContextManager[None]:
        """Do something that may take long; the link's thread takes over meanwhile."""
        return self._handoff.away()

    def pause(self, seconds: float) -> None:
        """Let time pass.

        Raises:
            LinkClosed: the link ended meanwhile.
        """
        deadline = self._clock() + seconds
        with self._handoff:
            while self._clock() < deadline:
                self._turn_or_raise(deadline)

    def stop(self) -> None:
        """Make what waits raise LinkClosed soon; may be called from another thread."""
        self._stopping = True
        self._handoff.wake()

    def close(self, reason: str = "", *, failed: bool = False, silent: bool = False) -> None:
        """Say goodbye and let go of everything.

        Args:
            reason: why, for the record.
            failed: the node ends for an error.
            silent: say nothing, as if the node had been killed.
        """
        with self._handoff:
            if self._ended is None and not silent:
                self._tell(link.Publish(Goodbye(reason=reason, failed=failed)))
            self._stopping = True
            self._turn(self._clock())
        self._release()
