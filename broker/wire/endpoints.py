"""Parse and check endpoints before a socket uses them: ``tcp://HOST:PORT`` and ``ipc://PATH``.

libzmq takes ports modulo 65536, answers most mistakes with "invalid argument", and deletes any file
in the place of its socket file. So mistakes are detected here, with a specific error.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import stat
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from fedmq.broker.errors import EndpointError, UnresolvedError

MAX_PORT = 65535
MAX_PATH_BYTES = 107 if sys.platform.startswith("linux") else 103
"""Longest path of a socket file: the size of the kernel's address."""
RESOLVE_PATIENCE_S = 10.0
"""How long to retry while no name server can be reached, as on a machine that is starting."""
_SHOWN = 200
"""Most characters of an endpoint in an error."""
_FORMS = "tcp://HOST:PORT or ipc://PATH"


@dataclass(frozen=True)
class Endpoint:
    """The endpoint of a broker: ``host`` and ``port``, or ``path`` of a socket file.

    text: the endpoint as given. host: without brackets. literal: the host is an address, not a
        name.
    """

    text: str
    host: str = ""
    port: int = 0
    path: str = ""
    literal: bool = False

    @property
    def has_file(self) -> bool:
        """Return whether there is a socket file (on Linux, a path after an @ has none)."""
        return bool(self.path) and self.path != "*" and not self.path.startswith("@")

    @property
    def unix_address(self) -> str:
        """Return the address of a socket file for Python's sockets."""
        return "\0" + self.path[1:] if self.path.startswith("@") else self.path


def parse_endpoint(text: str, *, listen: bool = False) -> Endpoint:
    """Parse an endpoint.

    Args:
        text: as a user wrote it.
        listen: whether it is an endpoint to listen on, with any address (``*``) and any port (0)
            allowed.

    Raises:
        EndpointError: the endpoint is invalid; the message says what was expected and given.
    """
    scheme, found, rest = text.partition("://")
    if not found:
        hint = f"; write tcp://{text}" if re.fullmatch(r"[^/\s]+:[0-9]{1,5}", text) else ""
        raise EndpointError(f"expected {_FORMS}, got {text[:_SHOWN]!r}{hint}")
    if scheme == "ipc":
        return _parse_ipc(text, rest, listen=listen)
    if scheme == "tcp":
        return _parse_tcp(text, rest, listen=listen)
    raise EndpointError(f"expected {_FORMS}, got {text[:_SHOWN]!r}")


def _parse_ipc(text: str, path: str, *, listen: bool) -> Endpoint:
    size = len(path.encode(errors="surrogateescape"))
    if size > MAX_PATH_BYTES:
        raise EndpointError(
            f"expected a path of at most {MAX_PATH_BYTES} bytes after ipc://, got {size} bytes"
        )
    if path in ("", "@") or "\0" in path or (path == "*" and not listen):
        raise EndpointError(f"expected ipc://PATH, got {text[:_SHOWN]!r}")
    return Endpoint(text, path=path)


def _parse_tcp(text: str, rest: str, *, listen: bool) -> Endpoint:
    host, colon, port = rest.rpartition(":")
    if rest.startswith("[") != ("]" in rest):
        raise EndpointError(
            f"expected an IPv6 address in brackets, as in tcp://[::1]:7700, got {text[:_SHOWN]!r}"
        )
    if not colon or (rest.startswith("[") and rest.endswith("]")):
        raise EndpointError(f"expected a port, as in tcp://HOST:PORT, got {text[:_SHOWN]!r}")
    if listen and port == "*":
        port = "0"
    lowest = 0 if listen else 1
    if not (port.isascii() and port.isdigit() and lowest <= int(port[:9]) <= MAX_PORT):
        raise EndpointError(
            f"expected a port from {lowest} to {MAX_PORT}, got {port[:_SHOWN]!r} in "
            f"{text[:_SHOWN]!r}"
        )
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    elif ":" in host:
        raise EndpointError(
            f"expected an IPv6 address in brackets, tcp://[{host[:_SHOWN]}]:{port}, got "
            f"{text[:_SHOWN]!r}"
        )
    if host == "*" and not listen:
        raise EndpointError(
            f"expected the broker's host in tcp://HOST:PORT, got {text[:_SHOWN]!r}; * is for a "
            "broker that listens on all addresses"
        )
    literal = _is_address(host)
    if bracketed and not (literal and ":" in host):
        raise EndpointError(f"expected an IPv6 address in the brackets, got {text[:_SHOWN]!r}")
    if not literal and host != "*" and not re.fullmatch(r"[!-.0-9<-~]{1,253}", host):
        raise EndpointError(f"expected a host in tcp://HOST:PORT, got {text[:_SHOWN]!r}")
    return Endpoint(text, host=host, port=int(port), literal=literal)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def address_families(endpoint: Endpoint) -> list[socket.AddressFamily]:
    """Return the families of an endpoint's addresses, the one to try first in front.

    A name may have addresses of both families while the broker listens on one of them only.

    Raises:
        UnresolvedError: its name has no address, or no name server can be reached.
    """
    if endpoint.path:
        return [socket.AF_UNIX]
    if endpoint.host == "*":
        return [socket.AF_INET6]  # the socket takes both
    if endpoint.literal:
        return [socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET]
    return list(dict.fromkeys(family for family, _ in addresses_of(endpoint)))


def addresses_of(endpoint: Endpoint) -> list[tuple[socket.AddressFamily, str]]:
    """Return the addresses of a tcp endpoint: (family, address).

    Raises:
        UnresolvedError: its name has no address, or no name server can be reached.
    """
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise UnresolvedError(f"expected a host name, got {endpoint.host!r}") from None
    except OSError as error:
        temporary = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
        why = (error.strerror or str(error)).lower()
        raise UnresolvedError(
            f"the name {endpoint.host!r} does not resolve: {why}", temporary=temporary
        ) from None
    known = (socket.AF_INET, socket.AF_INET6)
    return [(family, str(address[0])) for family, _, _, _, address in found if family in known]


def resolve(endpoint: Endpoint) -> list[socket.AddressFamily]:
    """Return the families of an endpoint's addresses; retry while no name server can be reached.

    The name is resolved on a thread, so that a signal ends the waiting at once.

    Raises:
        UnresolvedError: its name has no address, or no name server could be reached.
    """
    if endpoint.path or endpoint.literal:
        return address_families(endpoint)
    until = time.monotonic() + RESOLVE_PATIENCE_S
    while True:
        answers: list[list[socket.AddressFamily] | UnresolvedError] = []
        thread = threading.Thread(target=_ask, args=(endpoint, answers), daemon=True)
        thread.start()
        thread.join()
        answer = answers[0]
        if not isinstance(answer, UnresolvedError):
            return answer
        if not answer.temporary or time.monotonic() >= until:
            raise answer
        time.sleep(0.5)


def _ask(endpoint: Endpoint, answers: list[list[socket.AddressFamily] | UnresolvedError]) -> None:
    try:
        answers.append(address_families(endpoint))
    except UnresolvedError as error:
        answers.append(error)


def libzmq_address(text: str) -> str:
    """Return an endpoint as pyzmq takes it: bytes if the name of its socket file is no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text)  # type: ignore[return-value] # pyzmq does not list bytes
    return text


def listening_address(endpoint: Endpoint) -> tuple[str, bool]:
    """Return the address for a listening socket, and whether it is IPv6.

    For listening, libzmq resolves only the names of network interfaces.

    Raises:
        EndpointError: there cannot be a socket file, or the name has no address.
    """
    if endpoint.path:
        _check_socket_file(endpoint)
        return endpoint.text, False
    interfaces = {name for _, name in socket.if_nameindex()}
    if endpoint.host == "*" or endpoint.literal or endpoint.host in interfaces:
        shown = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        ipv6 = endpoint.host == "*" or ":" in endpoint.host
        return f"tcp://{shown}:{endpoint.port}", ipv6
    family, address = addresses_of(endpoint)[0]
    ipv6 = family == socket.AF_INET6
    return f"tcp://{f'[{address}]' if ipv6 else address}:{endpoint.port}", ipv6


def _check_socket_file(endpoint: Endpoint) -> None:
    """Raise EndpointError if libzmq would delete a file, or another broker's socket."""
    if not endpoint.has_file:
        return
    path = Path(endpoint.path)
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise EndpointError(f"the folder {path.parent} does not exist") from None
        return
    except OSError as error:
        raise EndpointError((error.strerror or str(error)).lower()) from None
    if not stat.S_ISSOCK(mode):
        raise EndpointError("the path is a file that is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial, contextlib.suppress(OSError):
        trial.settimeout(1.0)
        trial.connect(endpoint.unix_address)
        raise EndpointError("address already in use")
