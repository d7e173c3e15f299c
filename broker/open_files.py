"""The limit of open files, and a part of it that connections cannot use.

libzmq accepts connections until the limit is reached; then a broker could not open its next file.
So the limit that applies is a little lower than the process may set, and is raised for the moment
in which the broker opens a file of its own. (libzmq can accept one connection in that moment.)
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

_OPEN = "/dev/fd"
_UNLIMITED = 1 << 30
_PART = 4
"""Where few files are allowed, at most this part of them is reserved."""


def reserve_files(number: int) -> None:
    """Set the limit of open files to the hard limit, less half of the reserve.

    Does nothing if the system does not allow it.

    Args:
        number: of files in the reserve.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY:
        with contextlib.suppress(ValueError, OSError):  # some refuse their own hard limit
            limit = most - _capped(number, most) // 2
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


def open_file(path: Path, flags: int, mode: int = 0o600) -> int:
    """Open a file as `os.open` does, with the reserve if connections have taken all other files.

    Raises:
        OSError: it cannot be opened.
    """
    try:
        return os.open(path, flags, mode)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    with _whole_limit():
        return os.open(path, flags, mode)


def files_left(reserved: int) -> int:
    """Return the number of files that can be opened without touching the reserve.

    It takes time in proportion to the number of open files.

    Raises:
        OSError: the open files cannot be counted: there are too many.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        return _UNLIMITED
    with os.scandir(_OPEN) as found:
        used = sum(1 for _ in found)
    return most - _capped(reserved, most) - used


def _capped(reserved: int, most: int) -> int:
    return min(reserved, most // _PART)


@contextlib.contextmanager
def _whole_limit() -> Iterator[None]:
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
