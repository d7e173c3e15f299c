"""Which segments a ledger's folder should hold, so that one that is missing is missed.

A text file beside the segments, a line for each that was begun (``+ payload 3``) or that the
retention policy deleted (``- payload 3``). Ledgers of older releases have none: what is missing
from them is found only where a later record, or a message that names a blob, tells of it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from fedmq.broker.errors import LedgerDamage, NoSpace, io_error
from fedmq.broker.ledger.entries import MESSAGES, PAYLOAD, segment_numbers, segment_path
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.records import MAGIC

MANIFEST_FILE = "segments"

_LINE = re.compile(rf"([+-]) ({MESSAGES}|{PAYLOAD}) ([0-9]{{1,20}})")
_MADE_WITH = "# the segments of this ledger: + begun, - deleted\n"

Name = tuple[str, int]
"""A segment: its family, and its number."""


class Manifest:
    """The list of a folder's segments.

    Args:
        folder: of the ledger.

    Attributes:
        exists: whether there is a list; without one nothing is known to be missing.
        expected: the segments that were begun and not deleted.

    Raises:
        LedgerError: it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / MANIFEST_FILE
        self.expected: set[Name] = set()
        self._unwritten: list[str] = []
        """Lines for which there was no space: they go with the next ones."""
        try:
            text = self._path.read_bytes().decode("ascii", errors="replace")
        except FileNotFoundError:
            self.exists = False
            return
        except OSError as error:
            raise io_error("cannot read", error, self._path.name) from None
        self.exists = True
        for line in text.splitlines():
            # A line that a crash cut short tells nothing, and does no harm.
            if match := _LINE.fullmatch(line):
                sign, family, number = match.groups()
                change = self.expected.add if sign == "+" else self.expected.discard
                change((family, int(number)))

    def missing(self) -> list[Name]:
        """Return the segments that should be here and are not."""
        return sorted(self.expected - _present(self._folder))

    def begin(self) -> None:
        """Note what is here and not listed yet; the folder's list begins with the first call.

        Raises:
            LedgerError: the list cannot be written.
        """
        lines = [f"+ {family} {n}\n" for family, n in sorted(_present(self._folder))]
        if not self.exists:
            self._append([_MADE_WITH, *lines])
            self.exists = True
        else:
            known = {f"+ {family} {n}\n" for family, n in self.expected}
            self._append([line for line in lines if line not in known])
        self.expected |= _present(self._folder)

    def add(self, family: str, number: int) -> None:
        """Note that a segment was begun.

        Raises:
            LedgerError: the list cannot be written, and not for want of space.
        """
        if (family, number) not in self.expected:
            self.expected.add((family, number))
            self._append([f"+ {family} {number}\n"])

    def remove(self, family: str, number: int) -> None:
        """Note that a segment is not to be missed; it may be deleted then.

        Raises:
            LedgerError: the list cannot be written, and not for want of space: to delete a
                segment makes some.
        """
        self._append([f"- {family} {number}\n"], sync=True)
        self.expected.discard((family, number))

    def _append(self, lines: list[str], *, sync: bool = False) -> None:
        self._unwritten += lines
        if not self._unwritten:
            return
        try:
            with self._path.open("ab") as file:
                # Whatever a crash has left of a line before is a line of its own.
                begin = "\n" if file.tell() else ""
                file.write((begin + "".join(self._unwritten)).encode())
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        except OSError as error:
            failure = io_error("cannot write", error, self._path.name)
            if not isinstance(failure, NoSpace):
                raise failure from None
        else:
            self._unwritten.clear()


def check_segments(folder: Path, manifest: Manifest) -> None:
    """Refuse a folder from which whole segments are gone.

    Raises:
        LedgerDamage: some are missing.
        LedgerError: the folder cannot be read.
    """
    missing = manifest.missing()
    if missing:
        names = [segment_path(folder, *name).name for name in missing]
        also = f" and {len(names) - 1} more segments are" if len(names) > 1 else " is"
        raise LedgerDamage(f"{names[0]}{also} missing from {folder}")
    if not segment_numbers(folder, MESSAGES) and _holds_records(folder, PAYLOAD):
        raise LedgerDamage(f"expected messages-*.log beside the payload in {folder}, there is none")


def check_entries(folder: Path) -> None:
    """Refuse payload beside messages without one whole entry: a run is opened before it.

    Raises:
        LedgerDamage: it is so, or the entries are damaged.
        LedgerError: the folder cannot be read.
    """
    if not (segment_numbers(folder, MESSAGES) and _holds_records(folder, PAYLOAD)):
        return
    if next(read_entries(folder), None) is None:
        raise LedgerDamage(f"expected entries beside the payload in {folder}, there are none")


def payload_is_gone(folder: Path) -> bool:
    """Tell whether all payload is gone: of any ledger, one segment is kept.

    Raises:
        LedgerError: the folder cannot be read.
    """
    return not segment_numbers(folder, PAYLOAD) and _holds_records(folder, MESSAGES)


def _holds_records(folder: Path, family: str) -> bool:
    for number in segment_numbers(folder, family):
        path = segment_path(folder, family, number)
        try:
            if path.stat().st_size > len(MAGIC):
                return True
        except OSError as error:
            raise io_error("cannot read", error, path.name) from None
    return False


def _present(folder: Path) -> set[Name]:
    return {
        (family, number)
        for family in (MESSAGES, PAYLOAD)
        for number in segment_numbers(folder, family)
    }
