"""What a process finds around it: the current folder, and a place for short-lived files."""

from __future__ import annotations

import os
import tempfile
from multiprocessing import util
from pathlib import Path

from fedmq.nodes.errors import NodeError


def check_surroundings() -> None:
    """Refuse to begin where much of Python, and torch, would fail with a reason of its own.

    Raises:
        NodeError: the current folder is gone.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise NodeError(
            f"the current folder cannot be found ({error.strerror}); change to one that is there"
        ) from None


_SOCKET_BYTES = 107
"""The longest name of a socket that Linux takes."""
_MADE_BYTES = len("/pymp-12345678/listener-12345678")
"""What multiprocessing makes of a folder's name for its sockets."""
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - multiprocessing makes a private folder there


def place_sockets() -> None:
    """Let multiprocessing put its sockets where their names are not too long.

    Raises:
        NodeError: there is no such place.
    """
    try:
        chosen = tempfile.gettempdir()
    except OSError as error:
        raise NodeError(f"there is no folder for short-lived files: {error.strerror}") from None
    longest = _SOCKET_BYTES - _MADE_BYTES
    if len(os.fsencode(chosen)) > longest:
        short = next((each for each in _SHORT if os.access(each, os.W_OK | os.X_OK)), None)
        if short is None:
            raise NodeError(
                f"TMPDIR: expected a folder whose name has at most {longest} bytes, for sockets, "
                f"got one of {len(os.fsencode(chosen))}: {chosen}"
            )
        tempfile.tempdir = short
        try:
            util.get_temp_dir()  # it is kept from here on
        finally:
            tempfile.tempdir = chosen
