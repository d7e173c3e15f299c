"""The connections of a ROUTER: where each comes from, and which are closed.

libzmq reports a connection that it has accepted or lost by its file descriptor, and each message
carries the descriptor and the user id that `Door` gave. Descriptors are reused at once. libzmq
reports the loss before it closes one, so the monitor is read right before one is used; in the
microseconds that remain it could be reused by a connection, which then is closed and returns.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket as sockets
from collections.abc import Callable, Iterator

import zmq
from msgspec import Struct

from fedmq.broker.access.quotas import network_of
from fedmq.broker.access.rights import Origin
from fedmq.broker.open_files import files_left
from fedmq.broker.settings import Limits
from fedmq.broker.transport.monitor import Monitor
from fedmq.broker.transport.zap import LOCAL_USER

_EVENTS = int(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
_CLOSE_AFTER_S = 0.25
"""Time for the last frame to a peer, which says why, before its connection is closed."""
_COUNT_EACH_S = 1.0
"""Longest time between two counts of the open files."""


class _Accepted(Struct, eq=False):
    """A connection that libzmq has accepted and not reported as lost.

    peer: its routing id, once a message has come. close_at: when to close it; monotonic.
    host: of the peer, see `network_of`; None if it was not asked for yet.
    """

    fd: int
    peer: bytes | None = None
    close_at: float | None = None
    host: str | None = None


class Connection(Struct, eq=False):
    """A connection from which a message has come.

    origin: what the transport proves about the peer. user: its user id.
    has_joined: whether the peer has said Hello, or handed in a key.
    """

    origin: Origin
    user: str
    accepted: _Accepted | None
    has_joined: bool = False


class Connections:
    """The connections of a ROUTER socket.

    Args:
        context: of the socket.
        socket: not bound yet.
        limits: `waiting` and `reserved_files` limit the connections.
        on_replaced: called with a routing id that a peer with another key has now.
        keyed: whether messages carry a user id that a `Door` gave; if not, no peer has a key.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        socket: zmq.Socket[bytes],
        limits: Limits,
        on_replaced: Callable[[bytes], None],
        *,
        keyed: bool,
    ) -> None:
        self.monitor = Monitor(context, socket, _EVENTS)
        self._limits, self._keyed, self._on_replaced = limits, keyed, on_replaced
        self._by_peer: dict[bytes, Connection] = {}
        self._by_fd: dict[int, _Accepted] = {}
        self._silent: dict[int, _Accepted] = {}
        """Those whose peer has not said Hello, by descriptor; the oldest first."""
        self._closing: list[_Accepted] = []
        self._room = 0
        """Number of connections that leave the reserve of open files free, at the last count."""
        self._counted_at = float("-inf")
        self._count_room()

    def of(self, peer: bytes, part: zmq.Frame) -> Connection:
        """Return the connection of a message.

        Args:
            peer: its routing id, which the peer may have chosen.
            part: a part of the message.
        """
        known = self._by_peer.get(peer)
        if known is not None and (not self._keyed or part.get("User-Id") == known.user):
            return known
        return self._first(peer, part)

    def is_known(self, peer: bytes) -> bool:
        """Return whether a peer has sent a message over a connection that is not lost."""
        return peer in self._by_peer

    def joins(self, connection: Connection) -> None:
        """Note that a peer has said Hello, or handed in a key."""
        connection.has_joined = True
        if connection.accepted is not None:
            self._silent.pop(connection.accepted.fd, None)

    def close(self, peer: bytes, now: float) -> None:
        """Close the connection of a peer a little later, so that it learns why."""
        known = self._by_peer.get(peer)
        if known is not None:
            self._close(known.accepted, now)

    def close_refused(self, is_admitted: Callable[[str], bool], now: float) -> None:
        """Close the connections whose keys are not admitted any more, a little later."""
        for known in self._by_peer.values():
            if not is_admitted(known.origin.key):
                self._close(known.accepted, now)

    @property
    def next_close(self) -> float | None:
        """Time at which `tidy` has a connection to close; monotonic."""
        return self._closing[0].close_at if self._closing else None

    def read_events(self) -> None:
        """Read what the monitor reports; needed in every turn in which it is readable."""
        for event, fd in self.monitor.read():
            if event == zmq.EVENT_ACCEPTED:
                self._lost(fd)  # its loss was not reported
                self._by_fd[fd] = self._silent[fd] = _Accepted(fd)
            else:
                self._lost(fd)

    def tidy(self, now: float, *, drained: bool) -> None:
        """Close the connections that must go.

        Args:
            now: monotonic.
            drained: whether all messages that had arrived were read, so that a peer is silent
                only if it has not said Hello.
        """
        while self._closing and (self._closing[0].close_at or 0.0) <= now:
            self._shut([self._closing.pop(0)])
        excess = len(self._silent) - self._limits.waiting if drained else 0
        excess = max(excess, self._over_reserve(now))
        if excess > 0:
            self._shut(self._to_evict(excess))

    # ----

    def _first(self, peer: bytes, part: zmq.Frame) -> Connection:
        """Return a new connection, or one whose routing id another peer had before."""
        user = str(part.get("User-Id")) if self._keyed else LOCAL_USER
        fd = int(part.get(zmq.SRCFD))
        if fd not in self._by_fd:
            self.read_events()  # libzmq reports a connection before its first message
        accepted = self._by_fd.get(fd)  # None: it is lost already
        key = "" if user == LOCAL_USER else user
        found = Connection(Origin(key, _address(part)), user, accepted)
        if peer in self._by_peer:
            self._on_replaced(peer)
        if accepted is not None:
            if accepted.peer is not None:
                self._by_peer.pop(accepted.peer, None)
            accepted.peer = peer
            self._by_peer[peer] = found
        return found

    def _lost(self, fd: int) -> None:
        accepted = self._by_fd.pop(fd, None)
        if accepted is None:
            return
        self._silent.pop(fd, None)
        if accepted.close_at is not None:
            with contextlib.suppress(ValueError):  # it was shut before
                self._closing.remove(accepted)
        if accepted.peer is not None:
            known = self._by_peer.get(accepted.peer)
            if known is not None and known.accepted is accepted:
                del self._by_peer[accepted.peer]

    def _close(self, accepted: _Accepted | None, now: float) -> None:
        if accepted is not None and accepted.close_at is None:
            accepted.close_at = now + _CLOSE_AFTER_S
            self._closing.append(accepted)

    def _over_reserve(self, now: float) -> int:
        """Return the number of connections beyond the room that the reserve of files leaves."""
        near = 2 * len(self._by_fd) >= self._room
        if near and now >= self._counted_at + _COUNT_EACH_S:
            self._counted_at = now
            self._count_room()
        return len(self._by_fd) - self._room

    def _count_room(self) -> None:
        with contextlib.suppress(OSError):  # too many open files: the last count is good enough
            self._room = len(self._by_fd) + files_left(self._limits.reserved_files)

    def _to_evict(self, number: int) -> list[_Accepted]:
        """Return the silent connections to close: the oldest of the hosts that have most.

        If there are too few, the newest of the others: no room is left for them.
        """
        by_host: dict[str, list[_Accepted]] = {}
        for each in reversed(self._silent.values()):
            if each.host is None:
                each.host = _host(each.fd)
            by_host.setdefault(each.host, []).append(each)
        evicted: list[_Accepted] = []
        while len(evicted) < number and by_host:
            host, silent = max(by_host.items(), key=lambda item: len(item[1]))
            evicted.append(silent.pop())
            if not silent:
                del by_host[host]
        others = [each for each in self._by_fd.values() if each.fd not in self._silent]
        return evicted + others[len(others) - max(0, number - len(evicted)) :]

    def _shut(self, connections: list[_Accepted]) -> None:
        """Shut connections, so that libzmq closes them."""
        self.read_events()
        for each in connections:
            if self._by_fd.get(each.fd) is each:
                with contextlib.suppress(OSError), _borrowed(each.fd) as one:
                    one.shutdown(sockets.SHUT_RDWR)


def _address(part: zmq.Frame) -> str:
    """Return the address of a peer on another host or loopback; "" for a Unix socket."""
    try:
        address = ipaddress.ip_address(str(part.get("Peer-Address")))
    except (ValueError, zmq.ZMQError):
        return ""
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def _host(fd: int) -> str:
    """Return the host at the other end of a connection, see `network_of`; "" if unknown."""
    try:
        with _borrowed(fd) as one:
            name = one.getpeername()
    except OSError:
        return ""
    return network_of(str(name[0])) if isinstance(name, tuple) else ""


@contextlib.contextmanager
def _borrowed(fd: int) -> Iterator[sockets.socket]:
    """Yield a socket that libzmq owns; a duplicate would need a descriptor, and none may be left.

    Raises:
        OSError: it is no socket any more.
    """
    one = sockets.socket(fileno=fd)
    try:
        yield one
    finally:
        one.detach()
