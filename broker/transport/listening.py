"""The broker's ROUTER socket: its options, and the endpoints that it listens on.

Beyond this host it listens only with keys, or if its operator lets anybody connect.
"""

from __future__ import annotations

import errno
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import zmq

from fedmq.broker.access.curve import KeyPair
from fedmq.broker.errors import BrokerError, EndpointError
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.transport.zap import DOMAIN
from fedmq.broker.wire.endpoints import Endpoint, libzmq_address, listening_address, parse_endpoint
from fedmq.broker.wire.sockets import COPY_BELOW_BYTES, CURVE_BYTES, MAX_FRAME_BYTES

MAX_WAITING_MESSAGES = 32
"""Messages of a connection that wait in libzmq; beyond that, their sender waits."""


def router_socket(
    context: zmq.Context[zmq.Socket[bytes]], settings: BrokerSettings, *, keyed: bool
) -> zmq.Socket[bytes]:
    """Return a ROUTER socket that listens on nothing yet.

    Args:
        context: of the socket.
        settings: heartbeats and leases, which the I/O threads keep, too, and limits.
        keyed: whether a `Door` decides who is let in.
    """
    socket = context.socket(zmq.ROUTER)
    socket.copy_threshold = COPY_BELOW_BYTES
    for option, value in (
        (zmq.ROUTER_MANDATORY, 1),
        (zmq.ROUTER_HANDOVER, 0),  # a peer must not take the routing id of another
        (zmq.LINGER, 0),
        (zmq.HANDSHAKE_IVL, max(1, round(settings.limits.handshake_s * 1000))),
        # The I/O threads exchange these heartbeats even while Python is busy in a node.
        # libzmq 4.3.5 aborts if one is due while a peer that has closed still has more messages
        # than the limit. So they are rare, and the limit is low: it is read in a moment.
        (zmq.HEARTBEAT_IVL, max(1, round(settings.lease_s * 500))),
        (zmq.HEARTBEAT_TIMEOUT, max(1, round(settings.lease_s * 500))),
        (zmq.RCVHWM, MAX_WAITING_MESSAGES),
    ):
        socket.setsockopt(option, value)
    if keyed:  # for every endpoint: libzmq believes the user id that an unasked peer claims
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    return socket


def bind_all(
    socket: zmq.Socket[bytes], texts: Sequence[str], keys: KeyPair | None, *, insecure: bool
) -> tuple[list[str], bool]:
    """Make a socket listen on endpoints.

    With keys, a tcp endpoint uses CURVE. A Unix socket needs none: its folder keeps others away.

    Returns (the endpoints with their real ports, whether anybody on another host may connect).

    Raises:
        BrokerError: an endpoint is invalid or in use, or lets strangers in without ``insecure``.
    """
    endpoints = [_parse(text) for text in texts]
    found, exposed = dict[str, str](), False
    # Those without CURVE first: binding takes the socket's options as they are then.
    for endpoint in sorted(endpoints, key=lambda each: not each.path):
        curve = keys is not None and not endpoint.path
        try:
            address, ipv6 = listening_address(endpoint)
            if not curve and not _is_private(endpoint, address):
                if not insecure:
                    raise EndpointError(_exposed(endpoint))
                exposed = True
            _set_security(socket, keys if curve else None)
            socket.setsockopt(zmq.IPV6, ipv6)
            socket.bind(libzmq_address(address))
        except EndpointError as error:
            raise BrokerError(f"cannot listen on {endpoint.text}: {error}") from None
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                reason = "this host has no such address"
            else:
                reason = zmq.strerror(error.errno or 0).lower()
            raise BrokerError(f"cannot listen on {endpoint.text}: {reason}") from None
        if endpoint.has_file:  # whatever the umask allows
            Path(endpoint.path).chmod(0o600)
        last = cast("bytes", socket.getsockopt(zmq.LAST_ENDPOINT))
        found[endpoint.text] = os.fsdecode(last)
    return [found[endpoint.text] for endpoint in endpoints], exposed


def _parse(text: str) -> Endpoint:
    try:
        return parse_endpoint(text, listen=True)
    except EndpointError as error:
        raise BrokerError(f"cannot listen on {text}: {error}") from None


def _set_security(socket: zmq.Socket[bytes], keys: KeyPair | None) -> None:
    """Set the mechanism and the largest frame of the endpoints that are bound next."""
    if keys is None:
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        return
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES + CURVE_BYTES)


def _is_private(endpoint: Endpoint, address: str) -> bool:
    """Return whether only this host can reach an endpoint; ``address`` as libzmq binds it."""
    if endpoint.path:
        return endpoint.path == "*" or endpoint.has_file
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        return is_loopback(host)
    except ValueError:
        return False  # * or an interface, which may have any address


def is_loopback(address: str) -> bool:
    """Return whether an address can be reached from its own host only.

    Raises:
        ValueError: it is not an address.
    """
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)


def _exposed(endpoint: Endpoint) -> str:
    if endpoint.path:
        return (
            "it has no file, so every user of this host could take part without a key: choose a "
            "path in a folder of your own, or let anybody connect with --insecure"
        )
    return (
        f"other hosts can reach {endpoint.host}, and without keys anybody there could take part: "
        "make keys for the broker with `fedmq keys new broker`, or let anybody connect with "
        "--insecure"
    )
