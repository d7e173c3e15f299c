"""A scripted ledger on a virtual disk: what was committed, and whether it is there afterwards."""

import contextlib
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from unittest import mock

import fedmq.broker.ledger.writer as ledger_module
from fedmq.broker.errors import LedgerError, NoSpace
from fedmq.broker.ledger.blob_store import read_payload
from fedmq.broker.ledger.entries import Consumed, Opened
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.virtual.disk import Crash, DiskFault, VirtualDisk
from tests.broker.ledger.small_ledger import accepted, name_of, put

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - unique folders within
"""Hundreds of small ledgers are created and deleted: ten times as fast there as on a disk."""


def dice(seed):
    """Return a generator for faults and data."""
    return Random(seed)  # noqa: S311 - nothing secret


@contextlib.contextmanager
def small_ledgers():
    """Yield a folder for one ledger after the other, of which a script begins several segments."""
    with (
        mock.patch.object(ledger_module, "_MESSAGES_SEGMENT_BYTES", 1500),
        mock.patch.object(ledger_module, "_PAYLOAD_SEGMENT_BYTES", 3000),
        tempfile.TemporaryDirectory(prefix="fedmq-", dir=MEMORY) as path,
    ):
        yield Path(path) / "ledger"


class Script:
    """Writes batches to a ledger, again and again, and remembers what was committed.

    Args:
        folder: of the ledger.
        disk: holds it.
        durability: of the ledger.
        retain_bytes: see `Ledger`.

    Attributes:
        committed: the entries whose commit returned.
        tried: all entries, by number, that were appended since: each may be there, or not.
        blobs: the bytes of the blob that an entry names, by its number.
    """

    def __init__(self, folder: Path, disk: VirtualDisk, durability, retain_bytes=None):
        self.folder, self.disk = folder, disk
        self.settings = {"durability": durability, "retain_bytes": retain_bytes, "disk": disk}
        self.committed, self.tried, self.blobs = [], [], {}
        self.round = 0

    def run(self, batches):
        """Open the ledger, check it, and commit batches; return whether it survived.

        As a broker does, it waits for space, and stops at every other error. It may refuse to start
        only if the disk has just failed.
        """
        ledger, faults = None, self.disk.made.total()
        try:
            ledger = self.open()
            for _ in range(batches):
                self.batch(ledger)
        except Crash:
            return False
        except LedgerError:
            if ledger is None and self.disk.made.total() > faults:
                return False
            if ledger is None:
                raise
        else:
            batches = 0
        try:
            ledger.close()
        except (Crash, LedgerError):
            return False
        return not batches

    def open(self):
        """Open the ledger; check that it has what was committed, then at most what was tried."""
        found = []
        ledger = Ledger(self.folder, found.append, **self.settings)
        assert found[: len(self.committed)] == self.committed
        rest = found[len(self.committed) :]
        assert rest == self.tried[: len(rest)]
        self.committed, self.tried = found, []
        self.blobs = {seq: data for seq, data in self.blobs.items() if seq < len(found)}
        for seq in self.unfinished():
            data = self.blobs[seq]
            name = name_of(data)
            if ledger.size_of(name) is None:
                ledger.close()
                self.reread(name, seq)
            assert bytes(ledger.payload.read(name, 0, len(data))) == data
            ledger.use(seq, [name])
        return ledger

    def reread(self, name, seq):
        """Do as `open_broker` does: read again before a message counts as lost."""
        rates, self.disk.rates = self.disk.rates, {}
        index = read_payload(self.folder, self.disk)
        self.disk.rates = rates
        assert index.size_of(name) is not None, f"the blob of entry {seq} is gone"
        raise LedgerError("read twice with different results")

    def unfinished(self):
        """Return the numbers of the committed messages that name a blob and were not consumed."""
        consumed = {of for each in self.committed if isinstance(each, Consumed) for of in each.of}
        return [seq for seq in self.blobs if seq not in consumed]

    def batch(self, ledger):
        """Commit some entries and a blob; consume an older message."""
        self.round += 1
        seq = len(self.committed)
        if not seq:
            entries = [Opened(seq=0, at=0.0, run="r", config="c", total_clients=1)]
        else:
            rng = dice(self.round)
            data = bytes([self.round % 251 + 1]) * rng.randrange(1, 1800)
            name = put(ledger, data, piece=700)
            entries = [accepted(seq, "x" * rng.randrange(300)), accepted(seq + 1)]
            finished = tuple(each for each in self.unfinished() if rng.random() < 0.5)
            if finished:
                entries.append(Consumed(seq=seq + 2, at=1.0, node="n", of=finished))
            ledger.use(seq + 1, [name])
        self.tried = entries
        if seq:
            self.blobs[seq + 1] = data
        for entry in entries:
            ledger.append(entry)
        for attempt in range(3):
            try:
                ledger.commit()
                break
            except NoSpace:
                if attempt == 2:
                    raise
        self.committed = self.committed + entries
        self.tried = []


def survive(folder, seed, durability, *, every_kind=True):
    """Run sessions that crash, lose power and meet errors; fail unless the promises hold.

    Under durability `process`, power is never lost.

    Args:
        folder: for the ledger.
        seed: of the crashes, faults and settings.
        durability: of the ledger.
        every_kind: whether single operations fail as well.

    Returns:
        Number of faults, by kind.
    """
    rng = dice(seed)
    disk = VirtualDisk(dice(seed))
    script = Script(folder, disk, durability, rng.choice((0, None)))
    for session in range(10):
        if rng.random() < 0.7:
            disk.crash_at(disk.operations + rng.randrange(80))
        kinds = [fault for fault in DiskFault if every_kind and rng.random() < 0.4]
        disk.rates = {fault: rng.choice((0.01, 0.05)) for fault in kinds}
        if session > 6:
            disk.rates = {}
        script.run(5)
        if durability == "power" and rng.random() < 0.7:
            disk.lose_power()
        else:
            disk.die()
    assert script.run(5), "the ledger does not go on without faults"
    disk.die()
    return disk.made


def check_seeds(folder, durability, seeds):
    """Run `survive` with each seed; return the number of faults, by kind."""
    made = Counter()
    for seed in seeds:
        try:
            made += survive(folder, seed, durability)
        except Exception as error:
            error.add_note(f"seed {seed} under durability {durability}")
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return made
