"""Where the broker of a local cluster listens: a socket file in a folder that only its owner opens.

So another user of the same host is a stranger, and the cluster needs no keys. Workers of other
hosts connect to another address, with keys.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedmq.broker.access.broker_keys import BrokerKeys
from fedmq.broker.file_modes import make_private_folder, restrict
from fedmq.broker.wire.endpoints import MAX_PATH_BYTES
from fedmq.nodes.errors import ConfigError, NodeError
from fedmq.nodes.keys.serving import broker_keys, how_to_connect
from fedmq.nodes.process.exception_text import reason_of

SOCKET_FOLDER = "socket"
"""In the folder of the run. The broker makes the socket file there and deletes it at its end."""
_SOCKET = "broker"
_TRIAL = "trial"
LOOPBACK = "tcp://127.0.0.1:0"


@dataclass(frozen=True)
class Listening:
    """Where a cluster's broker listens, and with which keys.

    endpoint: for the cluster's own nodes; "" until it is chosen.
    others: for workers of other hosts.
    keys_folder: with the broker's key and its access file; None if the command names none.
    insecure: whether anybody may connect.
    """

    endpoint: str = ""
    others: tuple[str, ...] = ()
    keys_folder: Path | None = None
    insecure: bool = False

    @classmethod
    def of(cls, bind: str | None, keys_folder: Path | None, *, insecure: bool) -> Listening:
        """Return where the broker listens for workers of other hosts.

        Raises:
            AccessError: the broker's key is invalid, or others may read it.
            ConfigError: there is no such key, or no address that keys are for.
        """
        if bind is None and (keys_folder is not None or insecure):
            option = "--insecure" if insecure else "--keys"
            raise ConfigError(
                f"{option}: the nodes of a cluster need no keys; set broker.bind, where workers of "
                f"other hosts connect, or leave out {option}"
            )
        found = cls("", () if bind is None else (bind,), keys_folder, insecure)
        found.keys()
        return found

    @property
    def options(self) -> Sequence[str]:
        """Return the options of the command that say this."""
        keys = () if self.keys_folder is None else ("--keys", str(self.keys_folder))
        return [*keys, *(["--insecure"] if self.insecure else [])]

    @property
    def endpoints(self) -> Sequence[str]:
        """Return all endpoints, that of the cluster's own nodes first."""
        return [self.endpoint, *self.others]

    def keys(self) -> BrokerKeys | None:
        """Return the broker's keys; None without keys.

        Raises:
            AccessError, ConfigError: see `of`.
        """
        return broker_keys(self.others, self.keys_folder, insecure=self.insecure)

    def chosen(self, folder: Path) -> tuple[Listening, str]:
        """Return this with an endpoint for the cluster's own nodes, and why it is loopback, or "".

        Raises:
            NodeError: there cannot be a socket file, and an address of loopback requires keys.
        """
        endpoint, reason = choose_endpoint(folder)
        if reason and self.keys() is not None:
            raise NodeError(
                f"with keys, a cluster needs a socket file: {reason}; use another --run"
            )
        return replace(self, endpoint=endpoint), reason

    def bound(self, endpoints: Sequence[str]) -> Listening:
        """Return this with the broker's tcp endpoints, which have their real ports."""
        real = iter(endpoints)
        first, *others = [
            next(real) if each.startswith("tcp://") else each for each in self.endpoints
        ]
        return replace(self, endpoint=first, others=tuple(others))

    def lines(self) -> Iterator[str]:
        """Yield what the user of the cluster must know to start workers on other hosts."""
        if self.others:
            yield f"also listening on {', '.join(self.others)}"
            if (keys := self.keys()) is not None:
                yield from how_to_connect(keys, self.others)


def choose_endpoint(folder: Path) -> tuple[str, str]:
    """Return the endpoint of a cluster's broker, and why it is not a socket file.

    Args:
        folder: of the run.

    Returns:
        The endpoint: ``ipc://`` in a private folder, or else a free port of loopback, which other
        users of this host can reach, too; and the reason for that, or "".
    """
    place = Path(os.path.realpath(folder)) / SOCKET_FOLDER
    path = place / _SOCKET
    size = len(os.fsencode(path))
    if size > MAX_PATH_BYTES:
        return LOOPBACK, f"{path} has {size} bytes, a socket's path at most {MAX_PATH_BYTES}"
    try:
        make_private_folder(place)
        if reason := restrict(place):
            return LOOPBACK, reason
        _try_socket(place / _TRIAL)
    except OSError as error:
        return LOOPBACK, f"cannot make a socket in {place}: {reason_of(error)}"
    return f"ipc://{path}", ""


def remove_socket(folder: Path) -> None:
    """Remove the socket file that a killed broker has left, and its folder."""
    place = folder / SOCKET_FOLDER
    with contextlib.suppress(OSError):
        (place / _SOCKET).unlink(missing_ok=True)
        place.rmdir()


def _try_socket(path: Path) -> None:
    """Make a socket file: some file systems have none."""
    path.unlink(missing_ok=True)
    try:
        with socket.socket(socket.AF_UNIX) as trial:
            trial.bind(os.fsencode(path))
    finally:
        path.unlink(missing_ok=True)
