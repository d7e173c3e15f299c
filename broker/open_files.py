"""The limit of open files, and a part of it that connections cannot use.

libzmq accepts connections until the limit is reached; then a broker could not open its next file.
So the limit that applies is a little lower than the process may set, and is raised only while a
file is opened that the broker needs.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator

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


@contextlib.contextmanager
def use_reserve() -> Iterator[None]:
    """Let this process open files up to the hard limit, for a moment."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == most:
        yield
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


def files_left(reserved: int) -> int:
    """Return the number of files that can be opened without touching the reserve.

    It takes time in proportion to the number of open files.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        return _UNLIMITED
    with use_reserve(), os.scandir(_OPEN) as found:
        used = sum(1 for _ in found)
    return most - _capped(reserved, most) - used


def _capped(reserved: int, most: int) -> int:
    return min(reserved, most // _PART)
