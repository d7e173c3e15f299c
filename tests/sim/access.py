"""The access file of a virtual broker: the product's own code, over a file in memory that fails."""

import contextlib
import hashlib
from pathlib import Path
from unittest import mock

from zmq.utils import z85

from fedmq.broker.access import access_file
from fedmq.broker.access.access_file import AccessFile
from fedmq.broker.errors import AccessError
from fedmq.broker.virtual.disk import Crash

CRASH, FAILURE = 0.2, 0.2
"""How often a process that changes the file dies meanwhile, and how often it cannot be written."""


def key_of(name):
    """Return a public key that depends only on a name."""
    return z85.encode(hashlib.sha256(name.encode()).digest()).decode()


class FileInMemory:
    """What every `VirtualAccessFile` of a history reads and writes.

    Args:
        rng: draws the faults.

    Attributes:
        data: its bytes; None if there is no file.
        changes: number of times that it was replaced.
        crashes: number of times that the process died that replaced it.
        broker: the `VirtualBroker`: while its disk is full, nothing can be written. None for a file
            without faults.
    """

    def __init__(self, rng):
        self._rng = rng
        self.data = self.broker = None
        self.changes = self.crashes = 0

    @contextlib.contextmanager
    def in_place_of_files(self):
        """Let the product read and write it instead of a file."""
        with mock.patch.multiple(
            access_file,
            read_private=self._read,
            replace_private=self._replace,
            make_key_folder=lambda _: None,
            locked=lambda _: contextlib.nullcontext(),
        ):
            yield

    def _read(self, _):
        if self.data is None:
            raise FileNotFoundError
        return self.data, None

    def _replace(self, path, data):
        draw = 1.0 if self.broker is None else self._rng.random()
        if CRASH <= draw < CRASH + FAILURE or (self.broker is not None and self.broker.disk.full):
            raise AccessError(f"cannot write {path}")
        if draw >= CRASH / 2:  # else it dies before the file is replaced
            self.data = data
            self.changes += 1
        if draw < CRASH:
            self.crashes += 1
            raise Crash


class VirtualAccessFile(AccessFile):
    """An `AccessFile` over a `FileInMemory`, of the broker or of the person who edits it."""

    def __init__(self, file):
        super().__init__(Path("keys"))
        self._file = file

    def _signature(self):
        return self._file.changes, 0, 0, 0
