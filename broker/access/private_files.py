"""Files that only their owner may read (0600, in a folder with 0700), and their replacement.

A file or folder that others may read or write, or that belongs to another user, is refused with
the command that mends it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pwd
import secrets
import shlex
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from fedmq.broker.errors import AccessError
from fedmq.broker.file_modes import FILE_MODE, FOLDER_MODE, make_private_folder
from fedmq.broker.open_files import open_file

_MOST_BYTES = 16 << 20
_PROBE_BYTES = 4096
_LOCK_WAIT_S = 2.0
"""Longest time to wait for another process that edits; an edit takes milliseconds."""
_RETRY_S = 0.005
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Errors of a file system without hard links, such as FAT or some network file systems."""


def make_key_folder(folder: Path) -> None:
    """Create a folder that only this user may open, or check an existing one.

    Raises:
        AccessError: it cannot be created, or others may open it.
    """
    try:
        make_private_folder(folder)
    except OSError as error:
        raise AccessError(f"cannot create the folder {folder}: {_text(error)}") from None
    check_private_folder(folder)


def check_private_folder(folder: Path) -> None:
    """Check that only this user may open a folder.

    Raises:
        AccessError: it does not exist, or others may open it.
    """
    try:
        found = folder.stat()
    except OSError as error:
        raise AccessError(f"cannot open the folder {folder}: {_text(error)}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise AccessError(f"expected a folder, got a file: {folder}")
    _check(folder, found)


def read_private(path: Path) -> tuple[bytes, os.stat_result]:
    """Read a private file.

    Returns (content, status of the file that was read).

    Raises:
        FileNotFoundError: there is no such file.
        AccessError: it cannot be read, or others may read or write it or its folder.
    """
    try:
        fd = open_file(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would block
    except FileNotFoundError:
        raise
    except OSError as error:
        raise AccessError(f"cannot read {path}: {_text(error)}") from None
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise AccessError(f"expected a file: {path}")
        _check(path, found)
        check_private_folder(path.parent)
        try:
            data = file.read(_MOST_BYTES + 1)
        except OSError as error:
            raise AccessError(f"cannot read {path}: {_text(error)}") from None
    if len(data) > _MOST_BYTES:
        raise AccessError(f"expected a file of at most {_MOST_BYTES >> 20} MiB: {path}")
    return data, found


def create_private(path: Path, data: bytes) -> None:
    """Write a new private file, and wait until it is on the device.

    Raises:
        FileExistsError: there is such a file; it is not changed.
        AccessError: it cannot be written.
    """
    fresh = _write_fresh(path, data)
    try:
        try:
            os.link(fresh, path)  # unlike a rename, a link replaces nothing
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _move(fresh, path)
        _sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise AccessError(f"cannot write {path}: {_text(error)}") from None
    finally:
        fresh.unlink(missing_ok=True)


def _move(fresh: Path, path: Path) -> None:
    """Rename a file to a new name where the file system has no hard links.

    Raises:
        FileExistsError: there is such a file.
        AccessError: see `locked`.
        OSError: it cannot be renamed.
    """
    with locked(path):
        if os.path.lexists(path):
            raise FileExistsError(path)
        fresh.rename(path)


def check_writable(path: Path) -> None:
    """Check that a private file could be written or replaced now; this changes nothing.

    Raises:
        AccessError: it could not.
    """
    with locked(path):
        _write_fresh(path, bytes(_PROBE_BYTES)).unlink()


def replace_private(path: Path, data: bytes) -> None:
    """Replace a private file, and wait until it is on the device.

    A process that ends at any point leaves the old file or the new one. The caller holds `locked`.

    Raises:
        AccessError: it cannot be written; the old file is unchanged, unless only its folder could
            not be synced.
    """
    fresh = _write_fresh(path, data)
    try:
        fresh.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise AccessError(f"cannot write {path}: {_text(error)}") from None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file that several processes edit; the lock is a file beside it.

    Raises:
        AccessError: another process holds it for seconds, or it cannot be opened.
    """
    lock = path.with_name(f"{path.name}.lock")
    try:
        fd = open_file(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
    except OSError as error:
        raise AccessError(f"cannot open {lock}: {_text(error)}") from None
    try:
        _lock(fd, lock)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, path: Path) -> None:
    until = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                text = f"another process has been holding {path} for {_LOCK_WAIT_S:g} s"
                raise AccessError(text) from None
            time.sleep(_RETRY_S)
        except OSError as error:
            raise AccessError(f"cannot lock {path}: {_text(error)}") from None
        else:
            return


def _write_fresh(path: Path, data: bytes) -> Path:
    """Write and sync a temporary file beside a path; only this user may read it."""
    # Not the process's id: containers that share a home folder share those.
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    try:
        fd = open_file(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
    except OSError as error:
        raise AccessError(f"cannot write {path}: {_text(error)}") from None
    return fresh


def _sync_folder(folder: Path) -> None:
    fd = open_file(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check(path: Path, found: os.stat_result) -> None:
    """Raise AccessError unless a file or folder belongs to this user and nobody else may use it."""
    name, mode = shlex.quote(str(path)), stat.S_IMODE(found.st_mode)
    if found.st_uid != os.geteuid():
        raise AccessError(
            f"{path} belongs to {_user(found.st_uid)}, expected {_user(os.geteuid())}: run "
            f"`sudo chown {os.geteuid()} {name}`, or choose another folder with --keys DIR"
        )
    if mode & 0o077:
        wanted = FOLDER_MODE if stat.S_ISDIR(found.st_mode) else FILE_MODE
        raise AccessError(
            f"other users may open {path}: expected mode {wanted:04o}, got {mode:04o}: run "
            f"`chmod {wanted:o} {name}`"
        )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _text(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
