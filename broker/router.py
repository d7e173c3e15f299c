"""The ROUTER loop: the live port of the broker's driver, with real sockets and clock.

A plain poll loop that drains the socket with NOBLOCK (asyncio takes 2.5 to 11 times as long with
small messages). Small frames are copied, chunks are not. `fedmq.broker.driver` handles each batch;
`fedmq.broker.transport` knows where each connection comes from, and decides who is let in.
"""

from __future__ import annotations

import contextlib
import math
import socket as sockets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog
import zmq

from fedmq.broker.access.broker_keys import BrokerKeys
from fedmq.broker.access.curve import KeyPair
from fedmq.broker.access.rights import Access
from fedmq.broker.core.events import Event, ReceivedFrom, Unreadable
from fedmq.broker.driver import BrokerDriver
from fedmq.broker.errors import BrokerError, WireError
from fedmq.broker.open_files import reserve_files
from fedmq.broker.settings import BrokerSettings, Continuation, LedgerSettings
from fedmq.broker.transport.admitting import AdmittingStore
from fedmq.broker.transport.connections import Connections
from fedmq.broker.transport.listening import bind_all, router_socket
from fedmq.broker.transport.zap import Door
from fedmq.broker.wire.clock import Clock, milliseconds_until
from fedmq.broker.wire.encoding import encode_frame
from fedmq.broker.wire.inbox import Inbox
from fedmq.broker.wire.schema import Buffer, Enroll, Heartbeat, Hello
from fedmq.broker.wire.send_queues import SWEEP_S, SendQueue, SendQueues
from fedmq.broker.wire.sockets import NOBLOCK, receive_parts, send_parts

_BATCH = 256
_BUSY_POLL_S = 0.02
"""Time between two attempts to send to connections whose queues are full, in seconds."""
_WARN_EACH_S = 600.0
"""Time between two warnings of a broker that lets anybody connect."""


class RouterPort:
    """The broker's socket: the `BrokerPort` of the live broker.

    Args:
        endpoints: to listen on.
        settings: heartbeats and leases, which the I/O threads keep, too, and limits.
        own: the broker's key pair; None for a broker without keys.
        insecure: whether to listen beyond this host without keys.

    Attributes:
        context, socket: of ZeroMQ.
        endpoints: where nodes can connect, with the real ports.
        exposed: whether anybody on another host may connect.
        on_space: called with the reason when the disk is full, and with "" once it is writable.

    Raises:
        BrokerError: an endpoint cannot be bound; the message says why.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        settings: BrokerSettings,
        own: KeyPair | None = None,
        *,
        insecure: bool = False,
    ) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        # Before the first endpoint: without a door, libzmq lets everybody in.
        self._door = None if own is None else Door(self.context)
        self._keyed = own is not None
        self.socket = router_socket(self.context, settings, keyed=self._keyed)
        reserve_files(settings.limits.reserved_files)
        self._drained = True
        """Whether all messages that had arrived were read in this turn."""
        self.on_space: Callable[[str], None] = lambda _reason: None
        limits = settings.limits
        self._queues = SendQueues(limits.queued_bytes, limits.queued_bytes_total)
        self._connections = Connections(
            self.context, self.socket, limits, self._queues.discard, keyed=self._keyed
        )
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
            self.endpoints, self.exposed = bind_all(self.socket, endpoints, own, insecure=insecure)
        except BrokerError:
            self.close()
            raise

    def register(self, poller: zmq.Poller) -> None:
        """Register what `watch` and `drain` read with a poller."""
        poller.register(self.socket, zmq.POLLIN)
        poller.register(self._connections.monitor.socket, zmq.POLLIN)
        if self._door is not None:
            poller.register(self._door.socket, zmq.POLLIN)

    def admit(self, access: Access) -> None:
        """Let in the keys that have access from now on, and close connections with other keys."""
        if self._door is not None:
            self._door.admit(access)
            self._connections.close_refused(self._door.is_admitted, time.monotonic())

    def is_asked(self, ready: Mapping[object, int]) -> bool:
        """Return whether a peer with a key wants to be let in; ``ready``: see `watch`."""
        return self._door is not None and self._door.socket in ready

    def watch(self, ready: Mapping[object, int]) -> None:
        """Note which connections have come and gone, and decide who is let in.

        Args:
            ready: what the poller has found readable.
        """
        if self._connections.monitor.socket in ready:
            self._connections.read_events()
        if self._door is not None and self.is_asked(ready):
            self._door.answer()
            if (refused := self._door.refused(time.monotonic())) is not None:
                fields = refused._asdict()
                if not refused.other_keys:
                    del fields["other_keys"]
                self.log("warning", "refused a key without rights here", fields)

    def tidy(self) -> None:
        """Close the connections that must go; call it at the end of a turn."""
        while self._inbox.flooders:
            self._connections.close(self._inbox.flooders.pop(), time.monotonic())
        self._connections.tidy(time.monotonic(), drained=self._drained)

    @property
    def next_close_s(self) -> float | None:
        """Return in how many seconds `tidy` has a connection to close; None if it has none."""
        at = self._connections.next_close
        return None if at is None else max(0.0, at - time.monotonic())

    def close(self, linger_ms: int = 0) -> None:
        """Close the sockets; what is queued may be sent for a moment."""
        self._connections.monitor.close()
        self.context.destroy(linger=linger_ms)

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
        # Otherwise the next peer with this routing id would get it.
        if not self._keyed or self._connections.is_known(peer):
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
        """Close a connection a little later, so that the peer learns why."""
        self._connections.close(peer, time.monotonic())

    def log(self, level: str, event: str, fields: dict[str, Any]) -> None:
        """Log an event for people; ``level`` as in `logging`."""
        getattr(self._logger, level)(event, **fields)

    def drain(self) -> Iterator[Event]:
        """Yield what has arrived, up to a batch, and as much of each connection as it may send."""
        self._drained = False
        for _ in range(_BATCH):
            if not self._inbox.wants_more:
                break
            try:
                first = self.socket.recv(NOBLOCK, copy=False)
            except zmq.Again:
                self._drained = True
                break
            peer = first.bytes
            parts, nbytes = receive_parts(self.socket) if first.more else ([], 0)
            self._inbox.put(peer, parts, nbytes, self._connections.of(peer, first))
        for peer, frame, buffers, nbytes, connection in self._inbox.take(time.monotonic()):
            if isinstance(frame, WireError):
                yield Unreadable(peer, frame, connection.origin)
                continue
            if not connection.has_joined and isinstance(frame, Hello | Enroll):
                self._connections.joins(connection)
            yield ReceivedFrom(peer, frame, buffers, nbytes, connection.origin)

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
            tracked = self._queues.needs_mark(queue)
            try:
                tracker = send_parts(self.socket, [peer, *parts], tracked=tracked)
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
        endpoint: one, or several, to listen on; for example ``tcp://127.0.0.1:7700``; port 0 takes
            any free one.
        folder: of the ledger; the broker continues from an existing one.
        settings: leases, heartbeats, the delivery limit.
        ledger_settings: durability and retention of the ledger.
        continuation: a recorded run that continues with new sessions of all nodes.
        keys: the broker's key, and who has access. Then tcp endpoints require keys; Unix sockets
            do not, because their files belong to this user.
        insecure: whether to listen beyond this host without keys, so that anybody may connect.

    Attributes:
        endpoints: where nodes can connect, with the real ports.
        endpoint: the first of them.

    Raises:
        BrokerError: an endpoint cannot be bound (in use, not an address, or open to other hosts
            without keys), the ledger cannot be read or written, or who has access cannot be read.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str],
        folder: Path,
        settings: BrokerSettings | None = None,
        ledger_settings: LedgerSettings | None = None,
        continuation: Continuation | None = None,
        *,
        keys: BrokerKeys | None = None,
        insecure: bool = False,
    ) -> None:
        settings = settings or BrokerSettings()
        ledger_settings = ledger_settings or LedgerSettings()
        self._clock = Clock()
        endpoints = [endpoint] if isinstance(endpoint, str) else endpoint
        own = None if keys is None else keys.own
        self._port = RouterPort(endpoints, settings, own, insecure=insecure)
        try:
            self._driver = BrokerDriver.open(
                folder,
                settings,
                ledger_settings,
                self._port,
                self._clock,
                continuation=continuation,
                access=None if keys is None else AdmittingStore(keys.access, self._port.admit),
            )
        except BrokerError:
            self._port.close()
            raise
        self.endpoints = self._port.endpoints
        self.endpoint = self.endpoints[0]
        self._warn_at = 0.0 if self._port.exposed else math.inf
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
        self._port.register(poller)
        poller.register(self._wake_reader, zmq.POLLIN)
        try:
            while not (self._stopping or (until_idle and self._is_idle())):
                ready = dict(poller.poll(self._timeout_ms()))
                if self._port.is_asked(ready):  # by a key that may have been authorised just now
                    self._driver.check_access()
                self._port.watch(ready)
                self._turn()
        finally:
            self.close()

    def close(self) -> None:
        """Close the ledger and the socket."""
        try:
            self._driver.close()
        finally:
            self._port.close(linger_ms=200)
            self._wake_reader.close()
            self._wake_writer.close()

    def _turn(self) -> None:
        self._driver.turn(self._port.drain())
        self._port.flush(self._driver.core.sent)
        self._port.tidy()
        if self._clock() >= self._warn_at:
            self._warn_at = self._clock() + _WARN_EACH_S
            event = "anybody who reaches this broker may take part: it runs with --insecure"
            self._port.log("warning", event, {"endpoints": self.endpoints})

    def _is_idle(self) -> bool:
        return self._driver.core.idle and not self._port.has_queued

    def _timeout_ms(self) -> int | None:
        now, due = self._clock(), self._driver.deadline
        deadline = min(math.inf if due is None else due, self._warn_at)
        for wait_s in (self._port.wait_s, self._port.next_close_s):
            if wait_s is not None:
                deadline = min(deadline, now + wait_s)
        if self._port.has_queued or self._driver.has_chunks:
            deadline = min(deadline, now + _BUSY_POLL_S)
        return milliseconds_until(None if deadline == math.inf else deadline, now)
