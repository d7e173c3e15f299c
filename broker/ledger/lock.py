"""The lock of a ledger's folder: one broker writes there at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import secrets
import socket
from pathlib import Path

from fedmq.broker.errors import LedgerError

LOCK_FILE = "lock"
"""Locked by the broker that writes here. Its first line is a proof of its place, its second
says which process that is."""

_BYTES = 4096
"""Of the file, at most, that are read."""


class FolderLock:
    """Holds the lock of a folder from now on, until `release`.

    Attributes:
        proof: drawn for this writer, and written into `LOCK_FILE`; empty if it could not be.

    Raises:
        LedgerError: another process holds it, or the operating system refused; which, it says.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK_FILE
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except PermissionError as error:
            raise LedgerError(f"cannot open {path}: {error.strerror}{_owner(path)}") from None
        except OSError as error:
            raise LedgerError(f"cannot open {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(self._fd)
            os.close(self._fd)
            raise LedgerError(f"another broker{holder} is writing to {folder}") from None
        except OSError as error:
            os.close(self._fd)
            raise LedgerError(f"cannot lock {path}: {error.strerror}") from None
        self.proof = self._leave_proof()

    def release(self) -> None:
        """Let others write here."""
        with contextlib.suppress(OSError):  # what was written there is of no use any more
            os.close(self._fd)

    def _leave_proof(self) -> str:
        """Write down a secret that whoever sees it in this folder sees this ledger."""
        proof = secrets.token_hex(16)
        text = f"{proof}\n{os.getpid()} {socket.gethostname()}\n"
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, text.encode(errors="replace"), 0)
        except OSError:
            return ""
        return proof


def proof_in(folder: Path) -> str:
    """Return the proof that stands in a folder; "" if there is none to be seen."""
    try:
        # What is no file, such as a pipe, might have a reader wait for ever.
        if not (folder / LOCK_FILE).is_file():
            return ""
        return (folder / LOCK_FILE).read_text().partition("\n")[0]
    except (OSError, ValueError):
        return ""


def _holder(fd: int) -> str:
    """Return which process says that it holds the lock, as a part of a sentence."""
    try:
        lines = os.pread(fd, _BYTES, 0).decode().splitlines()
    except (OSError, ValueError):
        return ""
    match lines[1].split() if len(lines) > 1 else []:
        case [pid, host] if pid.isdecimal():
            return f" (process {pid} on {host})"
    return ""


def _owner(path: Path) -> str:
    """Return whose file another user's is, as a part of a sentence."""
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
