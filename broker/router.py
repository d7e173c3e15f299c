"""The ROUTER loop: the live port of the broker's driver, with real sockets and clock.

One of the three files that use zmq. A plain poll loop that drains the socket with NOBLOCK
(asyncio takes 2.5 to 11 times as long with small messages). Small frames are copied, chunks
are not. `fedmq.broker.driver` handles each batch.
"""

from __future__ import annotations

import contextlib
import errno
import socket as sockets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import structlog
import zmq

from fedmq.broker.access.rights import KEYLESS
from fedmq.broker.core.events import Event, ReceivedFrom, Unreadable
from fedmq.broker.core.state import Continuation
from fedmq.broker.driver import BrokerDriver
from fedmq.broker.errors import BrokerError, EndpointError, WireError
from fedmq.broker.settings import BrokerSettings, LedgerSettings
from fedmq.broker.wire.clock import Clock, milliseconds_until
from fedmq.broker.wire.encoding import encode_frame
from fedmq.broker.wire.endpoints import listening_address, parse_endpoint
from fedmq.broker.wire.inbox import Inbox
from fedmq.broker.wire.schema import Buffer, Heartbeat
from fedmq.broker.wire.send_queues import SWEEP_S, SendQueue, SendQueues
from fedmq.broker.wire.sockets import (
    COPY_BELOW_BYTES,
    MAX_FRAME_BYTES,
    NOBLOCK,
    receive_parts,
    send_parts,
)

_BATCH = 256
_BUSY_POLL_MS = 20
"""Time between two attempts to send to connections whose queues are full."""


class RouterPort:
    """The broker's socket: the `BrokerPort` of the live broker.

    Args:
        endpoint: to listen on.
        settings: heartbeats and leases, which the I/O threads keep, too.

    Attributes:
        context, socket: of ZeroMQ.
        on_space: called with the reason when the disk is full, and with "" once it is writable.

    Raises:
        BrokerError: the endpoint cannot be bound; the message says why.
    """

    def __init__(self, endpoint: str, settings: BrokerSettings) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.copy_threshold = COPY_BELOW_BYTES
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        # The I/O threads exchange these heartbeats even while Python is busy in a node.
        self.socket.setsockopt(zmq.HEARTBEAT_IVL, round(settings.beat_s * 1000))
        self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(settings.lease_s * 1000))
        self.on_space: Callable[[str], None] = lambda _reason: None
        limits = settings.limits
        self._queues = SendQueues(limits.queued_bytes, limits.queued_bytes_total)
        self._inbox = Inbox(
            limits.messages_per_s,
            limits.bytes_per_s,
            limits.costly_per_s,
            limits.held_bytes,
            limits.held_bytes_total,
        )
        self._next_sweep = 0.0
        self._logger = structlog.get_logger().bind(node="broker")
        try:
            self._bind(endpoint)
        except BrokerError:
            self.context.destroy(linger=0)
            raise

    def _bind(self, text: str) -> None:
        try:
            endpoint = parse_endpoint(text, listen=True)
            address, ipv6 = listening_address(endpoint)
            self.socket.setsockopt(zmq.IPV6, ipv6)
            self.socket.bind(address)
        except EndpointError as error:
            raise BrokerError(f"cannot listen on {text}: {error}") from None
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                reason = "this host has no such address"
            else:
                reason = zmq.strerror(error.errno or 0).lower()
            raise BrokerError(f"cannot listen on {text}: {reason}") from None

    @property
    def wait_s(self) -> float | None:
        """Return the time until a message may be handled that has arrived; None without one."""
        due = self._inbox.due
        return None if due is None else max(0.0, due - time.monotonic())

    def charge(self, peer: bytes) -> None:
        """Count the last message of a connection as a costly one."""
        self._inbox.charge(peer)

    @property
    def has_queued(self) -> bool:
        """Return whether frames wait for a connection to take them."""
        return bool(self._queues)

    def send(self, peer: bytes, header: bytes, buffers: Sequence[Buffer]) -> None:
        """Queue an encoded frame for a connection.

        It is lost if the connection is gone, or does not read what was sent before.
        """
        self._queues.add(peer, header, buffers)

    def has_room(self, peer: bytes) -> bool:
        """Return whether a connection has read enough to be sent a chunk."""
        return self._queues.has_room(peer)

    def is_up(self, peer: bytes) -> bool:
        """Return whether a connection is up, by sending a heartbeat over it."""
        try:
            send_parts(self.socket, [peer, encode_frame(Heartbeat())])
        except zmq.Again:
            return True
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def disconnect(self, peer: bytes) -> None:
        """Close a connection, as far as the transport can."""

    def log(self, level: str, event: str, fields: dict[str, Any]) -> None:
        """Log an event for people; ``level`` as in `logging`."""
        getattr(self._logger, level)(event, **fields)

    def drain(self) -> Iterator[Event]:
        """Yield what has arrived, up to a batch, and as much of each connection as it may send."""
        for _ in range(_BATCH):
            if not self._inbox.wants_more:
                break
            try:
                first = self.socket.recv(NOBLOCK, copy=False)
            except zmq.Again:
                break
            parts, nbytes = receive_parts(self.socket) if first.more else ([], 0)
            self._inbox.put(first.bytes, parts, nbytes, KEYLESS)
        for peer, frame, buffers, nbytes, origin in self._inbox.take(time.monotonic()):
            if isinstance(frame, WireError):
                yield Unreadable(peer, frame, origin)
            else:
                yield ReceivedFrom(peer, frame, buffers, nbytes, origin)

    def flush(self, sent: Callable[[bytes, int], None]) -> None:
        """Send queued frames until the connections' queues are full.

        Args:
            sent: called with a connection, and the bytes of each message that was sent.
        """
        for peer, queue in self._queues.begin():
            self._flush(peer, queue, sent)
        if (now := time.monotonic()) >= self._next_sweep:
            self._next_sweep = now + SWEEP_S
            self._sweep(now)

    def _flush(self, peer: bytes, queue: SendQueue, sent: Callable[[bytes, int], None]) -> None:
        while queue:
            parts = queue.next()
            try:
                tracker = send_parts(self.socket, [peer, *parts], tracked=queue.needs_mark(parts))
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                # It is gone. What it missed is delivered again when its node returns.
                self._queues.discard(peer)
                return
            sent(peer, queue.handed_over(tracker))
        self._queues.count(queue)
        self._queues.emptied(peer)

    def _sweep(self, now: float) -> None:
        """Drop the records of idle connections, and report what was dropped."""
        self._inbox.sweep(now)
        for peer in self._queues.sweep():
            self._queues.add(peer, encode_frame(Heartbeat()), ())
        if self._queues.dropped:
            event = "dropped frames for connections that do not read"
            self.log("warning", event, {"frames": self._queues.dropped})
            self._queues.dropped = 0
        if self._inbox.dropped:
            event = "dropped messages of connections that send too much"
            self.log("warning", event, {"messages": self._inbox.dropped})
            self._inbox.dropped = 0


class BrokerServer:
    """A broker on a real socket, with its ledger in a folder.

    Args:
        endpoint: for example ``tcp://127.0.0.1:7700``; port 0 takes any free one.
        folder: of the ledger; the broker continues from an existing one.
        settings: leases, heartbeats, the delivery limit.
        ledger_settings: durability and retention of the ledger.
        continuation: a recorded run that continues with new sessions of all nodes.

    Attributes:
        endpoint: where nodes can connect, with the real port.

    Raises:
        BrokerError: the endpoint cannot be bound (in use, or not an address), or the
            ledger cannot be read or written.
    """

    def __init__(
        self,
        endpoint: str,
        folder: Path,
        settings: BrokerSettings | None = None,
        ledger_settings: LedgerSettings | None = None,
        continuation: Continuation | None = None,
    ) -> None:
        settings = settings or BrokerSettings()
        ledger_settings = ledger_settings or LedgerSettings()
        self._clock = Clock()
        self._port = RouterPort(endpoint, settings)
        try:
            self._driver = BrokerDriver.open(
                folder,
                settings,
                ledger_settings,
                self._port,
                self._clock,
                continuation=continuation,
            )
        except BrokerError:
            self._port.context.destroy(linger=0)
            raise
        self.endpoint = self._port.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._wake_reader, self._wake_writer = sockets.socketpair()
        self._stopping = False

    @property
    def on_space(self) -> Callable[[str], None]:
        """Called with the reason when the disk is full, and with "" once it is writable again."""
        return self._port.on_space

    @on_space.setter
    def on_space(self, call: Callable[[str], None]) -> None:
        self._port.on_space = call

    def stop(self) -> None:
        """Make `serve` return soon; callable from a signal handler or another thread."""
        self._stopping = True
        with contextlib.suppress(OSError):  # closed already
            self._wake_writer.send(b"x")

    def serve(self, *, until_idle: bool = False) -> None:
        """Serve until `stop`; with ``until_idle``, also until every run has ended.

        While the disk is full, nodes keep their posts and the broker waits for space.

        Raises:
            BrokerFailed: the ledger cannot be read or written, other than for a full disk.
        """
        poller = zmq.Poller()
        poller.register(self._port.socket, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        try:
            while not (self._stopping or (until_idle and self._is_idle())):
                poller.poll(self._timeout_ms())
                self._turn()
        finally:
            self.close()

    def close(self) -> None:
        """Close the ledger and the socket."""
        try:
            self._driver.close()
        finally:
            self._port.context.destroy(linger=200)
            self._wake_reader.close()
            self._wake_writer.close()

    def _turn(self) -> None:
        self._driver.turn(self._port.drain())
        self._port.flush(self._driver.core.sent)

    def _is_idle(self) -> bool:
        return self._driver.core.idle and not self._port.has_queued

    def _timeout_ms(self) -> int | None:
        busy_ms = _BUSY_POLL_MS if self._port.has_queued or self._driver.has_chunks else None
        wait_s = self._port.wait_s
        waits = (
            busy_ms,
            milliseconds_until(wait_s, 0.0),
            milliseconds_until(self._driver.deadline, self._clock()),
        )
        return min((each for each in waits if each is not None), default=None)
