"""The live port of a link: a DEALER socket, the real clock, and a thread beside the program's.

One of the three files that use zmq.
"""

from __future__ import annotations

import contextlib
import socket as sockets
import threading
from collections import deque
from collections.abc import Sequence

import structlog
import zmq

from fedmq.broker.errors import EndpointError, LinkClosed, VersionError, WireError
from fedmq.broker.link.contact import sentence
from fedmq.broker.link.events import BackInTouch, Blocked, OutOfTouch
from fedmq.broker.link.port import Loop, Received
from fedmq.broker.link.probe import probe
from fedmq.broker.link.thread_handoff import LoopHandoff
from fedmq.broker.wire.batching import Outbox
from fedmq.broker.wire.clock import Clock, milliseconds_until
from fedmq.broker.wire.encoding import encode_frame
from fedmq.broker.wire.endpoints import libzmq_address, parse_endpoint, resolve
from fedmq.broker.wire.schema import Buffer, Frame, Hello, Welcome
from fedmq.broker.wire.sockets import COPY_BELOW_BYTES, MAX_FRAME_BYTES, receive, send_parts

_TRIES_A_FAMILY = 2
"""Hellos without an answer before the other address family of the host name is tried."""


class DealerPort:
    """A `LinkPort` on a DEALER socket.

    Args:
        endpoint: of the broker.
        hello: the node's Hello; its node and run are named in the log.

    Raises:
        LinkClosed: the endpoint is invalid, or its host name has no address.
    """

    def __init__(self, endpoint: str, hello: Hello) -> None:
        try:
            self._address = parse_endpoint(endpoint)
            self._families = deque(resolve(self._address))
        except EndpointError as error:
            raise LinkClosed(f"cannot connect to {endpoint}: {error}") from None
        self.endpoint = self._address.text
        self.clock = Clock()
        self._run = hello.run
        self._log = structlog.get_logger().bind(node=hello.node)
        self._outgoing = Outbox()
        self._unanswered = 0
        """Hellos since the last frame from the broker."""
        self._unreadable = ""
        """The reason last logged for an unreadable frame: repetitions are not logged."""
        self._probing: threading.Thread | None = None
        self._listener = ""
        """What the last probe of the silent endpoint found."""
        self._loop: Loop | None = None
        self._thread: threading.Thread | None = None
        self._closing = False
        self.lock = LoopHandoff(self._is_over)

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
            self.lock.close()
            raise LinkClosed(f"cannot connect to {endpoint}: {str(error).lower()}") from None
        self._incoming, self._both_ways = zmq.Poller(), zmq.Poller()
        for poller, events in (
            (self._incoming, zmq.POLLIN),
            (self._both_ways, zmq.POLLIN | zmq.POLLOUT),
        ):
            poller.register(self.lock.wakeup, zmq.POLLIN)
            poller.register(self._socket, events)

    def _connect(self) -> None:
        """Connect with the first of the address families."""
        # libzmq resolves a name in one family only, each time it connects.
        self._socket.setsockopt(zmq.IPV6, self._families[0] is sockets.AF_INET6)
        self._socket.connect(libzmq_address(self.endpoint))

    def start(self, loop: Loop) -> None:
        """Start the thread that runs turns while the program does not."""
        self._loop = loop
        run, turn = self.lock.run_in_background, loop.turn_in_background
        self._thread = threading.Thread(target=run, args=(turn,), name="link", daemon=True)
        self._thread.start()

    def _is_over(self) -> bool:
        return self._closing or (self._loop is not None and self._loop.has_ended)

    def away(self) -> contextlib.AbstractContextManager[None]:
        """Return a context for long work of the program; the thread runs the loop."""
        return self.lock.away()

    def wake(self) -> None:
        """Make a turn that waits return soon; may be called from any thread."""
        self.lock.wake()

    def restart(self) -> None:
        """Before a Hello: drop queued frames, so that none accumulate while there is no broker.

        If there is no answer at the host name's addresses of one family, try the other.
        """
        self._outgoing = Outbox()
        self._unanswered += 1
        if len(self._families) > 1 and self._unanswered > _TRIES_A_FAMILY:
            self._unanswered = 1
            self._families.rotate()
            self._socket.disconnect(libzmq_address(self.endpoint))
            self._connect()

    def send(self, frame: Frame, buffers: Sequence[Buffer]) -> None:
        """Queue a frame."""
        self._outgoing.add(encode_frame(frame), buffers)

    def flush(self) -> None:
        """Send the queued frames, as far as the connection accepts them now."""
        while self._outgoing:
            try:
                send_parts(self._socket, self._outgoing.next())
            except zmq.Again:
                return
            self._outgoing.sent()

    def wait(self, until: float | None) -> None:
        """Wait until a frame arrives, frames can be sent, or the time has come."""
        poller = self._both_ways if self._outgoing else self._incoming
        ready = poller.poll(milliseconds_until(until, self.clock()))
        if self.lock.wakeup in dict(ready):
            self.lock.clear_wakeup()

    def receive(self) -> Received:
        """Return the frames of the next message; none if no message has arrived.

        Raises:
            VersionError: the broker speaks another major version of the protocol.
        """
        while True:
            try:
                frames, _ = receive(self._socket)
            except zmq.Again:
                return ()
            except VersionError:
                raise
            except WireError as error:
                if self._unreadable != str(error):
                    self._unreadable = str(error)
                    text = f"the answer from {self.endpoint} is not in fedmq's protocol"
                    self._log.warning(text, reason=self._unreadable)
            else:
                self._unanswered, self._listener = 0, ""
                if self._unreadable and any(isinstance(frame, Welcome) for frame, _ in frames):
                    self._unreadable = ""
                return frames

    def close(self) -> None:
        """End the thread, and close the socket."""
        self._closing = True
        self.lock.release()
        if self._thread is not None:
            self._thread.join()
        # A goodbye may still be in flight: give it a moment.
        self._context.destroy(linger=200)
        self.lock.close()

    # ---- reports

    def report(self, report: Blocked | OutOfTouch | BackInTouch) -> None:
        """Log a report; the one of a silent broker with what a probe of its endpoint finds."""
        match report:
            case Blocked(reason):
                self._log.warning("the broker cannot write its ledger", reason=reason)
            case BackInTouch(seconds):
                self._log.info(f"back in touch with the broker after {seconds:.0f} s")
            case OutOfTouch(answer=None):
                if self._probing is None or not self._probing.is_alive():
                    self._probing = threading.Thread(
                        target=self._probe, args=(report,), name="probe", daemon=True
                    )
                    self._probing.start()
            case OutOfTouch():
                self._log.warning(sentence(report, self.endpoint, self._run))

    def _probe(self, report: OutOfTouch) -> None:
        """On the probe's thread: find out what listens at the endpoint, and log it."""
        found = probe(self._address)
        self._listener = found.text
        if not self._is_over():
            text = sentence(report, self.endpoint, self._run)
            self._log.warning(text, reason=found.text, found=found.listener.value)

    def report_failure(self, error: Exception) -> None:
        """Log an error of a turn on the link's thread."""
        self._log.error("link failed", exc_info=error)

    def listener(self) -> str:
        """Describe what listens at the endpoint; probes it unless a probe has just done so."""
        if not self._listener:
            self._listener = probe(self._address).text
        return self._listener
