"""The files of one client's states: numbered by task, and each written once.

Whatever a worker does last, and whenever it does it, a reader finds the state of the newest
task: a file is complete before it has its name, no file is ever replaced, and only files of
older tasks are removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

_NAME = re.compile(r"([0-9]{12,})(\.state|\.[0-9a-f]+\.new)")
_BEFORE_NUMBERS = -1
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})
"""What file systems say that have no hard links."""


class ClientFolder:
    """The states of one client.

    Args:
        folder: of the run.
        client: the client's number.
    """

    def __init__(self, folder: Path, client: int) -> None:
        self._folder = folder / f"client-{client}"
        # The one file of a client, in runs that older releases began: they have no identity.
        self._unnumbered = folder / f"client-{client}.state"

    def __str__(self) -> str:
        return str(self._folder)

    def newest(self) -> tuple[int, Path, bytes] | None:
        """Return (number, path, bytes) of the newest task's state, or None.

        Raises:
            OSError: it cannot be read.
        """
        gone = _BEFORE_NUMBERS
        while (number := self._newest_number()) > gone:
            path = self._path(number)
            try:
                return number, path, path.read_bytes()
            except FileNotFoundError:
                gone = number  # whoever removed it has saved a newer one
        try:
            return _BEFORE_NUMBERS, self._unnumbered, self._unnumbered.read_bytes()
        except FileNotFoundError:
            return None

    def save(self, number: int, data: bytes) -> bool:
        """Write a task's state, unless that of this task or of a newer one is here.

        Tell whether it was written. Files of older tasks are removed, and so is what is left of
        writes that never ended.

        Raises:
            OSError: it cannot be written; what was here still is.
        """
        self._folder.mkdir(exist_ok=True)
        if self._newest_number() >= number:
            return False
        fresh = self._folder / f"{number:012d}.{secrets.token_hex(8)}.new"
        try:
            fresh.write_bytes(data)
            _name(fresh, self._path(number))
        except FileExistsError:
            return False
        except FileNotFoundError:
            if self._newest_number() < number:
                raise
            return False  # another worker has saved this task, or a newer one, and cleaned up
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink()
        self._remove_older(number)
        return True

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:012d}.state"

    def _files(self) -> Iterator[tuple[int, bool, Path]]:
        """Yield (number, whether it is whole, path) of each file."""
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
        """Remove what no reader will look for; what cannot be removed does no harm."""
        for each, whole, path in [*self._files(), (_BEFORE_NUMBERS, True, self._unnumbered)]:
            if each < number or (each == number and not whole):
                with contextlib.suppress(OSError):
                    path.unlink()


def _name(fresh: Path, path: Path) -> None:
    """Give a written file its name; the first one of a name keeps it.

    Raises:
        FileExistsError: the name is taken.
    """
    try:
        os.link(fresh, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Two workers that save one task at the same moment: here the last one keeps the name.
        if path.exists():
            raise FileExistsError(path) from None
        fresh.rename(path)
