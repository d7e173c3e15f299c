"""The ROUTER loop: drives a Broker core with real sockets, clock and ledger.

One of the three files that use zmq. A plain poll loop that drains the socket with NOBLOCK
(asyncio takes 2.5 to 11 times as long with small messages). Small frames are copied, chunks
are not. Each turn handles what has arrived, writes the ledger once, and only then sends: nothing
is acknowledged before it is in the ledger.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import socket as sockets
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import structlog
import zmq

from fedmq.broker.core.blob_locations import point_to_blobs, shareable_name
from fedmq.broker.core.recovery import open_broker
from fedmq.broker.core.state import (
    Append,
    Continuation,
    Discard,
    DiskFull,
    Event,
    Gone,
    Log,
    Probe,
    Put,
    ReceivedFrom,
    SendTo,
    TimerFired,
    Unpin,
    Unreadable,
)
from fedmq.broker.errors import (
    BrokerError,
    BrokerFailed,
    EndpointError,
    LedgerError,
    NoSpace,
    WireError,
)
from fedmq.broker.settings import BrokerSettings, LedgerSettings
from fedmq.broker.wire.batching import Outbox
from fedmq.broker.wire.clock import Clock, milliseconds_until
from fedmq.broker.wire.encoding import encode_frame
from fedmq.broker.wire.endpoints import listening_address, parse_endpoint
from fedmq.broker.wire.schema import (
    CHUNK_BYTES,
    Chunk,
    Deliver,
    Heartbeat,
)
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
_FULL_RETRY_S = 0.25
_CHUNKS_WAITING = 64
_LOGGED_DAMAGE = 5
"""Most damaged ranges that are logged one by one."""


def _bind(socket: zmq.Socket[bytes], text: str) -> None:
    """Make a socket listen.

    Raises:
        BrokerError: the socket cannot listen; the message says why.
    """
    try:
        endpoint = parse_endpoint(text, listen=True)
        address, ipv6 = listening_address(endpoint)
        socket.setsockopt(zmq.IPV6, ipv6)
        socket.bind(address)
    except EndpointError as error:
        raise BrokerError(f"cannot listen on {text}: {error}") from None
    except zmq.ZMQError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            reason = "this host has no such address"
        else:
            reason = zmq.strerror(error.errno or 0).lower()
        raise BrokerError(f"cannot listen on {text}: {reason}") from None


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
        settings, ledger_settings = (
            settings or BrokerSettings(),
            ledger_settings or LedgerSettings(),
        )
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.copy_threshold = COPY_BELOW_BYTES
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        # The I/O threads exchange these heartbeats even while Python is busy in a node.
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, round(settings.beat_s * 1000))
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(settings.lease_s * 1000))
        self._clock = Clock()
        try:
            _bind(self._socket, endpoint)
            self._ledger, self._core = open_broker(
                folder,
                settings,
                self._clock,
                durability=ledger_settings.durability,
                retain_bytes=ledger_settings.retain_bytes,
                redeliver_dead_letters=ledger_settings.redeliver_dead_letters,
                continuation=continuation,
            )
        except BrokerError:
            self._context.destroy(linger=0)
            raise
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._wake_reader, self._wake_writer = sockets.socketpair()
        self._stopping = False
        self._outboxes: defaultdict[bytes, Outbox] = defaultdict(Outbox)
        self._log = structlog.get_logger().bind(node="broker")
        self._shared = self._shareable_folder() if ledger_settings.share_files else ""
        """The ledger's folder as nodes are to open it; "" if files are not shared."""
        self._unwritten: list[SendTo] | None = None
        """While the disk is full: frames to send once the ledger has been written."""
        self.on_space: Callable[[str], None] = lambda _reason: None
        """Called with the reason when the disk is full, and with "" once it is writable again."""
        self._retry_at = 0.0
        if self._ledger.cut_bytes:
            self._log.warning("truncated an incomplete record", bytes=self._ledger.cut_bytes)
        for damage in self._ledger.damage[:_LOGGED_DAMAGE]:
            self._log.warning(
                "skipped damaged payload: no unfinished message needs it", at=str(damage)
            )
        if self._ledger.damage:
            self._log.warning("run `fedmq ledger check`", damaged=len(self._ledger.damage))
        if self._ledger.next_seq:
            self._log.info("resuming from the ledger", entries=self._ledger.next_seq)

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
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        try:
            while not (self._stopping or (until_idle and self._is_idle())):
                poller.poll(self._timeout_ms())
                self._turn()
        except LedgerError as error:
            raise BrokerFailed(f"stopped serving, the ledger failed: {error}") from None
        finally:
            self.close()

    def close(self) -> None:
        """Close the ledger and the socket."""
        try:
            self._ledger.close()
        except LedgerError as error:
            self._log.error("cannot write the last entries", reason=str(error))
        finally:
            self._context.destroy(linger=200)
            self._wake_reader.close()
            self._wake_writer.close()

    def _shareable_folder(self) -> str:
        try:
            return shareable_name(self._ledger.folder)
        except ValueError as error:
            self._log.warning(
                "cannot share the ledger's files: nodes get blobs over the socket",
                reason=str(error),
            )
            return ""

    def _is_idle(self) -> bool:
        return self._core.idle and not self._outboxes

    def _timeout_ms(self) -> int | None:
        if self._outboxes:
            return 20
        until = self._core.deadline if self._unwritten is None else self._retry_at
        return milliseconds_until(until, self._clock())

    def _turn(self) -> None:
        """Handle a batch of frames, write the ledger once, then send."""
        now = self._clock()
        sends: list[SendTo] = []
        for event in itertools.chain(self._drain(), [TimerFired()]):
            self._handle(event, now, sends)
        if self._unwritten is None:
            self._commit(sends, now)
        elif now >= self._retry_at:
            sends, self._unwritten = self._unwritten + sends, None
            self._commit(sends, now)
            if self._unwritten is None:
                self.on_space("")
        for send in sends:
            self._enqueue(send)
        for peer in list(self._outboxes):
            self._flush(peer)

    def _handle(self, event: Event, now: float, sends: list[SendTo]) -> None:
        """Pass an event to the core, and carry out its actions; writes and sends are queued."""
        gone = []
        for action in self._core.handle(event, now):
            match action:  # the most frequent first
                case SendTo():
                    sends.append(action)
                case Append(entry=entry, uses=uses, kept=kept):
                    self._ledger.use(entry.seq, uses, kept=kept)
                    self._ledger.append(entry)
                case Put(name=name, size=size, start=start, data=data):
                    self._ledger.put(name, size, start, data)
                case Discard(name, size):
                    self._ledger.discard(name, size)
                case Unpin(names):
                    self._ledger.unpin(names)
                case Probe(peer):
                    if not self._is_up(peer):
                        gone.append(Gone(peer))
                case Log(level, event_name, fields):
                    getattr(self._log, level)(event_name, **fields)
        for each in gone:
            self._handle(each, now, sends)

    def _enqueue(self, send: SendTo) -> None:
        """Put a frame into the outbox of its connection, with its blobs from the ledger."""
        frame = send.frame
        if self._shared:
            try:
                frame = point_to_blobs(send, self._ledger, self._shared)
            except (OSError, RuntimeError, ValueError, LedgerError) as error:
                self._shared = ""
                self._log.warning(
                    "cannot share the ledger's files: nodes get blobs over the socket",
                    reason=repr(error),
                )
        if isinstance(frame, Chunk) and self._outboxes[send.peer].large >= _CHUNKS_WAITING:
            return  # more than a node of ours requests at a time; it requests lost ones again
        try:
            buffers = [self._ledger.payload.read(*blob) for blob in send.blobs]
        except LedgerError as error:
            if self._unwritten is not None:
                return  # not written yet: the node requests it again
            self._log.warning("cannot read a blob", reason=str(error))
            # Without it, the node requests the blob, and gets a chunk without bytes.
            buffers = []
            if isinstance(frame, Deliver):
                frame = msgspec.structs.replace(frame, inline=())
        self._outboxes[send.peer].add(encode_frame(frame), buffers)

    def _commit(self, sends: list[SendTo], now: float) -> None:
        """Write the ledger; if the disk is full, hold back what must not be sent yet."""
        try:
            self._ledger.commit()
        except NoSpace as error:
            self._unwritten = sends[:]
            sends.clear()
            self._retry_at = now + _FULL_RETRY_S
            self.on_space(str(error))
            self._handle(DiskFull(str(error)), now, sends)
        else:
            self._handle(DiskFull(""), now, sends)

    def _drain(self) -> Iterator[Event]:
        room = _BATCH_BYTES
        for _ in range(_BATCH):
            if room <= 0:
                return
            try:
                first = self._socket.recv(NOBLOCK, copy=False)
            except zmq.Again:
                return
            peer = first.bytes
            try:
                if not first.more:
                    raise WireError("expected a header, got an empty message")
                frames, nbytes = receive(self._socket)
            except WireError as error:
                yield Unreadable(peer, error)
                continue
            room -= nbytes
            for frame, buffers in frames:
                yield ReceivedFrom(peer, frame, buffers, nbytes)
                nbytes = 0  # counted with the first frame

    def _flush(self, peer: bytes) -> None:
        """Send the frames of a connection until its queue is full."""
        outbox = self._outboxes[peer]
        while outbox:
            parts = outbox.next()
            try:
                send_parts(self._socket, [peer, *parts])
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                # It is gone. What it missed is delivered again when its node returns.
                break
            self._core.sent(peer, outbox.sent())
        del self._outboxes[peer]

    def _is_up(self, peer: bytes) -> bool:
        """Return whether a connection is up, by sending a heartbeat over it."""
        try:
            send_parts(self._socket, [peer, encode_frame(Heartbeat())])
        except zmq.Again:
            return True
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True
