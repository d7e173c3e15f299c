"""Limit the payload of a ledger: the size of its segments, and the deletion of old ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedmq.broker.errors import io_error
from fedmq.broker.ledger.disk import LOCAL_DISK, Disk
from fedmq.broker.ledger.entries import PAYLOAD, segment_numbers, segment_path
from fedmq.broker.ledger.records import MAGIC
from fedmq.broker.settings import HEADERS, LEAST_SEGMENT_BYTES, RETAINED_SEGMENTS, Retained


class RetentionPolicy:
    """Keeps a folder's payload below a limit.

    Args:
        folder: of the ledger.
        limit: most bytes of payload; 0 keeps what unfinished messages need, `EVERYTHING` all;
            `HEADERS` keeps what 0 does, in small segments.
        disk: holds the folder.

    Attributes:
        must_delete: whether a run has ended, perhaps before a crash, whose payload has to go.
    """

    def __init__(self, folder: Path, limit: Retained, disk: Disk = LOCAL_DISK) -> None:
        self._folder, self._disk = folder, disk
        self._headers_only = limit == HEADERS
        self._limit = 0 if isinstance(limit, str) else limit
        self.must_delete = self._headers_only

    def segment_bytes(self, largest: int) -> int:
        """Return the size of a full segment: ``largest``, or less for a small limit."""
        if self.must_delete:
            return len(MAGIC)  # close the segment being filled: only others can be deleted
        if self._headers_only:
            return min(largest, LEAST_SEGMENT_BYTES)
        if not self._limit:
            return largest
        return min(largest, max(self._limit // RETAINED_SEGMENTS, LEAST_SEGMENT_BYTES))

    def end_run(self) -> None:
        """Note that a run has ended."""
        self.must_delete = self._headers_only

    def apply(self, is_needed: Callable[[int], bool], remove: Callable[[int], bool]) -> None:
        """Delete the oldest full segments until another one fits the limit.

        Args:
            is_needed: whether an unfinished message needs a segment, by its number.
            remove: deletes a segment by its number; returns whether there was space for its note.

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
        lacks_space = False
        for number in numbers[:-1]:
            if total + next_size <= self._limit:
                break
            if is_needed(number):
                continue
            if remove(number):
                total -= sizes[number]
            else:
                lacks_space = True
        self.must_delete = self._headers_only and lacks_space

    def _size(self, number: int) -> int:
        path = segment_path(self._folder, PAYLOAD, number)
        try:
            return self._disk.size_of(path)
        except OSError as error:
            raise io_error("cannot read", error, path.name) from None
