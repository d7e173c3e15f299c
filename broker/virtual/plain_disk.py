"""A disk without faults for a virtual broker: the real files, closed when its process ends."""

from __future__ import annotations

import os
from pathlib import Path

from fedmq.broker.ledger.disk import LocalDisk


class PlainDisk(LocalDisk):
    """The machine's disk; see `Disk`."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def open(self, path: Path, flags: int) -> int:
        """See `Disk`."""
        fd = super().open(path, flags)
        self._open.add(fd)
        return fd

    def close(self, fd: int) -> None:
        """See `Disk`."""
        self._open.discard(fd)
        super().close(fd)

    def die(self) -> None:
        """End the process: its files are closed, all that it wrote stays."""
        for fd in self._open:
            os.close(fd)
        self._open.clear()
