"""The file operations of a ledger, behind an interface that tests replace with a failing disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol

from fedmq.broker.file_modes import FILE_MODE, make_private_folder
from fedmq.broker.open_files import open_file
from fedmq.broker.wire.schema import Buffer

APPEND = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
"""Flags of a file that is appended to, and created if it does not exist."""
UPDATE = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
"""Flags of a file whose content is replaced, and that is created if it does not exist."""
REWRITE = os.O_RDWR | os.O_CLOEXEC
"""Flags of an existing file that is written at given offsets."""
READ = os.O_RDONLY | os.O_CLOEXEC

_READ_AHEAD = 1 << 16
_MOST_BUFFERS = 512
_evictions = ThreadPoolExecutor(1, thread_name_prefix="page-cache")


class Disk(Protocol):
    """What a ledger does with files. Each operation raises OSError, as those of `os` do."""

    def open(self, path: Path, flags: int) -> int:
        """Open a file, and return its descriptor; a new file is its owner's alone."""

    def close(self, fd: int) -> None:
        """Close a descriptor."""

    def writev(self, fd: int, buffers: Sequence[Buffer]) -> int:
        """Append buffers; return the number of bytes that were written, perhaps not all."""

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        """Write at an offset; return the number of bytes that were written, perhaps not all."""

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """Return up to ``size`` bytes from an offset on."""

    def size(self, fd: int) -> int:
        """Return the size of an open file in bytes."""

    def truncate(self, fd: int, size: int) -> None:
        """Cut an open file at ``size`` bytes."""

    def sync(self, fd: int) -> None:
        """Wait until the data of a file, or the names in a folder, are on the device."""

    def evict(self, fd: int) -> None:
        """Start writing the file to the device, and drop its written pages from the page cache.

        Raises RuntimeError as well, if no thread is available.
        """

    def reader(self, path: Path) -> BinaryIO:
        """Open a file for reading from its start to its end."""

    def names(self, folder: Path) -> list[str]:
        """Return the names in a folder, in any order."""

    def size_of(self, path: Path) -> int:
        """Return the size of a file in bytes."""

    def make_folder(self, folder: Path) -> None:
        """Create a folder with its parents, if they do not exist, for their owner alone."""

    def unlink(self, path: Path) -> None:
        """Delete a file, if it exists."""


class LocalDisk:
    """The operating system's files."""

    def open(self, path: Path, flags: int) -> int:
        """See `Disk`."""
        return open_file(path, flags, FILE_MODE)

    def close(self, fd: int) -> None:
        """See `Disk`."""
        os.close(fd)

    def writev(self, fd: int, buffers: Sequence[Buffer]) -> int:
        """See `Disk`."""
        return os.writev(fd, buffers)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        """See `Disk`."""
        return os.pwrite(fd, data, offset)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """See `Disk`."""
        return os.pread(fd, size, offset)

    def size(self, fd: int) -> int:
        """See `Disk`."""
        return os.fstat(fd).st_size

    def truncate(self, fd: int, size: int) -> None:
        """See `Disk`."""
        os.ftruncate(fd, size)

    def sync(self, fd: int) -> None:
        """See `Disk`."""
        os.fsync(fd)

    def evict(self, fd: int) -> None:
        """See `Disk`.

        Called when a segment is full, and again some segments later. So the cache holds the newest
        payload, and its pages are reused: on a virtual machine, writing to new pages took 3.2 ms a
        MiB, to reused ones 0.5 ms. It takes about 20 ms for a segment, so a thread of its own does
        it.
        """
        if hasattr(os, "posix_fadvise"):
            own = os.dup(fd)
            try:
                _evictions.submit(_advise, own)
            except RuntimeError:
                os.close(own)
                raise

    def reader(self, path: Path) -> BinaryIO:
        """See `Disk`."""
        return path.open("rb", buffering=_READ_AHEAD)

    def names(self, folder: Path) -> list[str]:
        """See `Disk`."""
        with os.scandir(folder) as found:
            return [each.name for each in found]

    def size_of(self, path: Path) -> int:
        """See `Disk`."""
        return path.stat().st_size

    def make_folder(self, folder: Path) -> None:
        """See `Disk`."""
        make_private_folder(folder)

    def unlink(self, path: Path) -> None:
        """See `Disk`."""
        path.unlink(missing_ok=True)


LOCAL_DISK: Disk = LocalDisk()


def _advise(fd: int) -> None:
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def append_all(disk: Disk, fd: int, buffers: Sequence[Buffer]) -> int:
    """Append all of these buffers; return their total size in bytes.

    Raises:
        OSError: a write failed; any part of the buffers may be in the file.
    """
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    total = 0
    while views:
        written = disk.writev(fd, views[:_MOST_BUFFERS])
        total += written
        while views and written >= views[0].nbytes:
            written -= views.pop(0).nbytes
        if written:
            views[0] = views[0][written:]
    return total
