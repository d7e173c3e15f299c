"""The DEALER loop: drives a Link core with a real socket and clock.

One of the two files that move bytes over zmq. The loop has two homes, the node's main
thread and one of the link's own: whoever holds the baton runs it (`fedmq.broker.baton`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

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
from fedmq.broker.router import COPY_BELOW_BYTES, MAX_FRAME_BYTES, receive, send_parts
from fedmq.broker.shared_files import SharedFiles
from fedmq.broker.wire import Buffer, Hello, Message, Welcome


class Dealer:
    """A Link core on a real socket, and what it hands on; see `NodeLink`, which is made of it."""

    def __init__(self, endpoint: str, hello: Hello) -> None:
        self._clock = Clock()
        self._core = Link(hello)
        self._inbox: deque[Delivery] = deque()
        self._outgoing = Outbox()
        self._files = SharedFiles()
        self._gathering = False
        self._gathered: list[bytes] = []
        self._taken: deque[Delivery] = deque()
        self._fetched: dict[tuple[str, bytes], Buffer | None] = {}
        self._came: deque[Buffer] = deque()
        self._handed_in: deque[Message] = deque()
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

    def _stand_in(self) -> None:
        """Take a turn on the link's own thread."""
        try:
            self._turn(None)
        except Exception as error:  # noqa: BLE001 - the main thread must hear of any end
            self._log.exception("link failed")
            self._ended = link.Ended(f"the link failed: {error!r}")

    def _over(self) -> bool:
        return self._ended is not None or self._stopping

    def _let_go(self) -> None:
        """Close everything, once the loop is to stop."""
        self._baton.let_go()
        self._thread.join()
        self._files.close()
        # A goodbye may still be on its way: give it a moment.
        self._context.destroy(linger=200)
        self._baton.close()

    # ---- the loop; only with the baton

    def _turn_or_raise(self, until: float | None = None) -> None:
        if self._ended is not None:
            kind = Rejected if self._ended.rejected else RunOver if self._ended.over else LinkClosed
            raise kind(self._ended.reason)
        if self._stopping:
            raise LinkClosed("the node was stopped")
        self._turn(until)

    def _catch_up(self) -> None:
        """Tell the core what it was not told one by one."""
        if self._taken:
            taken = [self._taken.popleft() for _ in range(len(self._taken))]
            self._carry_out(self._core.handle(link.Taken(taken), self._clock()))
        if self._gathered:
            gathered, self._gathered = self._gathered, []
            self._carry_out(self._core.handle(link.Together(gathered), self._clock()))

    def _turn(self, until: float | None) -> None:
        """Wait for something to do, but not past ``until``, and do it."""
        self._catch_up()
        deadline = self._core.deadline
        if deadline is None or (until is not None and until < deadline):
            deadline = until
        poller = self._both_ways if self._outgoing else self._incoming
        ready = poller.poll(milliseconds_until(deadline, self._clock()))
        if self._baton.bell in dict(ready):
            self._baton.heard()
        now = self._clock()
        self._receive_all(now)
        while self._handed_in:
            event = link.Outgoing(self._handed_in.popleft(), (), ())
            self._carry_out(self._core.handle(event, now))
        self._carry_out(self._core.handle(link.Wake(), now))
        self._send_all()

    def _tell(self, event: link.Event) -> None:
        with self._baton:
            self._catch_up()
            self._carry_out(self._core.handle(event, self._clock()))
            if not self._gathering:
                self._send_all()

    def _receive_all(self, now: float) -> None:
        while self._ended is None:
            try:
                frames, _ = receive(self._socket)
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
                case link.Send(frame=frame, buffers=buffers):
                    self._outgoing.add(encode_frame(frame), buffers)
                case link.Deliveries(deliveries=deliveries):
                    self._inbox.extend(deliveries)
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
                send_parts(self._socket, self._outgoing.next())
            except zmq.Again:
                return
            self._outgoing.sent()
