"""Where the nodes of a local cluster meet: a socket file in a folder that only its owner can open.

So another user of the same host is a stranger, and the cluster needs no keys.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from fedmq.broker.file_modes import make_private_folder, restrict
from fedmq.broker.wire.endpoints import MAX_PATH_BYTES
from fedmq.nodes.process.exception_text import reason_of

SOCKET_FOLDER = "socket"
"""In the folder of the run. The broker makes the socket file there and deletes it at its end."""
_SOCKET = "broker"
_TRIAL = "trial"
LOOPBACK = "tcp://127.0.0.1:0"


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
