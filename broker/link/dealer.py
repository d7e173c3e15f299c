"""The live port of a link: a DEALER socket, the real clock, and a thread beside the program's."""

from __future__ import annotations

import contextlib
import shlex
import threading
from collections.abc import Sequence

import structlog
import zmq

from fedmq.broker.access.curve import NodeKeys
from fedmq.broker.errors import EndpointError, LinkClosed, VersionError, WireError
from fedmq.broker.link.contact import sentence
from fedmq.broker.link.events import BackInTouch, Blocked, OutOfTouch
from fedmq.broker.link.port import Loop, Received
from fedmq.broker.link.probe import HAS_NO_KEYS, REQUIRES_KEYS, Listener, ProbeResult, probe
from fedmq.broker.link.thread_handoff import LoopHandoff
from fedmq.broker.transport.dealer_socket import DealerSocket, HandshakeFailure
from fedmq.broker.wire.batching import Outbox
from fedmq.broker.wire.clock import Clock, milliseconds_until
from fedmq.broker.wire.encoding import encode_frame
from fedmq.broker.wire.endpoints import parse_endpoint, resolve
from fedmq.broker.wire.schema import Buffer, Frame, Hello, Welcome
from fedmq.broker.wire.sockets import receive, send_parts

_TRIES_A_FAMILY = 2
"""Hellos without an answer before the other address family of the host name is tried."""


class DealerPort:
    """A `LinkPort` on a DEALER socket.

    Args:
        endpoint: of the broker.
        hello: the node's Hello; its node and run are named in the log.
        keys: of the node and the broker; None for a broker without keys. Not used over a Unix
            socket.

    Raises:
        LinkClosed: the endpoint is invalid, or its host name has no address.
    """

    def __init__(self, endpoint: str, hello: Hello, keys: NodeKeys | None = None) -> None:
        try:
            self._address = parse_endpoint(endpoint)
            families = resolve(self._address)
        except EndpointError as error:
            raise LinkClosed(f"cannot connect to {endpoint}: {error}") from None
        self.endpoint = self._address.text
        self._keys = None if self._address.path else keys
        self._authorize = "" if keys is None else _authorize(keys.own.public, hello)
        self.clock = Clock()
        self._run = hello.run
        self._log = structlog.get_logger().bind(node=hello.node)
        self._outgoing = Outbox()
        self._unanswered = 0
        """Hellos since the last frame from the broker."""
        self._unreadable = ""
        """The reason last logged for an unreadable frame: repetitions are not logged."""
        self._probing: threading.Thread | None = None
        self._listener: ProbeResult | None = None
        """What listens at the silent endpoint, if it is known."""
        self._reported: ProbeResult | None = None
        """What a failed handshake has proved and was logged, since the last frame."""
        self._loop: Loop | None = None
        self._thread: threading.Thread | None = None
        self._closing = False
        self.lock = LoopHandoff(self._is_over)

        try:
            self._dealer = DealerSocket(self._address, families, keys)
        except zmq.ZMQError as error:
            self.lock.close()
            raise LinkClosed(f"cannot connect to {endpoint}: {str(error).lower()}") from None
        self._register()

    def _register(self) -> None:
        """Use the present socket of the dealer."""
        self._socket = self._dealer.socket
        self._incoming, self._both_ways = zmq.Poller(), zmq.Poller()
        for poller, events in (
            (self._incoming, zmq.POLLIN),
            (self._both_ways, zmq.POLLIN | zmq.POLLOUT),
        ):
            poller.register(self.lock.wakeup, zmq.POLLIN)
            self._dealer.register(poller, events)

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
        if self._dealer.has_families and self._unanswered > _TRIES_A_FAMILY:
            self._unanswered = 1
            self._dealer.try_next_family()
            self._register()

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
        retry_at = self._dealer.retry_at
        if retry_at is not None and (until is None or retry_at < until):
            until = retry_at
        ready = dict(poller.poll(milliseconds_until(until, self.clock())))
        if self.lock.wakeup in ready:
            self.lock.clear_wakeup()
        if retry_at is not None or self._dealer.monitor in ready:
            self._watch()

    def _watch(self) -> None:
        """Report a new reason for which the handshake fails, and connect again if it is time."""
        before = self._dealer.failure
        if self._dealer.turn(self.clock()):
            self._register()
        failure = self._dealer.failure
        if failure is before:
            return
        self._listener = self._finding(failure)
        if self._listener is not None and self._listener != self._reported:
            self._reported = self._listener  # once; later reports are those of a silent broker
            found = self._listener.listener.value
            text = f"cannot connect to the broker at {self.endpoint}"
            self._log.warning(text, reason=self._listener.text, found=found)

    def _finding(self, failure: HandshakeFailure | None) -> ProbeResult | None:
        """Return what a failed handshake proves about the broker; None if nothing."""
        match failure:
            case HandshakeFailure.KEY_REFUSED if self._keys is not None:
                text = (
                    "the broker does not accept this node's key, which is not authorised there or "
                    f"was revoked; its operator can admit it with `{self._authorize}`"
                )
                return ProbeResult(Listener.KEY_REFUSED, text)
            case HandshakeFailure.OTHER_MECHANISM if self._keys is not None:
                return ProbeResult(Listener.WITHOUT_KEYS, HAS_NO_KEYS)
            case HandshakeFailure.OTHER_MECHANISM:
                return ProbeResult(Listener.SECURED, REQUIRES_KEYS)
        return None

    def receive(self) -> Received:
        """Return the frames of the next message; none if no message has arrived.

        Raises:
            VersionError: the broker speaks another major version of the protocol.
        """
        while True:
            try:
                frames = receive(self._socket)
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
                self._unanswered, self._listener, self._reported = 0, None, None
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
        self._dealer.close(linger_ms=200)
        self.lock.close()

    # ---- reports

    def report(self, report: Blocked | OutOfTouch | BackInTouch) -> None:
        """Log a report; the one of a silent broker with what listens at its endpoint."""
        match report:
            case Blocked(reason):
                self._log.warning("the broker cannot write its ledger", reason=reason)
            case BackInTouch(seconds):
                self._log.info(f"back in touch with the broker after {seconds:.0f} s")
            case OutOfTouch(answer=None) if self._finding(self._dealer.failure) is not None:
                self._log_silence(report)
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
        self._listener = self._probe_now()
        if not self._is_over():
            self._log_silence(report)

    def _log_silence(self, report: OutOfTouch) -> None:
        text, found = sentence(report, self.endpoint, self._run), self._listener
        if found is not None:
            self._log.warning(text, reason=found.text, found=found.listener.value)

    def _probe_now(self) -> ProbeResult:
        """Find out what listens at the endpoint; may be called from any thread."""
        found = probe(self._address, curve=self._keys is not None)
        cut = self._dealer.failure is HandshakeFailure.CUT
        if self._keys is not None and cut and found.listener is Listener.SILENT:
            text = (
                "the broker there closes the connection during the handshake: its key is not "
                f"{self._keys.broker}, which this node expects (compare it with `fedmq keys list` "
                "on the broker's host, and give the right one with --broker-key), or it has too "
                "many connections"
            )
            return ProbeResult(Listener.OTHER_KEY, text)
        return found

    def report_failure(self, error: Exception) -> None:
        """Log an error of a turn on the link's thread."""
        self._log.error("link failed", exc_info=error)

    def listener(self) -> str:
        """Describe what listens at the endpoint; probes it unless a probe has just done so."""
        if self._listener is None:
            self._listener = self._probe_now()
        return self._listener.text


def _authorize(key: str, hello: Hello) -> str:
    """Return the command that authorises a node's key."""
    parts = ["fedmq", "keys", "authorize", key, "--name", hello.node, "--role", hello.role]
    ranges = [str(low) if low == high else f"{low}-{high}" for low, high in hello.clients]
    return shlex.join(parts + (["--clients", ",".join(ranges)] if ranges else []))
