"""Find out what listens at an endpoint where no broker answers.

Uses a plain connection and just enough of ZMTP: libzmq itself retries for ever without reporting
what it has found.
"""

from __future__ import annotations

import enum
import socket
import time
from typing import NamedTuple

from fedmq.broker.errors import UnresolvedError
from fedmq.broker.wire.endpoints import Endpoint, addresses_of

_TIMEOUT_S = 1.0
_GREETING_BYTES = 64
_GREETING = (b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"NULL").ljust(_GREETING_BYTES, b"\0")
"""The greeting of ZMTP 3.1 without security: signature, version, mechanism."""
_NULL, _CURVE = "NULL", "CURVE"
_VERSION_AT, _MECHANISM = 10, slice(12, 32)
_COMMAND, _LONG = 0x04, 0x02
"""Flags of a ZMTP frame."""
_NEWLINES, _ANSWER_S = b"\r\n\r\n", 0.5
"""Bytes that make other servers, such as HTTP ones, respond; and how long to wait for that."""
REQUIRES_KEYS = (
    "the broker there requires keys, and its public key is not known here for this address: give "
    "it with --broker-key, use the address for which it is stored (`fedmq keys list`), or join "
    "with an invite (--join-file)"
)
HAS_NO_KEYS = (
    "no broker with keys listens there, and this node expects one: another program has taken its "
    "place, or the broker was started without its keys; only if you trust the network and whatever "
    "listens there, connect without encryption by --broker-key none"
)
_SOCKET_TYPE = b"Socket-Type"
_MAX_READY_BYTES = 1024
_SHOWN = 4
"""Most addresses of a host name in a report."""


class Listener(enum.Enum):
    """What listens at an endpoint, for programs."""

    UNRESOLVED = "unresolved"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    MUTE = "mute"
    """It accepts connections and sends nothing, like a suspended process."""
    NOT_ZEROMQ = "not-zeromq"
    OTHER_SOCKET = "other-socket"
    SECURED = "secured"
    """It requires keys, and this node has none."""
    WITHOUT_KEYS = "without-keys"
    """It has no keys, and this node requires them."""
    KEY_REFUSED = "key-refused"
    """A broker that does not accept this node's key."""
    OTHER_KEY = "other-key"
    """A broker that probably has another key than this node expects."""
    SILENT = "silent"
    """A ZeroMQ ROUTER, like a broker, that does not answer."""


class ProbeResult(NamedTuple):
    """What listens there, and a description for people."""

    listener: Listener
    text: str


def probe(endpoint: Endpoint, timeout_s: float = _TIMEOUT_S, *, curve: bool = False) -> ProbeResult:
    """Probe an endpoint, for up to ``timeout_s`` per address.

    Args:
        endpoint: where no broker answers.
        timeout_s: for each of its addresses.
        curve: whether a broker with keys is expected there; its key is not checked.
    """
    finding = ProbeResult(Listener.UNREACHABLE, "it has no address")
    tried: list[str] = []
    try:
        for family, address in _addresses(endpoint):
            tried.append(address[0] if isinstance(address, tuple) else address)
            finding = _try(family, address, timeout_s, _CURVE if curve else _NULL)
            if finding.listener not in (Listener.REFUSED, Listener.UNREACHABLE):
                break
    except UnresolvedError as error:
        return ProbeResult(Listener.UNRESOLVED, str(error))
    if endpoint.host and not endpoint.literal:
        some = ", ".join(tried[:_SHOWN])
        return ProbeResult(finding.listener, f"{finding.text}; {endpoint.host} is {some}")
    return finding


def _addresses(
    endpoint: Endpoint,
) -> list[tuple[socket.AddressFamily, str | tuple[str, int]]]:
    if endpoint.path:
        return [(socket.AF_UNIX, endpoint.unix_address)]
    return [(family, (address, endpoint.port)) for family, address in addresses_of(endpoint)]


def _try(
    family: socket.AddressFamily, address: str | tuple[str, int], timeout_s: float, expected: str
) -> ProbeResult:
    deadline = time.monotonic() + timeout_s
    with socket.socket(family, socket.SOCK_STREAM) as plain:
        plain.settimeout(timeout_s)
        try:
            plain.connect(address)
        except FileNotFoundError:
            return ProbeResult(Listener.REFUSED, "there is no such socket file")
        except ConnectionRefusedError:
            return ProbeResult(Listener.REFUSED, "nothing listens there (connection refused)")
        except TimeoutError:
            return ProbeResult(Listener.UNREACHABLE, f"it did not answer within {timeout_s:g} s")
        except OSError as error:
            return ProbeResult(Listener.UNREACHABLE, (error.strerror or str(error)).lower())
        return _greet(plain, deadline, expected)


def _greet(plain: socket.socket, deadline: float, expected: str) -> ProbeResult:
    """Find out what is at the other end of a connection."""
    not_zeromq = "a process listens there that does not speak ZeroMQ"
    try:
        # The rest after its greeting: a peer does not answer a greeting with another mechanism.
        plain.sendall(_GREETING[: _MECHANISM.start])
        greeting = _receive(plain, _GREETING_BYTES, deadline)
        if not greeting and time.monotonic() >= deadline:
            plain.sendall(_NEWLINES)
            greeting = _receive(plain, _GREETING_BYTES, time.monotonic() + _ANSWER_S)
            if not greeting and not _is_closed(plain):
                text = "a process accepts connections there, but sends nothing"
                return ProbeResult(Listener.MUTE, text)
        if greeting[:1] != b"\xff" or greeting[9:10] != b"\x7f" or len(greeting) < _GREETING_BYTES:
            seen = f" (it sent {greeting[:16]!r})" if greeting else ""
            return ProbeResult(Listener.NOT_ZEROMQ, not_zeromq + seen)
        if greeting[_VERSION_AT] < _GREETING[_VERSION_AT]:
            return ProbeResult(
                Listener.OTHER_SOCKET, "a ZeroMQ socket older than version 4 listens there"
            )
        mechanism = greeting[_MECHANISM].rstrip(b"\0").decode("ascii", "replace")
        if expected == mechanism == _CURVE:
            text = "a broker with keys there does not answer: it is starting, or it is busy"
            return ProbeResult(Listener.SILENT, text)
        if mechanism == _NULL != expected:
            return ProbeResult(Listener.WITHOUT_KEYS, HAS_NO_KEYS)
        if mechanism == _CURVE:
            return ProbeResult(Listener.SECURED, REQUIRES_KEYS)
        if mechanism != _NULL:
            return ProbeResult(
                Listener.SECURED, f"the ZeroMQ socket there requires {mechanism} security"
            )
        plain.sendall(_GREETING[_MECHANISM.start :])
        body = b"\x05READY" + _property(_SOCKET_TYPE, b"DEALER") + _property(b"Identity", b"")
        plain.sendall(bytes([_COMMAND, len(body)]) + body)
        kind = _socket_type(_receive_command(plain, deadline))
    except OSError:
        return ProbeResult(Listener.NOT_ZEROMQ, not_zeromq)
    if kind == "ROUTER":
        text = (
            "a ZeroMQ ROUTER there does not answer: a broker that is starting, or another program"
        )
        return ProbeResult(Listener.SILENT, text)
    return ProbeResult(
        Listener.OTHER_SOCKET,
        f"a ZeroMQ socket of type {kind or 'unknown'} listens there, not a broker",
    )


def _is_closed(plain: socket.socket) -> bool:
    plain.settimeout(0.0)
    try:
        return not plain.recv(1)
    except BlockingIOError:
        return False


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value


def _receive(plain: socket.socket, size: int, deadline: float) -> bytes:
    """Read ``size`` bytes; fewer if no more arrive before the deadline."""
    data = b""
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        plain.settimeout(left)
        try:
            more = plain.recv(size - len(data))
        except TimeoutError:
            break
        if not more:
            break
        data += more
    return data


def _receive_command(plain: socket.socket, deadline: float) -> bytes:
    flags = _receive(plain, 1, deadline)
    if not flags or not flags[0] & _COMMAND:
        return b""
    size = _receive(plain, 8 if flags[0] & _LONG else 1, deadline)
    return _receive(plain, min(int.from_bytes(size, "big"), _MAX_READY_BYTES), deadline)


def _socket_type(command: bytes) -> str:
    """Return the socket type that a READY command names, or ""."""
    if not command.startswith(b"\x05READY"):
        return ""
    rest = command[6:]
    while rest:
        name, rest = rest[1 : 1 + rest[0]], rest[1 + rest[0] :]
        size = int.from_bytes(rest[:4], "big")
        value, rest = rest[4 : 4 + size], rest[4 + size :]
        if name.lower() == _SOCKET_TYPE.lower():
            return value.decode("ascii", "replace")[:20]
    return ""
