"""The ROUTER loop: the live port of the broker's driver, with real sockets and clock.

One of the three files that use zmq. A plain poll loop that drains the socket with NOBLOCK
(asyncio takes 2.5 to 11 times as long with small messages). Small frames are copied, chunks
are not. `fedmq.broker.driver` handles each batch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket as sockets
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import structlog
import zmq

from fedmq.broker.core.events import Event, ReceivedFrom, Unreadable
from fedmq.broker.core.state import Continuation
from fedmq.broker.driver import BrokerDriver
from fedmq.broker.errors import BrokerError, EndpointError, WireError
from fedmq.broker.settings import BrokerSettings, LedgerSettings
from fedmq.broker.wire.batching import Outbox
from fedmq.broker.wire.clock import Clock, milliseconds_until
from fedmq.broker.wire.encoding import encode_frame
from fedmq.broker.wire.endpoints import libzmq_address, listening_address, parse_endpoint
from fedmq.broker.wire.schema import CHUNK_BYTES, Buffer, Heartbeat
from fedmq.broker.wire.sockets import (
    COPY_BELOW_BYTES,
    MAX_FRAME_BYTES,
    NOBLOCK,
    receive,
    send_parts,
)

_BATCH = 256
_BATCH_BYTES = CHUNK_BYTES // 2
"""A turn ends after one chunk, so that small messages that came before it are answered first."""
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
        self._outboxes: defaultdict[bytes, Outbox] = defaultdict(Outbox)
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
            self.socket.bind(libzmq_address(address))
        except EndpointError as error:
            raise BrokerError(f"cannot listen on {text}: {error}") from None
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                reason = "this host has no such address"
            else:
                reason = zmq.strerror(error.errno or 0).lower()
            raise BrokerError(f"cannot listen on {text}: {reason}") from None

    @property
    def has_queued(self) -> bool:
        """Return whether frames wait for a connection to take them."""
        return bool(self._outboxes)

    def send(self, peer: bytes, header: bytes, buffers: Sequence[Buffer]) -> None:
        """Queue an encoded frame for a connection; it is lost if the connection is gone."""
        self._outboxes[peer].add(header, buffers)

    def queued(self, peer: bytes) -> int:
        """Return the number of large frames that are queued for a connection."""
        return self._outboxes[peer].large

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
        """Yield what has arrived, up to a batch."""
        room = _BATCH_BYTES
        for _ in range(_BATCH):
            if room <= 0:
                return
            try:
                first = self.socket.recv(NOBLOCK, copy=False)
            except zmq.Again:
                return
            peer = first.bytes
            try:
                if not first.more:
                    raise WireError("expected a header, got an empty message")
                frames, nbytes = receive(self.socket)
            except WireError as error:
                yield Unreadable(peer, error)
                continue
            room -= nbytes
            for frame, buffers in frames:
                yield ReceivedFrom(peer, frame, buffers, nbytes)
                nbytes = 0  # counted with the first frame

    def flush(self, sent: Callable[[bytes, int], None]) -> None:
        """Send queued frames until the connections' queues are full.

        Args:
            sent: called with a connection, and the bytes of each message that was sent.
        """
        for peer in list(self._outboxes):
            self._flush(peer, sent)

    def _flush(self, peer: bytes, sent: Callable[[bytes, int], None]) -> None:
        outbox = self._outboxes[peer]
        while outbox:
            parts = outbox.next()
            try:
                send_parts(self.socket, [peer, *parts])
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                # It is gone. What it missed is delivered again when its node returns.
                break
            sent(peer, outbox.sent())
        del self._outboxes[peer]


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
        self.endpoint = os.fsdecode(cast("bytes", self._port.socket.getsockopt(zmq.LAST_ENDPOINT)))
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
        if self._port.has_queued:
            return _BUSY_POLL_MS
        return milliseconds_until(self._driver.deadline, self._clock())
