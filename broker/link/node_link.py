"""A node's connection to its broker, for programs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from msgspec import UNSET
from msgspec.structs import replace

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
_TAKEN_BATCH = 64
"""Number of taken deliveries that are reported to the core at once."""


class NodeLink(Dealer):
    """A node's connection to its broker.

    Only `stop` and `hand_in` may be called from other threads than the main one.

    Args:
        endpoint: of the broker.
        hello: the node's Hello.

    Raises:
        LinkClosed: the endpoint is invalid, or its host name has no address.
    """

    def __init__(self, endpoint: str, hello: Hello) -> None:
        super().__init__(endpoint, hello)
        self._last_fetched: tuple[str, bytes, Buffer] | None = None

    def give_up_after(self, seconds: float) -> None:
        """Make waiting methods raise GaveUp after this time without the broker or the run."""
        with self._handoff:
            self._core.give_up_after(seconds)

    def welcome(self) -> Welcome:
        """Wait until the broker admits this node, and return its Welcome.

        Raises:
            Rejected: the broker does not admit the node; the message is the reason.
            LinkClosed: the link was stopped.
        """
        with self._handoff:
            while self._welcome is None:
                self._turn_or_raise()
            return self._welcome

    def wait(self, timeout_s: float) -> bool:
        """Wait up to ``timeout_s`` for a message; return whether `get` has one.

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
        if len(self._taken) >= _TAKEN_BATCH:
            with self._handoff:
                self._catch_up()
                self._send_all()
        return replace(delivery, source=self)

    def post(
        self, message: Message, data: Sequence[Buffer] = (), consumes: tuple[int, ...] = ()
    ) -> None:
        """Post a message with the bytes of its blobs; the caller must not change ``data`` any more.

        Waits while very many posts are unacknowledged, to bound the memory.

        Raises:
            LinkClosed: the link ended meanwhile.
        """
        self._handle(link.PostMessage(message, data, consumes))
        if self._core.unacknowledged > _MAX_UNACKNOWLEDGED:
            self.flush(_MAX_UNACKNOWLEDGED // 2)

    def hand_in(self, message: Message) -> None:
        """Post a message without blobs soon; may be called from another thread.

        Does nothing once the link has ended.
        """
        self._handed_in.append(message)
        if not self._over():
            self._handoff.wake()

    def flush(self, limit: int = 0) -> None:
        """Wait until at most ``limit`` frames are unacknowledged.

        Raises:
            LinkClosed: the link ended meanwhile.
        """
        with self._handoff:
            self._catch_up()
            while self._core.unacknowledged > limit:
                self._turn_or_raise()

    def read(self, delivery: Delivery, index: int) -> Buffer:
        """Return the bytes of a delivery's blob; fetches them if they did not come with it.

        Raises:
            WireError: nobody has the blob any more.
            LinkClosed: the link ended meanwhile.
        """
        if index in delivery.inline:
            return delivery.inline[index]
        owner, blob = delivery.message.sender, delivery.message.blobs[index]
        # Consecutive tasks often have the same model: the last large blob is kept.
        if self._last_fetched and self._last_fetched[:2] == (owner, blob.digest):
            return self._last_fetched[2]
        self._last_fetched = None
        data: Buffer | None = None
        if index in delivery.extents:
            buffer = np.empty(blob.size, np.uint8).data
            found = sum(map(len, self._in_place(delivery, index, buffer)))
            data = buffer if found == blob.size else None
        if data is None:
            with self._handoff:
                self._handle(link.Fetch(owner, blob))
                while (owner, blob.digest) not in self._fetched:
                    self._turn_or_raise()
                data = self._fetched.pop((owner, blob.digest))
        if data is None:
            text = f"nobody has blob {blob.digest.hex()} of {owner} any more"
            raise WireError(text, Code.MISSING_BLOB)
        self._last_fetched = (owner, blob.digest, data)
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
        self._handle(link.Fetch(owner, blob, in_pieces=True))
        try:
            while name not in self._fetched or self._streamed:
                with self._handoff:
                    while not self._streamed and name not in self._fetched:
                        self._turn_or_raise()
                if self._streamed:
                    data = memoryview(self._streamed.popleft())
                    skip = min(found, data.nbytes)
                    found -= skip
                    if skip < data.nbytes:
                        yield data[skip:]
                    self._handle(link.More())
            if self._fetched[name] is None:
                text = f"nobody has blob {blob.digest.hex()} of {owner} any more"
                raise WireError(text, Code.MISSING_BLOB)
        finally:
            self._handle(link.Leave(owner, blob))
            self._streamed.clear()
            self._fetched.pop(name, None)

    def _in_place(
        self, delivery: Delivery, index: int, into: memoryview | None = None
    ) -> Iterator[memoryview]:
        """Yield a blob's bytes from the ledger's files; stops early if they cannot be read."""
        extents = delivery.extents.get(index, ())
        chunks = self._files.chunks(delivery.message.blobs[index], extents, into)
        while True:
            with self._handoff:  # not while the link's thread opens another ledger
                chunk = next(chunks, None)
                if chunk is None:
                    return
                self._handle(link.ReadInPlace(chunk.nbytes))
            yield chunk

    def done(
        self,
        seqs: Sequence[int],
        refused: Mapping[int, str] | None = None,
        codes: Mapping[int, str] | None = None,
    ) -> None:
        """Report that deliveries have been handled, or rejected.

        Args:
            seqs: their numbers.
            refused: reasons of the rejected ones, by number; one that is not among ``seqs`` is
                delivered again to a new session.
            codes: codes of the reasons, by number: see `rejections.Code`.
        """
        reasons = {seq: why[:2000] for seq, why in (refused or {}).items()}
        if reasons:
            frame = Done(seqs=tuple(seqs), refused=reasons, codes=dict(codes) if codes else UNSET)
            self._handle(link.Publish(frame))
        used = tuple(seq for seq in seqs if seq not in reasons)
        if used:
            self._handle(link.Publish(Done(seqs=used)))

    def over(self, reason: str) -> None:
        """End the run; `get` raises RunOver once the broker has recorded the end."""
        self._handle(link.Publish(RunEnded(reason=reason)))

    def away(self) -> contextlib.AbstractContextManager[None]:
        """Return a context for long work, in which the link's thread runs the loop."""
        return self._handoff.away()

    def pause(self, seconds: float) -> None:
        """Wait for this many seconds.

        Raises:
            LinkClosed: the link ended meanwhile.
        """
        deadline = self._clock() + seconds
        with self._handoff:
            while self._clock() < deadline:
                self._turn_or_raise(deadline)

    def stop(self) -> None:
        """Make waiting methods raise LinkClosed soon; may be called from another thread."""
        self._stopping = True
        self._handoff.wake()

    def close(self, reason: str = "", *, failed: bool = False, silent: bool = False) -> None:
        """Say goodbye, and close the link.

        Args:
            reason: recorded in the ledger.
            failed: whether the node ends because of an error.
            silent: do not say goodbye, as if the node had been killed.
        """
        with self._handoff:
            if self._ended is None and not silent:
                self._handle(link.Publish(Goodbye(reason=reason, failed=failed)))
            self._stopping = True
            self._turn(self._clock())
        self._release()
