"""Open payload segments for reading, and keep some of them open."""

from __future__ import annotations

import contextlib
from pathlib import Path

from fedmq.broker.errors import io_error
from fedmq.broker.ledger.disk import LOCAL_DISK, READ, Disk
from fedmq.broker.ledger.entries import PAYLOAD, segment_path


class SegmentFiles:
    """The payload segments of a folder, opened on demand.

    Args:
        folder: of the ledger.
        limit: most open files; the one opened first is closed first.
        disk: holds the folder.
    """

    def __init__(self, folder: Path, limit: int, disk: Disk = LOCAL_DISK) -> None:
        self._folder, self._limit, self._disk = folder, limit, disk
        self._fds: dict[int, int] = {}

    def fd(self, segment: int) -> int:
        """Return a segment's file descriptor.

        Raises:
            LedgerError: the file cannot be opened.
        """
        if segment not in self._fds:
            if len(self._fds) >= self._limit:
                self.close(next(iter(self._fds)))
            path = segment_path(self._folder, PAYLOAD, segment)
            try:
                self._fds[segment] = self._disk.open(path, READ)
            except OSError as error:
                raise io_error("cannot open", error, path.name) from None
        return self._fds[segment]

    def close(self, segment: int) -> None:
        """Close a segment if it is open."""
        fd = self._fds.pop(segment, None)
        if fd is not None:
            with contextlib.suppress(OSError):  # nothing was written
                self._disk.close(fd)

    def close_all(self) -> None:
        """Close all segments."""
        for segment in list(self._fds):
            self.close(segment)
