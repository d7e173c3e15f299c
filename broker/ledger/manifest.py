"""List the segments that a ledger's folder should hold, to detect missing ones.

A text file beside the segments has a line for each segment that was begun (``+ payload 3``) or that
the retention policy deleted (``- payload 3``). Older ledgers have no such file: there, a missing
segment is found only by a later record, or by a message that names a blob.
"""

from __future__ import annotations

import re
from pathlib import Path

from fedmq.broker.errors import LedgerDamage, NoSpace, io_error
from fedmq.broker.ledger.disk import APPEND, LOCAL_DISK, Disk, append_all
from fedmq.broker.ledger.entries import MESSAGES, PAYLOAD, segment_numbers, segment_path
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.records import MAGIC
from fedmq.broker.ledger.segment_writer import sync_folder

MANIFEST_FILE = "segments"

_LINE = re.compile(rf"([+-]) ({MESSAGES}|{PAYLOAD}) ([0-9]{{1,20}})")
_MADE_WITH = "# the segments of this ledger: + begun, - deleted\n"

Name = tuple[str, int]
"""(family, number) of a segment."""


class Manifest:
    """The list of a folder's segments.

    Args:
        folder: of the ledger.
        disk: holds the folder.

    Attributes:
        exists: whether the file exists; without it, no segment is known to be missing.
        expected: the segments that were begun and not deleted.

    Raises:
        LedgerError: the file cannot be read.
    """

    def __init__(self, folder: Path, disk: Disk = LOCAL_DISK) -> None:
        self._folder, self._disk = folder, disk
        self._path = folder / MANIFEST_FILE
        self.expected: set[Name] = set()
        self._unwritten: list[str] = []
        """Lines that did not fit the disk; they are written with the next ones."""
        try:
            with disk.reader(self._path) as file:
                text = file.read().decode("ascii", errors="replace")
        except FileNotFoundError:
            self.exists = False
            return
        except OSError as error:
            raise io_error("cannot read", error, self._path.name) from None
        self.exists = True
        for line in text.split("\n")[:-1]:
            # A line that a crash has truncated is ignored, also if another one was appended.
            if match := _LINE.fullmatch(line):
                sign, family, number = match.groups()
                change = self.expected.add if sign == "+" else self.expected.discard
                change((family, int(number)))

    def missing(self) -> list[Name]:
        """Return the expected segments that do not exist."""
        return sorted(self.expected - _present(self._folder, self._disk))

    def begin(self) -> None:
        """List the existing segments that are not listed yet; creates the file if needed.

        Raises:
            LedgerError: the file cannot be written.
        """
        lines = [f"+ {family} {n}\n" for family, n in sorted(_present(self._folder, self._disk))]
        if not self.exists:
            self._append([_MADE_WITH, *lines])
            self.exists = True
        else:
            known = {f"+ {family} {n}\n" for family, n in self.expected}
            self._append([line for line in lines if line not in known])
        self.expected |= _present(self._folder, self._disk)

    def add(self, family: str, number: int) -> None:
        """List a segment that was begun.

        Raises:
            LedgerError: the file cannot be written, other than for a full disk.
        """
        if (family, number) not in self.expected:
            self.expected.add((family, number))
            self._append([f"+ {family} {number}\n"])

    def remove(self, family: str, number: int) -> bool:
        """List a segment as deleted, before its deletion; return whether it may be deleted now.

        It may not if there is no space for the line: without it, the segment would be missing.

        Raises:
            LedgerError: the file cannot be written, other than for a full disk.
        """
        # A line that is on the device must not name a segment that is not.
        sync_folder(self._folder, self._disk)
        self._append([f"- {family} {number}\n"], sync=True)
        if not self._unwritten:
            self.expected.discard((family, number))
        return not self._unwritten

    def _append(self, lines: list[str], *, sync: bool = False) -> None:
        self._unwritten += lines
        if not self._unwritten:
            return
        try:
            fd = self._disk.open(self._path, APPEND)
            try:
                # The space makes a line invalid that a crash has truncated: in place of segment 12,
                # it could name segment 1.
                text = (" \n" if self._disk.size(fd) else "") + "".join(self._unwritten)
                append_all(self._disk, fd, [text.encode()])
                if sync:
                    self._disk.sync(fd)
            finally:
                self._disk.close(fd)
        except OSError as error:
            failure = io_error("cannot write", error, self._path.name)
            if not isinstance(failure, NoSpace):
                raise failure from None
        else:
            self._unwritten.clear()


def check_segments(folder: Path, manifest: Manifest, disk: Disk = LOCAL_DISK) -> None:
    """Check that no whole segment is missing.

    Raises:
        LedgerDamage: segments are missing.
        LedgerError: the folder cannot be read.
    """
    missing = manifest.missing()
    if missing:
        names = [segment_path(folder, *name).name for name in missing]
        also = f" and {len(names) - 1} more segments are" if len(names) > 1 else " is"
        raise LedgerDamage(f"{names[0]}{also} missing from {folder}")
    if not segment_numbers(folder, MESSAGES, disk) and _holds_records(folder, PAYLOAD, disk):
        raise LedgerDamage(f"expected messages-*.log beside the payload in {folder}, found none")


def check_entries(folder: Path, disk: Disk = LOCAL_DISK) -> None:
    """Check that there are entries if there is payload: a run is opened before its first blob.

    Raises:
        LedgerDamage: there are none, or the first one is damaged.
        LedgerError: the folder cannot be read.
    """
    if not (segment_numbers(folder, MESSAGES, disk) and _holds_records(folder, PAYLOAD, disk)):
        return
    if next(read_entries(folder, disk), None) is None:
        raise LedgerDamage(f"expected entries beside the payload in {folder}, found none")


def payload_is_gone(folder: Path, disk: Disk = LOCAL_DISK) -> bool:
    """Return whether all payload is missing: retention always keeps one segment.

    Raises:
        LedgerError: the folder cannot be read.
    """
    return not segment_numbers(folder, PAYLOAD, disk) and _holds_records(folder, MESSAGES, disk)


def _holds_records(folder: Path, family: str, disk: Disk) -> bool:
    for number in segment_numbers(folder, family, disk):
        path = segment_path(folder, family, number)
        try:
            if disk.size_of(path) > len(MAGIC):
                return True
        except OSError as error:
            raise io_error("cannot read", error, path.name) from None
    return False


def _present(folder: Path, disk: Disk) -> set[Name]:
    return {
        (family, number)
        for family in (MESSAGES, PAYLOAD)
        for number in segment_numbers(folder, family, disk)
    }
