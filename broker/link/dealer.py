"""The DEALER loop: drives a Link core with a real socket and clock.

One of the three files that use zmq. Either the node's main thread or a thread of the link runs
the loop: see `fedmq.broker.link.thread_handoff`.
"""

from __future__ import annotations

import socket as sockets
import threading
from collections import deque
from collections.abc import Sequence

import structlog
import zmq

from fedmq.broker.errors import (
    EndpointError,
    GaveUp,
    LinkClosed,
    Rejected,
    RunOver,
    VersionError,
    WireError,
)
from fedmq.broker.link import events as link
from fedmq.broker.link.contact import sentence
from fedmq.broker.link.core import Link
from fedmq.broker.link.events import Delivery
from fedmq.broker.link.local_blobs import LocalBlobs
from fedmq.broker.link.probe import probe
from fedmq.broker.link.thread_handoff import LoopHandoff
from fedmq.broker.wire.batching import Outbox
from fedmq.broker.wire.clock import Clock, milliseconds_until
from fedmq.broker.wire.encoding import encode_frame
from fedmq.broker.wire.endpoints import parse_endpoint, resolve
from fedmq.broker.wire.schema import Buffer, Hello, Message, Welcome
from fedmq.broker.wire.sockets import COPY_BELOW_BYTES, MAX_FRAME_BYTES, receive, send_parts

_TRIES_A_FAMILY = 2
"""Hellos without an answer before the other address family of the host name is tried."""


class Dealer:
    """A Link core on a real socket, with the queues between both; the base of `NodeLink`.

    Raises:
        LinkClosed: the endpoint is invalid, or its host name has no address.
    """

    def __init__(self, endpoint: str, hello: Hello) -> None:
        try:
            self._endpoint = parse_endpoint(endpoint)
            self._families = deque(resolve(self._endpoint))
        except EndpointError as error:
            raise LinkClosed(f"cannot connect to {endpoint}: {error}") from None
        self._hello = hello
        self._unanswered = 0
        """Hellos since the last frame from the broker."""
        self._unreadable = ""
        """The reason last logged for an unreadable frame: repetitions are not logged."""
        self._probing: threading.Thread | None = None
        self._found = ""
        """What the last probe of the silent endpoint found."""
        self._clock = Clock()
        self._core = Link(hello)
        self._inbox: deque[Delivery] = deque()
        self._outgoing = Outbox()
        self._files = LocalBlobs()
        self._taken: deque[Delivery] = deque()
        self._fetched: dict[tuple[str, bytes], Buffer | None] = {}
        self._streamed: deque[Buffer] = deque()
        self._handed_in: deque[Message] = deque()
        self._welcome: Welcome | None = None
        self._ended: link.LinkEnded | None = None
        self._stopping = False
        self._log = structlog.get_logger().bind(node=hello.node)
        self._handoff = LoopHandoff(self._over)

        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.copy_threshold = COPY_BELOW_BYTES
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        try:
            self._connect()
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            self._handoff.close()
            raise LinkClosed(f"cannot connect to {endpoint}: {str(error).lower()}") from None
        self._incoming, self._both_ways = zmq.Poller(), zmq.Poller()
        for poller, events in (
            (self._incoming, zmq.POLLIN),
            (self._both_ways, zmq.POLLIN | zmq.POLLOUT),
        ):
            poller.register(self._handoff.wakeup, zmq.POLLIN)
            poller.register(self._socket, events)
        self._thread = threading.Thread(
            target=self._handoff.run_in_background,
            args=(self._background_loop,),
            name="link",
            daemon=True,
        )
        self._thread.start()

    def _connect(self) -> None:
        """Connect with the first of the address families."""
        # libzmq resolves a name in one family only, each time it connects.
        self._socket.setsockopt(zmq.IPV6, self._families[0] is sockets.AF_INET6)
        self._socket.connect(self._endpoint.text)

    def _background_loop(self) -> None:
        """Run one turn on the link's own thread."""
        try:
            self._turn(None)
        except Exception as error:  # noqa: BLE001 - the main thread must learn of any error
            self._log.exception("link failed")
            self._ended = link.LinkEnded(f"the link failed: {error!r}")

    def _over(self) -> bool:
        return self._ended is not None or self._stopping

    def _release(self) -> None:
        """Stop the loop and close everything."""
        self._handoff.release()
        self._thread.join()
        self._files.close()
        # A goodbye may still be in flight: give it a moment.
        self._context.destroy(linger=200)
        self._handoff.close()

    # ---- the loop; only the thread that holds the handoff may call these

    def _turn_or_raise(self, until: float | None = None) -> None:
        if self._ended is not None:
            raise self._error(self._ended)
        if self._stopping:
            raise LinkClosed("the node was stopped")
        self._turn(until)

    def _error(self, ended: link.LinkEnded) -> Rejected | LinkClosed:
        """Return the exception for a link that has ended."""
        if ended.rejected:
            return Rejected(ended.reason, ended.code, ended.config)
        if ended.out_of_touch is not None:
            silent = ended.out_of_touch.answer is None
            if silent and not self._found:
                self._found = probe(self._endpoint).text
            found = f"; {self._found}" if self._found and silent else ""
            return GaveUp(f"gave up: {self._sentence(ended.out_of_touch)}{found}")
        return RunOver(ended.reason) if ended.over else LinkClosed(ended.reason)

    def _catch_up(self) -> None:
        """Report to the core the deliveries that the node has taken since the last call."""
        if self._taken:
            taken = [self._taken.popleft() for _ in range(len(self._taken))]
            self._carry_out(self._core.handle(link.Taken(taken), self._clock()))

    def _turn(self, until: float | None) -> None:
        """Wait for an event, at most until ``until``, and handle it."""
        self._catch_up()
        deadline = self._core.deadline
        if deadline is None or (until is not None and until < deadline):
            deadline = until
        poller = self._both_ways if self._outgoing else self._incoming
        ready = poller.poll(milliseconds_until(deadline, self._clock()))
        if self._handoff.wakeup in dict(ready):
            self._handoff.clear_wakeup()
        now = self._clock()
        self._receive_all(now)
        while self._handed_in:
            event = link.PostMessage(self._handed_in.popleft(), (), ())
            self._carry_out(self._core.handle(event, now))
        self._carry_out(self._core.handle(link.Wake(), now))
        self._send_all()

    def _handle(self, event: link.Event) -> None:
        with self._handoff:
            self._catch_up()
            self._carry_out(self._core.handle(event, self._clock()))
            self._send_all()

    def _receive_all(self, now: float) -> None:
        while self._ended is None:
            try:
                frames, _ = receive(self._socket)
            except zmq.Again:
                return
            except VersionError as error:
                reason = (
                    f"the broker at {self._endpoint.text} speaks another protocol version: {error}"
                )
                self._ended = link.LinkEnded(reason, rejected=True, code="version")
            except WireError as error:
                if self._unreadable != str(error):
                    self._unreadable = str(error)
                    text = f"the answer from {self._endpoint.text} is not in fedmq's protocol"
                    self._log.warning(text, reason=self._unreadable)
            else:
                self._unanswered, self._found = 0, ""
                for frame, buffers in frames:
                    if isinstance(frame, Welcome):
                        self._files.open(frame)
                        self._unreadable = ""
                    self._carry_out(self._core.handle(link.FrameReceived(frame, buffers), now))
                self._send_all()

    def _carry_out(self, actions: Sequence[link.Action]) -> None:
        for action in actions:
            match action:
                case link.Send(frame=frame, buffers=buffers):
                    if isinstance(frame, Hello):
                        self._start_over()
                    self._outgoing.add(encode_frame(frame), buffers)
                case link.Deliveries(deliveries=deliveries):
                    self._inbox.extend(deliveries)
                case link.Fetched(owner, blob, data):
                    self._fetched[owner, blob.digest] = data
                case link.ChunkStreamed(data):
                    self._streamed.append(data)
                case link.Admitted(welcome):
                    self._welcome = welcome
                case link.Blocked(reason):
                    self._log.warning("the broker cannot write its ledger", reason=reason)
                case link.OutOfTouch() if action.answer is not None:
                    self._log.warning(self._sentence(action))
                case link.OutOfTouch():
                    self._start_probe(action)
                case link.BackInTouch(seconds):
                    self._log.info(f"back in touch with the broker after {seconds:.0f} s")
                case link.LinkEnded():
                    self._ended = action

    def _start_over(self) -> None:
        """Before a Hello, drop queued frames: the Welcome makes the core send them again.

        So frames do not accumulate while there is no broker. If there is no answer at the host
        name's addresses of one family, try the other.
        """
        self._outgoing = Outbox()
        self._unanswered += 1
        if len(self._families) > 1 and self._unanswered > _TRIES_A_FAMILY:
            self._unanswered = 1
            self._families.rotate()
            self._socket.disconnect(self._endpoint.text)
            self._connect()

    def _sentence(self, report: link.OutOfTouch) -> str:
        return sentence(report, self._endpoint.text, self._hello.run)

    def _start_probe(self, report: link.OutOfTouch) -> None:
        """Start a thread that probes the silent endpoint and logs what it finds."""
        if self._probing is not None and self._probing.is_alive():
            return
        self._probing = threading.Thread(
            target=self._probe, args=(report,), name="probe", daemon=True
        )
        self._probing.start()

    def _probe(self, report: link.OutOfTouch) -> None:
        found = probe(self._endpoint)
        self._found = found.text
        if not self._over():
            self._log.warning(self._sentence(report), reason=found.text, found=found.listener.value)

    def _send_all(self) -> None:
        while self._outgoing:
            try:
                send_parts(self._socket, self._outgoing.next())
            except zmq.Again:
                return
            self._outgoing.sent()
