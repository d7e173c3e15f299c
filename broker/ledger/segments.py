"""Open files of payload segments, for reading: the ones used last stay open."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fedmq.broker.errors import io_error
from fedmq.broker.ledger.entries import PAYLOAD, segment_path


class SegmentFiles:
    """The payload segments of a folder, opened as they are asked for.

    Args:
        folder: of the ledger.
        limit: how many stay open.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._fds: dict[int, int] = {}

    def fd(self, segment: int) -> int:
        """Return a segment's file descriptor.

        Raises:
            LedgerError: it cannot be opened.
        """
        if segment not in self._fds:
            if len(self._fds) >= self._limit:
                self.close(next(iter(self._fds)))
            path = segment_path(self._folder, PAYLOAD, segment)
            try:
                self._fds[segment] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise io_error("cannot open", error, path.name) from None
        return self._fds[segment]

    def close(self, segment: int) -> None:
        """Close one, if it is open."""
        fd = self._fds.pop(segment, None)
        if fd is not None:
            with contextlib.suppress(OSError):  # nothing was written to it
                os.close(fd)

    def close_all(self) -> None:
        """Close all of them."""
        for segment in list(self._fds):
            self.close(segment)
