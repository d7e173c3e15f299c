"""The lock of a ledger's folder: only one broker writes there at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import secrets
import socket
from pathlib import Path

from fedmq.broker.errors import LedgerError
from fedmq.broker.ledger.disk import LOCAL_DISK, UPDATE, Disk

LOCK_FILE = "lock"
"""Locked by the broker that writes to the folder. The first line is a proof, by which nodes
recognise the folder; the second line names the broker's process."""

_BYTES = 4096
"""Most bytes of the file that are read."""


class FolderLock:
    """Holds the lock of a folder until `release`.

    Attributes:
        proof: random text that was written to `LOCK_FILE`; empty if that failed.

    Raises:
        LedgerError: another process holds the lock, or the file cannot be opened or locked.
    """

    def __init__(self, folder: Path, disk: Disk = LOCAL_DISK) -> None:
        self._disk = disk
        path = folder / LOCK_FILE
        try:
            self._fd = disk.open(path, UPDATE)
        except OSError as error:
            raise LedgerError(f"cannot open {path}: {error.strerror}{_owner(path)}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(self._fd, disk)
            self.release()
            raise LedgerError(f"another broker{holder} is writing to {folder}") from None
        except OSError as error:
            self.release()
            raise LedgerError(f"cannot lock {path}: {error.strerror}") from None
        self.proof = self._write_proof()

    def release(self) -> None:
        """Release the lock."""
        with contextlib.suppress(OSError):  # the lock file has no content that matters any more
            self._disk.close(self._fd)

    def _write_proof(self) -> str:
        """Write a random text that proves to its readers that they see this folder."""
        proof = secrets.token_hex(16)
        text = f"{proof}\n{os.getpid()} {socket.gethostname()}\n"
        try:
            self._disk.truncate(self._fd, 0)
            self._disk.pwrite(self._fd, text.encode(errors="replace"), 0)
        except OSError:
            return ""
        return proof


def proof_in(folder: Path) -> str:
    """Return the proof in a folder; "" if it cannot be read."""
    try:
        # Opening a pipe, for example, could block for ever.
        if not (folder / LOCK_FILE).is_file():
            return ""
        return (folder / LOCK_FILE).read_text().partition("\n")[0]
    except (OSError, ValueError):
        return ""


def _holder(fd: int, disk: Disk) -> str:
    """Return the process that the lock file names, for an error; "" if it names none."""
    try:
        lines = disk.pread(fd, _BYTES, 0).decode().splitlines()
    except (OSError, ValueError):
        return ""
    match lines[1].split() if len(lines) > 1 else []:
        case [pid, host] if pid.isdecimal():
            return f" (process {pid} on {host})"
    return ""


def _owner(path: Path) -> str:
    """Return the owner of another user's file, for an error; "" for a file of this user."""
    try:
        owner = path.stat().st_uid
    except OSError:
        return ""
    if owner == os.geteuid():
        return ""
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = f"uid {owner}"
    return f" (it belongs to {name})"
