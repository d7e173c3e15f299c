"""A node's DEALER socket, and why its handshake with the broker fails.

libzmq never tries again after a broker has refused a key or uses another mechanism. So this socket
watches its own monitor, and is replaced by a new one every few seconds until the broker lets it in.
Frames that wait in the old socket are lost then; the link sends them again.
"""

from __future__ import annotations

import enum
import socket as sockets
from collections import deque
from collections.abc import Sequence

import zmq

from fedmq.broker.access.curve import NodeKeys
from fedmq.broker.transport.monitor import Monitor
from fedmq.broker.wire.endpoints import Endpoint, libzmq_address
from fedmq.broker.wire.sockets import COPY_BELOW_BYTES, CURVE_BYTES, MAX_FRAME_BYTES

RETRY_S = 2.0
"""Time between two attempts of a node whose key the broker refuses."""
_EVENTS = int(
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class HandshakeFailure(enum.Enum):
    """Why the last handshake failed."""

    KEY_REFUSED = "key-refused"
    """The broker does not know this node's key."""
    OTHER_MECHANISM = "other-mechanism"
    """One side uses keys, the other does not; or it is no broker."""
    CUT = "cut"
    """The other end closed the connection: it has another key than expected, or no room."""


class DealerSocket:
    """A DEALER socket that is connected to a broker.

    Args:
        endpoint: of the broker.
        families: of its addresses, the one to try first in front.
        keys: for CURVE; None for a broker without keys. Not used over a Unix socket.

    Attributes:
        socket: for messages; another one after `turn` or `try_next_family`.
        failure: of the last handshake; None once one has succeeded.
        retry_at: time at which `turn` connects again; None if libzmq does.

    Raises:
        zmq.ZMQError: libzmq does not accept the endpoint.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        families: Sequence[sockets.AddressFamily],
        keys: NodeKeys | None = None,
    ) -> None:
        self._endpoint, self._families = endpoint, deque(families)
        self._keys = None if endpoint.path else keys
        self.failure: HandshakeFailure | None = None
        self.retry_at: float | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._open()
        except zmq.ZMQError:
            self._context.destroy(linger=0)
            raise

    @property
    def monitor(self) -> zmq.Socket[bytes]:
        """Return the socket that is readable when `turn` has something to read."""
        return self._monitor.socket

    @property
    def has_families(self) -> bool:
        """Return whether the host name has addresses of two families."""
        return len(self._families) > 1

    def register(self, poller: zmq.Poller, events: int) -> None:
        """Register the socket for events, and its monitor, with a poller."""
        poller.register(self.socket, events)
        poller.register(self.monitor, zmq.POLLIN)

    def turn(self, now: float) -> bool:
        """Read what the monitor reports, and connect again if it is time.

        Returns whether `socket` has been replaced.

        Args:
            now: in seconds, on any clock that is used for ``retry_at``.
        """
        for event, _ in self._monitor.read():
            match event:
                case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self.failure = self.retry_at = None
                case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    self.failure, self.retry_at = HandshakeFailure.KEY_REFUSED, now + RETRY_S
                case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                    self.failure, self.retry_at = HandshakeFailure.OTHER_MECHANISM, now + RETRY_S
                case _:
                    self.failure = HandshakeFailure.CUT
        if self.retry_at is None or now < self.retry_at:
            return False
        self.retry_at = None
        self._reopen()
        return True

    def try_next_family(self) -> None:
        """Connect to an address of the other family."""
        self._families.rotate()
        self._reopen()

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket; what it has queued may be sent for a moment."""
        self._monitor.close()
        self._context.destroy(linger=linger_ms)

    def _reopen(self) -> None:
        self._monitor.close()
        self.socket.close(linger=0)
        self._open()

    def _open(self) -> None:
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.copy_threshold = COPY_BELOW_BYTES
        for option, value in (
            (zmq.IMMEDIATE, 1),
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES + (CURVE_BYTES if self._keys else 0)),
            # Deliveries have a window. If libzmq stopped reading, a heartbeat could abort it.
            (zmq.RCVHWM, 0),
            (zmq.RECONNECT_IVL, 50),
            (zmq.RECONNECT_IVL_MAX, 1000),
            # libzmq resolves a name in one family only, each time it connects.
            (zmq.IPV6, self._families[0] is sockets.AF_INET6),
        ):
            self.socket.setsockopt(option, value)
        if self._keys is not None:
            self.socket.setsockopt(zmq.CURVE_SERVERKEY, self._keys.broker.encode())
            self.socket.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.own.public.encode())
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.own.secret.encode())
        self._monitor = Monitor(self._context, self.socket, _EVENTS)
        self._connect()

    def _connect(self) -> None:
        self.socket.connect(libzmq_address(self._endpoint.text))
