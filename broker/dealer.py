"""The DEALER loop: drives a Link core with a real socket and clock.

One of the two files that move bytes over zmq. The loop has two homes, the node's main
thread and one of the link's own: whoever holds the baton runs it (`fedmq.broker.baton`).
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import structlog
import zmq

from fedmq.broker import link_state as link
from fedmq.broker.baton import Baton
from fedmq.broker.clock import Clock, milliseconds_until
from fedmq.broker.errors import LinkClosed, Rejected, RunOver, VersionError, WireError
from fedmq.broker.headers import encode_frame
from fedmq.broker.link import Link
from fedmq.broker.link_state import Delivery
from fedmq.broker.outbox import Outbox
from fedmq.broker.router import COPY_BELOW_BYTES, MAX_FRAME_BYTES, receive
from fedmq.broker.shared_files import SharedFiles
from fedmq.broker.wire import (
    Buffer,
    Bye,
    Done,
    Hello,
    Message,
    Over,
    Welcome,
)

_MAX_UNRECEIPTED = 4096


class NodeLink:
    """A node's connection to its broker.

    All methods but `stop` and `hand_in` are the main thread's.

    Args:
        endpoint: where the broker listens.
        hello: what the node says of itself.

    Raises:
        LinkClosed: the endpoint is no address.
    """

    def __init__(self, endpoint: str, hello: Hello) -> None:
        self._clock = Clock()
        self._core = Link(hello)
        self._inbox: deque[Delivery] = deque()
        self._outgoing = Outbox()
        self._files = SharedFiles()
        self._gathering = False
        self._fetched: dict[tuple[str, bytes], Buffer | None] = {}
        self._came: deque[Buffer] = deque()
        self._handed_in: deque[Message] = deque()
        self._last_fetched: tuple[str, bytes, Buffer] | None = None
        self._welcome: Welcome | None = None
        self._ended: link.Ended | None = None
        self._stopping = False
        self._log = structlog.get_logger().bind(node=hello.node)
        self._baton = Baton(self._over)

        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.copy_threshold = COPY_BELOW_BYTES
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            self._baton.close()
            raise LinkClosed(f"cannot connect to {endpoint}: {str(error).lower()}") from None
        self._incoming, self._both_ways = zmq.Poller(), zmq.Poller()
        for poller, events in (
            (self._incoming, zmq.POLLIN),
            (self._both_ways, zmq.POLLIN | zmq.POLLOUT),
        ):
            poller.register(self._baton.bell, zmq.POLLIN)
            poller.register(self._socket, events)
        self._thread = threading.Thread(
            target=self._baton.stand_in, args=(self._stand_in,), name="link", daemon=True
        )
        self._thread.start()

    def wait_admitted(self, timeout_s: float) -> bool:
        """Wait for an answer to Hello; tell whether it came in time."""
        deadline = self._clock() + timeout_s
        with self._baton.holding():
            while self._welcome is None and self._ended is None and self._clock() < deadline:
                self._turn(deadline)
            return self._welcome is not None or self._ended is not None

    def welcome(self) -> Welcome:
        """Wait until the broker admits this node, and return what it said.

        Raises:
            Rejected: it does not; the message is its reason.
            LinkClosed: the link was stopped.
        """
        with self._baton.holding():
            while self._welcome is None:
                self._turn_or_raise()
            return self._welcome

    def get(self) -> Delivery:
        """Wait for the next message.

        Raises:
            LinkClosed: the run is over, or the link was stopped.
            Rejected: the broker does not admit this node any more.
        """
        with self._baton.holding():
            while not self._inbox:
                self._turn_or_raise()
            delivery = self._inbox.popleft()
            self._tell(link.Taken(delivery))
            return delivery

    def post(
        self, message: Message, data: Sequence[Buffer] = (), consumes: tuple[int, ...] = ()
    ) -> None:
        """Post a message; ``data`` must stay as it is from now on.

        Waits while very many posts have no receipt, so that they do not fill the memory.

        Raises:
            LinkClosed: the link ended meanwhile.
        """
        with self._baton.holding():
            self._tell(link.Outgoing(message, data, consumes))
            if self._core.unreceipted > _MAX_UNRECEIPTED:
                self.flush(_MAX_UNRECEIPTED // 2)

    def hand_in(self, message: Message) -> None:
        """Have a message without data posted soon; may be called from another thread.

        Once the link has ended, nothing comes of it.
        """
        self._handed_in.append(message)
        if not self._over():
            self._baton.ring()

    def flush(self, limit: int = 0) -> None:
        """Wait until at most ``limit`` of all that was said have no receipt.

        Raises:
            LinkClosed: the link ended meanwhile.
        """
        with self._baton.holding():
            while self._core.unreceipted > limit:
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
        if index in delivery.places:
            whole = np.empty(blob.size, np.uint8).data
            found = sum(map(len, self._in_place(delivery, index, whole)))
            data = whole if found == blob.size else None
        if data is None:
            with self._baton.holding():
                self._tell(link.Fetch(owner, blob))
                while (owner, blob.digest) not in self._fetched:
                    self._turn_or_raise()
                data = self._fetched.pop((owner, blob.digest))
        if data is None:
            raise WireError(f"blob {blob.digest.hex()} of {owner} cannot be had")
        self._last_fetched = (owner, blob.digest, data)
        return data

    def pieces(self, delivery: Delivery, index: int) -> Iterator[Buffer]:
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
            while name not in self._fetched or self._came:
                with self._baton.holding():
                    while not self._came and name not in self._fetched:
                        self._turn_or_raise()
                if self._came:
                    came = memoryview(self._came.popleft())
                    known = min(found, came.nbytes)
                    found -= known
                    if known < came.nbytes:
                        yield came[known:]
                    self._tell(link.More())
            if self._fetched[name] is None:
                raise WireError(f"blob {blob.digest.hex()} of {owner} cannot be had")
        finally:
            self._tell(link.Leave(owner, blob))
            self._came.clear()
            self._fetched.pop(name, None)

    def _in_place(
        self, delivery: Delivery, index: int, into: memoryview | None = None
    ) -> Iterator[memoryview]:
        """Yield a blob's bytes from the ledger's files; it ends early where that cannot be done."""
        places = delivery.places.get(index, ())
        pieces = self._files.pieces(delivery.message.blobs[index], places, into)
        while True:
            with self._baton.holding():  # not while the link's thread hears of another ledger
                piece = next(pieces, None)
                if piece is None:
                    return
                self._tell(link.ReadInPlace(piece.nbytes))
            yield piece

    def done(self, seqs: Sequence[int], refused: Mapping[int, str] | None = None) -> None:
        """Say that deliveries are done with; ``refused``: why some could not be used.

        One that is refused, but not among ``seqs``, is delivered again to a new session.
        """
        reasons = {seq: why[:2000] for seq, why in (refused or {}).items()}
        if reasons:
            self._tell(link.Say(Done(seqs=tuple(seqs), refused=reasons)))
        used = tuple(seq for seq in seqs if seq not in reasons)
        if used:
            self._tell(link.Say(Done(seqs=used)))

    def over(self, reason: str) -> None:
        """End the run; `get` raises LinkClosed once the broker has recorded it."""
        self._tell(link.Say(Over(reason=reason)))

    def away(self) -> contextlib.AbstractContextManager[None]:
        """Do something that may take long; the link's thread takes over meanwhile."""
        return self._baton.away()

    def pause(self, seconds: float) -> None:
        """Let time pass.

        Raises:
            LinkClosed: the link ended meanwhile.
        """
        deadline = self._clock() + seconds
        with self._baton.holding():
            while self._clock() < deadline:
                self._turn_or_raise(deadline)

    def stop(self) -> None:
        """Make what waits raise LinkClosed soon; may be called from another thread."""
        self._stopping = True
        self._baton.ring()

    def close(self, reason: str = "", *, failed: bool = False) -> None:
        """Say goodbye and let go of everything. ``failed``: the node ends for an error."""
        with self._baton.holding():
            if self._ended is None:
                self._tell(link.Say(Bye(reason=reason, failed=failed)))
            self._stopping = True
            self._turn(self._clock())
        self._baton.let_go()
        self._thread.join()
        self._files.close()
        # The goodbye may still be on its way: give it a moment.
        self._context.destroy(linger=200)
        self._baton.close()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Hold the link for several posts in a row, which travel together."""
        with self._baton.holding():
            self._gathering = True
            try:
                yield
            finally:
                self._gathering = False
                self._send_all()

    def _stand_in(self) -> None:
        """Take a turn on the link's own thread."""
        try:
            self._turn(None)
        except Exception as error:  # noqa: BLE001 - the main thread must hear of any end
            self._log.exception("link failed")
            self._ended = link.Ended(f"the link failed: {error!r}")

    def _over(self) -> bool:
        return self._ended is not None or self._stopping

    # ---- the loop; only with the baton

    def _turn_or_raise(self, until: float | None = None) -> None:
        if self._ended is not None:
            kind = Rejected if self._ended.rejected else RunOver if self._ended.over else LinkClosed
            raise kind(self._ended.reason)
        if self._stopping:
            raise LinkClosed("the node was stopped")
        self._turn(until)

    def _turn(self, until: float | None) -> None:
        """Wait for something to do, but not past ``until``, and do it."""
        times = [each for each in (self._core.deadline, until) if each is not None]
        poller = self._both_ways if self._outgoing else self._incoming
        ready = poller.poll(milliseconds_until(min(times, default=None), self._clock()))
        if any(each == self._baton.bell for each, _ in ready):
            self._baton.heard()
        now = self._clock()
        self._receive_all(now)
        while self._handed_in:
            event = link.Outgoing(self._handed_in.popleft(), (), ())
            self._carry_out(self._core.handle(event, now))
        self._carry_out(self._core.handle(link.Wake(), now))
        self._send_all()

    def _tell(self, event: link.Event) -> None:
        if not self._baton.main_holds:
            with self._baton.holding():
                self._tell(event)
            return
        self._carry_out(self._core.handle(event, self._clock()))
        if not self._gathering:
            self._send_all()

    def _receive_all(self, now: float) -> None:
        while self._ended is None:
            try:
                frames, _ = receive(self._socket, first=True, flags=zmq.NOBLOCK)
            except zmq.Again:
                return
            except VersionError as error:
                self._ended = link.Ended(str(error), rejected=True)
            except WireError as error:
                self._log.warning("unreadable frame from the broker", reason=str(error))
            else:
                for frame, buffers in frames:
                    if isinstance(frame, Welcome):
                        self._files.look(frame)
                    self._carry_out(self._core.handle(link.Received(frame, buffers), now))
                self._send_all()

    def _carry_out(self, actions: Sequence[link.Action]) -> None:
        for action in actions:
            match action:
                case link.Send(frame, buffers):
                    self._outgoing.add(encode_frame(frame), buffers)
                case link.Deliveries(delivery):
                    self._inbox.append(delivery)
                case link.Fetched(owner, blob, data):
                    self._fetched[owner, blob.digest] = data
                case link.Came(data):
                    self._came.append(data)
                case link.Admitted(welcome):
                    self._welcome = welcome
                case link.Blocked(reason):
                    self._log.warning("the broker keeps nothing now", reason=reason)
                case link.Ended():
                    self._ended = action

    def _send_all(self) -> None:
        while self._outgoing:
            try:
                self._socket.send_multipart(self._outgoing.next(), zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._outgoing.sent()
