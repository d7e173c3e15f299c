"""The environment of a process: the current folder, and one for temporary files."""

from __future__ import annotations

import os
import tempfile
from multiprocessing import util
from pathlib import Path

from fedmq.nodes.errors import NodeError


def check_surroundings() -> None:
    """Check that the current folder exists; without it, Python and torch fail in obscure ways.

    Raises:
        NodeError: the current folder was deleted.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise NodeError(
            f"cannot find the current folder: {error.strerror}; change to one that exists"
        ) from None


_SOCKET_BYTES = 107
"""The longest path of a socket on Linux, in bytes."""
_MADE_BYTES = len("/pymp-12345678/listener-12345678")
"""Bytes that multiprocessing appends to a folder's path for its sockets."""
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - multiprocessing makes a private folder there


def place_sockets() -> None:
    """Make multiprocessing create its sockets in a folder whose path is short enough.

    Raises:
        NodeError: there is no such folder.
    """
    try:
        chosen = tempfile.gettempdir()
    except OSError as error:
        raise NodeError(f"cannot find a folder for temporary files: {error.strerror}") from None
    longest = _SOCKET_BYTES - _MADE_BYTES
    if len(os.fsencode(chosen)) > longest:
        short = next((each for each in _SHORT if os.access(each, os.W_OK | os.X_OK)), None)
        if short is None:
            raise NodeError(
                f"TMPDIR: expected a path of at most {longest} bytes, to create sockets in, "
                f"got {len(os.fsencode(chosen))} bytes: {chosen}"
            )
        tempfile.tempdir = short
        try:
            util.get_temp_dir()  # multiprocessing uses this folder from now on
        finally:
            tempfile.tempdir = chosen
