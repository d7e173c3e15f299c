"""Files and folders that only their owner can open: what brokers and nodes store.

A ledger holds models and results, a node's files its key and its clients' states.
"""

from __future__ import annotations

import contextlib
import os
import stat
from io import BufferedWriter
from pathlib import Path
from typing import Literal

FILE_MODE = 0o600
FOLDER_MODE = 0o700
_OTHERS = 0o077


def make_private_folder(folder: Path) -> None:
    """Create a folder and its missing parents, all for their owner alone.

    A folder that exists keeps its permissions.

    Raises:
        OSError: it cannot be created, or something else has its name.
    """
    try:
        folder.mkdir(FOLDER_MODE, exist_ok=True)
    except FileNotFoundError:
        if folder.parent == folder:
            raise
        make_private_folder(folder.parent)
        folder.mkdir(FOLDER_MODE, exist_ok=True)


def open_private(path: Path, mode: Literal["wb", "ab", "xb"]) -> BufferedWriter:
    """Open a file for writing; if it does not exist, create it for its owner alone.

    Raises:
        OSError: it cannot be opened.
    """
    return open(path, mode, opener=private_opener)


def private_opener(path: str, flags: int) -> int:
    """Open a file; if it does not exist, create it for its owner alone.

    For the ``opener`` of `open`.

    Raises:
        OSError: it cannot be opened.
    """
    return os.open(path, flags, FILE_MODE)


def write_private(path: Path, data: bytes) -> None:
    """Write a file; if it does not exist, create it for its owner alone.

    Raises:
        OSError: it cannot be written.
    """
    with open_private(path, "wb") as file:
        file.write(data)


def restrict(path: Path) -> str:
    """Take all permissions on a file or folder from other users than its owner.

    Returns:
        Why others still have some; "" if they have none.
    """
    try:
        mode = path.stat().st_mode
        if not mode & _OTHERS:
            return ""
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return ""  # a terminal or a pipe holds nothing
        with contextlib.suppress(OSError):
            path.chmod(stat.S_IMODE(mode) & ~_OTHERS)
        mode = path.stat().st_mode
    except OSError as error:
        return f"cannot read the permissions of {path}: {error.strerror}"
    if not mode & _OTHERS:
        return ""
    return f"{path} has the permissions {stat.S_IMODE(mode):04o}"


def restrict_folder(folder: Path) -> str:
    """Take all permissions on a folder and its files from other users than their owner.

    Returns:
        Why others can still read them; "" if they cannot.
    """
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        return f"cannot list {folder}: {error.strerror}"
    # Its files as well: the folder may be copied. Nobody else reaches them in a private folder.
    first, *_ = [restrict(each) for each in (folder, *inside)]
    return first
