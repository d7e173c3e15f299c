"""The ROUTER loop: drives a Broker core with real sockets, clock and ledger.

One of the two files that move bytes over zmq. A plain poll loop that drains with NOBLOCK
(asyncio costs 2.5 to 11 times as much on small messages). Small frames are copied, chunks
are not. Each turn takes what has arrived, writes it to the ledger in one go, and only then
sends: a receipt never runs ahead of the ledger.
"""

from __future__ import annotations

import itertools
import math
import socket as sockets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import structlog
import zmq

from fedmq.broker.core import Broker
from fedmq.broker.errors import BrokerError, WireError
from fedmq.broker.ledger import Ledger
from fedmq.broker.state import (
    Append,
    BrokerSettings,
    Drop,
    Event,
    Log,
    Put,
    Received,
    Send,
    Unreadable,
    Wake,
)
from fedmq.broker.wire import (
    CHUNK_BYTES,
    MAX_BUFFERS,
    AnyFrame,
    Buffer,
    Chunk,
    decode_frame,
    encode_frame,
)

MAX_FRAME_BYTES = CHUNK_BYTES + 4096
COPY_BELOW_BYTES = 512 * 1024
"""Smaller parts are copied into zmq. Each part that is not wakes pyzmq's garbage-collector
thread, which was measured to cost more."""
_BATCH = 256


class Clock:
    """Seconds since 1970 that never run backwards while the process lives."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> float:
        """Return the time."""
        return time.monotonic() + self._offset


def milliseconds_until(deadline: float | None, now: float) -> int | None:
    """Return a timeout for a poller, rounded up so that waking early never makes it spin."""
    return None if deadline is None else max(0, math.ceil((deadline - now) * 1000))


def _check_port(endpoint: str) -> None:
    """Raise BrokerError for a port that is none: libzmq would take it modulo 65536."""
    port = endpoint.rpartition(":")[2]
    if endpoint.startswith("tcp://") and port.isdigit() and int(port) > 65535:
        raise BrokerError(f"cannot listen on {endpoint}: a port is a number up to 65535")


class BrokerServer:
    """A broker on a real socket, with its ledger in a folder.

    Args:
        endpoint: for example ``tcp://127.0.0.1:7700``; port 0 takes any free one.
        folder: where the ledger lies; it must be new or empty.
        settings: leases and beats.

    Attributes:
        endpoint: where nodes can connect, with the real port.

    Raises:
        BrokerError: the endpoint cannot be bound (in use, or not an address), or the
            ledger cannot be written.
    """

    def __init__(self, endpoint: str, folder: Path, settings: BrokerSettings | None = None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.copy_threshold = COPY_BELOW_BYTES
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        try:
            _check_port(endpoint)
            self._socket.bind(endpoint)
            self._ledger = Ledger(folder)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            reason = zmq.strerror(error.errno or 0).lower()
            raise BrokerError(f"cannot listen on {endpoint}: {reason}") from None
        except BrokerError:
            self._context.destroy(linger=0)
            raise
        if self._ledger.next_seq:
            self._ledger.close()
            self._context.destroy(linger=0)
            raise BrokerError(f"expected an empty folder for a new ledger, {folder} holds one")
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._clock = Clock()
        self._core = Broker(settings or BrokerSettings(), self._ledger.payload.size_of)
        self._wake_reader, self._wake_writer = sockets.socketpair()
        self._stopping = False
        self._late: dict[bytes, deque[list[Buffer]]] = {}
        self._log = structlog.get_logger().bind(node="broker")

    def stop(self) -> None:
        """Make `serve` return soon; callable from a signal handler or another thread."""
        self._stopping = True
        self._wake_writer.send(b"x")

    def serve(self, *, until_idle: bool = False) -> None:
        """Serve until `stop`, or until every run is over.

        Raises:
            LedgerError: the ledger cannot be written.
        """
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        try:
            while not self._stopping and not (until_idle and self._core.idle and not self._late):
                poller.poll(self._timeout_ms())
                self._turn()
        finally:
            self.close()

    def close(self) -> None:
        """Close the ledger and the socket."""
        try:
            self._ledger.close()
        finally:
            self._context.destroy(linger=200)
            self._wake_reader.close()
            self._wake_writer.close()

    def _timeout_ms(self) -> int | None:
        if self._late:
            return 20
        return milliseconds_until(self._core.deadline, self._clock())

    def _turn(self) -> None:
        """Take a batch of frames, write the ledger once, then send."""
        now = self._clock()
        sends: list[Send] = []
        for event in itertools.chain(self._drain(), [Wake()]):
            for action in self._core.handle(event, now):
                match action:
                    case Append(entry):
                        self._ledger.append(entry)
                    case Put(name, size, start, data):
                        self._ledger.put(name, size, start, data)
                    case Drop(name, size):
                        self._ledger.drop(name, size)
                    case Send():
                        sends.append(action)
                    case Log(level, event_name, fields):
                        getattr(self._log, level)(event_name, **fields)
        self._ledger.commit()
        for peer in list(self._late):
            self._flush_late(peer)
        for send in sends:
            self._send(send)

    def _drain(self) -> Iterator[Event]:
        for _ in range(_BATCH):
            try:
                peer = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                frame, buffers, nbytes = receive(self._socket)
            except WireError as error:
                yield Unreadable(peer, error)
            else:
                yield Received(peer, frame, buffers, nbytes)

    def _send(self, send: Send) -> None:
        parts: list[Buffer] = [send.peer, encode_frame(send.frame)]
        for name, start, size in send.blobs:
            parts.append(self._ledger.payload.read(name, start, size))
        if send.peer in self._late:
            self._late[send.peer].append(parts)
        elif not self._send_parts(parts):
            self._late[send.peer] = deque([parts])

    def _send_parts(self, parts: Sequence[Buffer]) -> bool:
        """Send one message; False if the connection's queue is full, and it must wait here."""
        peer = bytes(parts[0])
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            # The connection is gone. What it missed is offered again when its node returns.
            return True
        self._core.sent(peer, sum(memoryview(part).nbytes for part in parts[1:]))
        return True

    def _flush_late(self, peer: bytes) -> None:
        queue = self._late[peer]
        while queue and self._send_parts(queue[0]):
            queue.popleft()
        if not queue:
            del self._late[peer]


def receive(
    socket: zmq.Socket[bytes], *, first: bool = False, flags: int = 0
) -> tuple[AnyFrame, list[Buffer], int]:
    """Read the header and buffers of a message.

    With ``first``, the header is its first part; otherwise the parts before it (the
    ROUTER's identity) have been read.

    Returns the frame, its buffers, and the bytes that both took.

    Raises:
        WireError: not a frame of this protocol; the rest of the message has been read.
        zmq.Again: with ``flags=zmq.NOBLOCK``, nothing has arrived.
    """
    part: zmq.Frame | None = None
    buffers: list[Buffer] = []
    nbytes = 0
    try:
        if not first and not socket.getsockopt(zmq.RCVMORE):
            raise WireError("expected a header, got an empty message")
        part = socket.recv(flags, copy=False)
        nbytes = len(part)
        frame = decode_frame(part.buffer)
        large = isinstance(frame, Chunk)
        while part.more:
            if len(buffers) >= MAX_BUFFERS:
                raise WireError(f"expected at most {MAX_BUFFERS} buffers")
            part = socket.recv(copy=False)
            # A small buffer is copied: a view of it would keep its whole frame.
            buffers.append(part.buffer if large else part.bytes)
            nbytes += len(part)
    finally:
        while part is not None and part.more:
            part = socket.recv(copy=False)
    return frame, buffers, nbytes
