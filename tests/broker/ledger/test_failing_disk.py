"""What a ledger promises, on a disk that fails: see `VirtualDisk`."""

import contextlib
import shutil

import pytest

import fedmq.broker.ledger.sync_point as sync_point_module
import fedmq.broker.ledger.writer as ledger_module
from fedmq.broker.errors import LedgerError
from fedmq.broker.ledger.segment_writer import Segment, sync_folder
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.virtual.disk import DiskFault, VirtualDisk
from tests.broker.ledger.failing_disk import Script, check_seeds, dice, small_ledgers


@pytest.fixture
def folder():
    """A folder for one ledger after the other, with small segments."""
    with small_ledgers() as path:
        yield path


def crash_everywhere(folder, durability, lose, draws):
    """Crash at each operation of a session; check the ledger after each, and go on with it."""
    operation, finished = 0, False
    while not finished:
        for seed in range(draws):
            disk = VirtualDisk(dice(seed))
            script = Script(folder, disk, durability, retain_bytes=0)
            disk.crash_at(operation)
            finished = script.run(6)
            lose(disk)
            disk.crash_at(disk.operations + dice(operation).randrange(40))
            script.run(2)
            lose(disk)
            assert script.run(2)
            disk.die()
            shutil.rmtree(folder)
        operation += 1
    return operation


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["process", "power"])
def test_what_was_committed_survives_a_death_in_every_operation(folder, durability):
    assert crash_everywhere(folder, durability, VirtualDisk.die, 1) > 30


@pytest.mark.slow
def test_what_was_committed_survives_a_power_failure_in_every_operation(folder):
    assert crash_everywhere(folder, "power", VirtualDisk.lose_power, 4) > 50


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["process", "power"])
def test_promises_hold_whatever_fails(folder, durability):
    made = check_seeds(folder, durability, range(80))
    # Under `power`, only retention deletes files.
    assert set(DiskFault) - {DiskFault.UNLINK_ERROR} <= made.keys()


@pytest.mark.soak
@pytest.mark.parametrize("durability", ["process", "power"])
def test_promises_hold_whatever_fails_at_length(folder, durability):
    """For more, see `tests/broker/ledger/soak.py`."""
    check_seeds(folder, durability, range(80, 200))


def nothing(*_args):
    pass


def only_sync(path, _start, disk):
    sync_folder(path, disk)


def sync_twice(segment, sync=Segment.sync):
    with contextlib.suppress(LedgerError):
        sync(segment)
    sync(segment)


PLANTED = {
    "no sync of segments": [(Segment, "sync", nothing)],
    "no sync of the folder": [
        (ledger_module, "sync_folder", nothing),
        (sync_point_module, "sync_folder", nothing),
    ],
    "no second write of what may not be on the device": [
        (sync_point_module, "write_again", only_sync)
    ],
    "acknowledged before it is written": [(Ledger, "_write_messages", nothing)],
    "a failed sync is tried again": [
        (Segment, "sync", sync_twice),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED)
def test_each_planted_fault_is_detected(folder, monkeypatch, fault):
    for target, name, planted in PLANTED[fault]:
        monkeypatch.setattr(target, name, planted)
    with pytest.raises((AssertionError, LedgerError)):
        check_seeds(folder, "power", range(300))


# ---- single faults
