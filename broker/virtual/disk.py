"""A disk that fails: writes are lost or torn at a power failure, and operations return errors.

The files are real, and hold what the operating system would show: all that was written. Beside
them, `VirtualDisk` keeps what each file has on the device, and the changes since its last sync. At
a power failure, each page of a file, its size and its name fall back to any moment since that sync,
each on its own. So a page may be kept, lost or zero, a file may have grown without its data, a new
name may be gone, and a deleted file or the end of a truncated one may return.

A failed sync is reported once, as by Linux: the pages count as written from then on, although the
device may not have them, and later syncs of them succeed.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import Any, BinaryIO

from fedmq.broker.ledger.disk import LOCAL_DISK
from fedmq.broker.wire.schema import Buffer

PAGE_BYTES = 512
"""The device writes a page as a whole, or not at all."""


class Crash(BaseException):
    """The process ends here: the driver of the virtual world catches it, nothing else does."""


class DiskFault(StrEnum):
    """What can go wrong in one operation."""

    WRITE_ERROR = "EIO on write"
    SHORT_WRITE = "short write"
    NO_SPACE = "ENOSPC"
    SYNC_ERROR = "EIO on sync"
    TRUNCATE_ERROR = "EIO on truncate"
    CLOSE_ERROR = "EIO on close"
    UNLINK_ERROR = "EIO on unlink"
    READ_ERROR = "EIO on read"
    FLIPPED_BIT = "flipped bit"


@dataclass
class _Change:
    """A write at an offset, or (``data`` is None) a change of the size to ``offset``."""

    offset: int
    data: bytes | None


@dataclass(eq=False)
class _VirtualFile:
    """A file: what the device has, and the changes since the last sync, in order."""

    device: bytearray = field(default_factory=bytearray)
    size: int = 0
    changes: list[_Change] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        self.changes.append(_Change(offset, data))
        self.size = max(self.size, offset + len(data))

    def truncate(self, size: int) -> None:
        self.changes.append(_Change(size, None))
        self.size = size

    def sync(self) -> None:
        """Let the device have all changes."""
        count = len(self.changes)
        self.settle(lambda: count)

    def _extend(self, size: int) -> None:
        """Append zeros up to a size."""
        self.device.extend(bytes(max(0, size - len(self.device))))

    def settle(self, moment: Callable[[], int]) -> None:
        """Let the device have each page, and the size, as of a moment of its own.

        moment: returns a number of changes; it is called once for each page, and for the size.
        """
        size = self._size_after(moment())
        content = self.device
        moments: dict[int, int] = {}
        for index, change in enumerate(self.changes):
            start = change.offset
            end = len(content) if change.data is None else start + len(change.data)
            self._extend(end)
            for page in range(start // PAGE_BYTES, -(-end // PAGE_BYTES)):
                if page not in moments:
                    moments[page] = moment()
                if index < moments[page]:
                    low = max(start, page * PAGE_BYTES)
                    high = min(end, (page + 1) * PAGE_BYTES)
                    piece = change.data and change.data[low - start : high - start]
                    content[low:high] = piece or bytes(high - low)
        del content[size:]
        self._extend(size)
        self.changes.clear()

    def _size_after(self, count: int) -> int:
        size = len(self.device)
        for change in self.changes[:count]:
            end = change.offset + len(change.data or b"")
            size = end if change.data is None else max(size, end)
        return size


class VirtualDisk:
    """A disk over the real files of a folder, whose faults are drawn or planned; see `Disk`.

    Files that exist already are on the device.

    Args:
        rng: for the faults.

    Attributes:
        rates: probability of each fault, in each operation that it can hit.
        full: whether there is no space for larger files and new ones.
        operations: number of operations so far that change files or wait for the device.
        met: number of operations so far that each fault could have hit.
        made: number of faults made, by kind.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self.rates: dict[DiskFault, float] = {}
        self.full = False
        self.operations = 0
        self.met: Counter[DiskFault] = Counter()
        self.made: Counter[str] = Counter()
        self._crash_at = -1
        self._planned: set[tuple[DiskFault, int]] = set()
        self._dead = self._flipped = False
        self._names: dict[Path, list[_VirtualFile | None]] = {}
        """For each path, its files since the last sync of its folder: first the one on the device,
        last the present one."""
        self._open: dict[int, _VirtualFile] = {}
        self._folders: dict[int, Path] = {}

    # ---- faults

    def crash_at(self, operation: int) -> None:
        """Raise `Crash` in the middle of an operation, counted from 0."""
        self._crash_at = operation

    def fail_at(self, fault: DiskFault, occasion: int) -> None:
        """Make a fault at the given one, counted from 0, of the operations that it can hit."""
        self._planned.add((fault, occasion))

    def die(self) -> None:
        """End the process: its files are closed, all that it wrote stays."""
        for fd in (*self._open, *self._folders):
            os.close(fd)
        self._open.clear()
        self._folders.clear()
        self._dead, self._crash_at = False, -1

    def lose_power(self) -> None:
        """End the process, and leave in the files what a power failure may leave."""
        self.die()
        self.made["power failure"] += 1
        for path, states in self._names.items():
            found = self._rng.choice(states)
            if found is None:
                path.unlink(missing_ok=True)
            else:
                found.settle(self._moments(len(found.changes)))
                path.write_bytes(found.device)
                found.size = len(found.device)
            self._names[path] = [found]

    def _moments(self, changes: int) -> Callable[[], int]:
        """Return what draws moments: often the same for a whole file."""
        draw = self._rng.random()
        if draw < 0.2:
            return lambda: 0
        if draw < 0.4:
            return lambda: changes
        if draw < 0.6:
            moment = self._rng.randint(0, changes)
            return lambda: moment
        return lambda: self._rng.choice((0, changes, self._rng.randint(0, changes)))

    def _hits(self, fault: DiskFault) -> bool:
        occasion = self.met[fault]
        self.met[fault] = occasion + 1
        rate = self.rates.get(fault)
        hits = bool(rate and self._rng.random() < rate) or (fault, occasion) in self._planned
        self.made[fault] += hits
        return hits

    def _lacks_space(self) -> bool:
        self.made["disk full"] += self.full
        return self.full or self._hits(DiskFault.NO_SPACE)

    def _check_alive(self) -> None:
        if self._dead:
            raise Crash

    def _step(self) -> bool:
        """Count an operation; return whether the process crashes in it."""
        self._check_alive()
        self.operations += 1
        self._dead = self.operations - 1 == self._crash_at
        self.made["broker killed in a disk operation"] += self._dead
        return self._dead

    def _happens(self, *, crashes: bool) -> bool:
        """Return whether an operation has its effect: one that crashes may have it."""
        return not crashes or self._rng.random() < 0.5

    # ---- the operations of `Disk`

    def open(self, path: Path, flags: int) -> int:
        """See `Disk`."""
        creates = bool(flags & os.O_CREAT) and not path.exists()
        self._check_alive()
        crashes = creates and self._step()
        if creates and self._lacks_space():
            raise _error(errno.ENOSPC)
        if not self._happens(crashes=crashes):
            raise Crash
        fd = LOCAL_DISK.open(path, flags)
        if creates:
            self._open[fd] = _VirtualFile()
            self._names.setdefault(path, [None]).append(self._open[fd])
        elif stat.S_ISDIR(os.fstat(fd).st_mode):
            self._folders[fd] = path
        else:
            self._open[fd] = self._file(path)
        if crashes:
            raise Crash
        return fd

    def _file(self, path: Path) -> _VirtualFile:
        """Return the present file at a path; one that was never opened is on the device."""
        if path not in self._names:
            content = bytearray(path.read_bytes())
            self._names[path] = [_VirtualFile(content, len(content))]
        found = self._names[path][-1]
        if found is None:
            raise _error(errno.ENOENT)
        return found

    def close(self, fd: int) -> None:
        """See `Disk`."""
        if self._folders.pop(fd, None) or self._open.pop(fd, None):
            os.close(fd)
            if not self._dead and self._hits(DiskFault.CLOSE_ERROR):
                raise _error(errno.EIO)

    def writev(self, fd: int, buffers: Sequence[Buffer]) -> int:
        """See `Disk`."""
        file = self._opened(fd)
        return self._write(fd, file, b"".join(buffers), file.size)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        """See `Disk`."""
        return self._write(fd, self._opened(fd), bytes(data), offset)

    def _write(self, fd: int, file: _VirtualFile, data: bytes, offset: int) -> int:
        crashes, end = self._step(), offset + len(data)
        # Bytes that replace others need no space, and within a page they are written together.
        whole = end <= file.size and offset // PAGE_BYTES == (end - 1) // PAGE_BYTES
        no_space = end > file.size and self._lacks_space()
        fails = self._hits(DiskFault.WRITE_ERROR)
        if whole:
            data = data if not fails and self._happens(crashes=crashes) else b""
        elif crashes or no_space or fails or (len(data) > 1 and self._hits(DiskFault.SHORT_WRITE)):
            data = data[: self._rng.randint(0 if crashes or no_space or fails else 1, len(data))]
        if data:
            if file.size == offset:
                os.write(fd, data)
            else:
                os.pwrite(fd, data, offset)
            file.write(offset, data)
        if crashes:
            raise Crash
        if no_space or fails:
            raise _error(errno.ENOSPC if no_space else errno.EIO)
        return len(data)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """See `Disk`."""
        return self._read(os.pread(fd, size, offset))

    def _read(self, data: bytes) -> bytes:
        self._check_alive()
        if self._hits(DiskFault.READ_ERROR):
            raise _error(errno.EIO)
        self._flipped = not self._flipped and bool(data) and self._hits(DiskFault.FLIPPED_BIT)
        if self._flipped:  # transient: the next read has no flipped bit
            flipped = bytearray(data)
            flipped[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
            return bytes(flipped)
        return data

    def size(self, fd: int) -> int:
        """See `Disk`."""
        return self._opened(fd).size

    def truncate(self, fd: int, size: int) -> None:
        """See `Disk`."""
        file = self._opened(fd)
        crashes = self._step()
        if self._hits(DiskFault.TRUNCATE_ERROR):
            raise _error(errno.EIO)

        if self._happens(crashes=crashes):
            os.ftruncate(fd, size)
            file.truncate(size)
        if crashes:
            raise Crash

    def sync(self, fd: int) -> None:
        """See `Disk`."""
        crashes, fails = self._step(), self._hits(DiskFault.SYNC_ERROR)
        file = self._open.get(fd)
        if fails and file is not None:
            kept = (0, len(file.changes))
            file.settle(lambda: self._rng.choice(kept))
        if fails:
            raise _error(errno.EIO)
        if crashes:
            raise Crash
        if file is not None:
            file.sync()
        else:
            for path, states in self._names.items():
                if path.parent == self._folders[fd]:
                    del states[:-1]

    def evict(self, fd: int) -> None:
        """See `Disk`; the page cache is the operating system's."""

    def reader(self, path: Path) -> BinaryIO:
        """See `Disk`."""
        self._check_alive()
        return io.BufferedReader(_Reader(path, self._read), 1 << 16)

    def names(self, folder: Path) -> list[str]:
        """See `Disk`."""
        return LOCAL_DISK.names(folder)

    def size_of(self, path: Path) -> int:
        """See `Disk`."""
        return LOCAL_DISK.size_of(path)

    def make_folder(self, folder: Path) -> None:
        """See `Disk`."""
        LOCAL_DISK.make_folder(folder)

    def unlink(self, path: Path) -> None:
        """See `Disk`."""
        crashes = self._step()
        if self._hits(DiskFault.UNLINK_ERROR):
            raise _error(errno.EIO)

        if path.exists() and self._happens(crashes=crashes):
            self._file(path)
            self._names[path].append(None)
            LOCAL_DISK.unlink(path)
        if crashes:
            raise Crash

    def _opened(self, fd: int) -> _VirtualFile:
        self._check_alive()
        return self._open[fd]


class _Reader(io.FileIO):
    """A file whose reads pass through ``change``."""

    def __init__(self, path: Path, change: Callable[[bytes], bytes]) -> None:
        super().__init__(path)
        self._change = change

    def readinto(self, buffer: Any) -> int:
        data = self._change(super().read(memoryview(buffer).nbytes))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._change(super().readall())


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
