"""The files of one client's states: one per task, numbered, each written once.

A reader finds the state of the newest task even if a worker crashes or is delayed at any point: a
file is complete before it gets its name, no file is ever replaced, and only files of older tasks
are removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from fedmq.broker.file_modes import make_private_folder, restrict, write_private

_NAME = re.compile(r"([0-9]{12,})(\.state|\.[0-9a-f]+\.new)")
_BEFORE_NUMBERS = -1
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})
"""Errors of file systems without hard links."""


class ClientFolder:
    """The states of one client.

    Args:
        folder: of the run.
        client: the client's number.
    """

    def __init__(self, folder: Path, client: int) -> None:
        self._folder = folder / f"client-{client}"
        # The only file of a client in runs of older releases, which have no run identity.
        self._unnumbered = folder / f"client-{client}.state"

    def __str__(self) -> str:
        return str(self._folder)

    def newest(self) -> tuple[int, Path, bytes] | None:
        """Return (number, path, bytes) of the newest task's state, or None.

        Raises:
            OSError: the file cannot be read.
        """
        removed = _BEFORE_NUMBERS
        while (number := self._newest_number()) > removed:
            path = self._path(number)
            try:
                return number, path, path.read_bytes()
            except FileNotFoundError:
                removed = number  # by a worker that has saved a newer one
        try:
            return _BEFORE_NUMBERS, self._unnumbered, self._unnumbered.read_bytes()
        except FileNotFoundError:
            return None

    def save(self, number: int, data: bytes) -> bool:
        """Write a task's state, unless the state of this task or of a newer one exists.

        Return whether it was written. Files of older tasks and of incomplete writes are removed.

        Raises:
            OSError: the file cannot be written; the existing files are unchanged.
        """
        make_private_folder(self._folder)
        restrict(self._folder)  # older releases let everybody read it
        if self._newest_number() >= number:
            return False
        fresh = self._folder / f"{number:012d}.{secrets.token_hex(8)}.new"
        try:
            write_private(fresh, data)
            _name(fresh, self._path(number))
        except FileExistsError:
            return False
        except FileNotFoundError:
            if self._newest_number() < number:
                raise
            return False  # another worker has saved this task or a newer one, and removed ours
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink()
        self._remove_older(number)
        return True

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:012d}.state"

    def _files(self) -> Iterator[tuple[int, bool, Path]]:
        """Yield (number, whether it is complete, path) of each file."""
        try:
            paths = list(self._folder.iterdir())
        except FileNotFoundError:
            return
        for path in paths:
            if match := _NAME.fullmatch(path.name):
                yield int(match[1]), match[2] == ".state", path

    def _newest_number(self) -> int:
        return max((number for number, whole, _ in self._files() if whole), default=_BEFORE_NUMBERS)

    def _remove_older(self, number: int) -> None:
        """Remove files that no reader needs, where possible."""
        for each, whole, path in [*self._files(), (_BEFORE_NUMBERS, True, self._unnumbered)]:
            if each < number or (each == number and not whole):
                with contextlib.suppress(OSError):
                    path.unlink()


def _name(fresh: Path, path: Path) -> None:
    """Give a complete file its name, unless the name exists.

    Raises:
        FileExistsError: the name exists.
    """
    try:
        os.link(fresh, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Without hard links, of two workers that save a task at the same moment the last one wins.
        if path.exists():
            raise FileExistsError(path) from None
        fresh.rename(path)
