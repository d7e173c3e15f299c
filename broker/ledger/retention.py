"""Limit the payload of a ledger: the size of its segments, and the deletion of old ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedmq.broker.errors import io_error
from fedmq.broker.ledger.disk import LOCAL_DISK, Disk
from fedmq.broker.ledger.entries import PAYLOAD, segment_numbers, segment_path
from fedmq.broker.settings import LEAST_SEGMENT_BYTES, RETAINED_SEGMENTS


class RetentionPolicy:
    """Keeps a folder's payload below a limit.

    Args:
        folder: of the ledger.
        limit: most bytes of payload; 0 keeps what unfinished messages need, `EVERYTHING` all.
        disk: holds the folder.
    """

    def __init__(self, folder: Path, limit: int | None, disk: Disk = LOCAL_DISK) -> None:
        self._folder, self._limit, self._disk = folder, limit, disk

    def segment_bytes(self, largest: int) -> int:
        """Return the size of a full segment: ``largest``, or less for a small limit."""
        if not self._limit:
            return largest
        return min(largest, max(self._limit // RETAINED_SEGMENTS, LEAST_SEGMENT_BYTES))

    def apply(self, remove: Callable[[int], bool]) -> None:
        """Delete the oldest full segments until another one fits the limit.

        Args:
            remove: deletes a segment by its number, unless it is needed; returns whether it did.

        Raises:
            LedgerError: the folder cannot be read, or a segment cannot be deleted.
        """
        if self._limit is None:
            return
        numbers = segment_numbers(self._folder, PAYLOAD, self._disk)
        sizes = {number: self._size(number) for number in numbers}
        total = sum(sizes.values())
        # The new segment will become as large as the one before it.
        next_size = sizes[numbers[-2]] if len(numbers) > 1 else 0
        for number in numbers[:-1]:
            if total + next_size <= self._limit:
                return
            if remove(number):
                total -= sizes[number]

    def _size(self, number: int) -> int:
        path = segment_path(self._folder, PAYLOAD, number)
        try:
            return self._disk.size_of(path)
        except OSError as error:
            raise io_error("cannot read", error, path.name) from None
