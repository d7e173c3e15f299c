"""With ``retain = "headers"``, a run that has ended keeps its messages and no payload."""

import contextlib
import shutil

import msgspec
import pytest

from fedmq.broker.errors import LedgerError, NoSpace
from fedmq.broker.inspection.check import check
from fedmq.broker.ledger.entries import PAYLOAD, Ended, Opened, segment_numbers, segment_path
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.records import MAGIC
from fedmq.broker.ledger.retention import RetentionPolicy
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.recovery import open_broker
from fedmq.broker.settings import HEADERS, LEAST_SEGMENT_BYTES, BrokerSettings
from fedmq.broker.virtual.disk import Crash, DiskFault, VirtualDisk
from tests.broker.clocks import stopped_clock
from tests.broker.ledger.failing_disk import dice, small_ledgers
from tests.broker.ledger.small_ledger import accepted, name_of, put

DATA = [bytes([number]) * 300 for number in range(9)]


def payload_bytes(folder) -> int:
    """How many bytes the folder holds beside the first ones of each segment."""
    paths = [segment_path(folder, PAYLOAD, each) for each in segment_numbers(folder, PAYLOAD)]
    return sum(max(path.stat().st_size - len(MAGIC), 0) for path in paths)


def fill(ledger, *numbers):
    for number in numbers:
        name = put(ledger, DATA[number])
        ledger.use(ledger.next_seq, [name])
        ledger.append(accepted(ledger.next_seq))
        ledger.commit()


def end(ledger, run="r"):
    ledger.append(Ended(seq=ledger.next_seq, at=0.0, run=run, reason="done"))
    ledger.commit()


@pytest.mark.parametrize("durability", ["process", "power"])
def test_the_payload_of_an_ended_run_is_gone_and_its_messages_are_there(tmp_path, durability):
    ledger = Ledger(tmp_path, retain_bytes=HEADERS, durability=durability)
    ledger.append(Opened(seq=0, at=0.0, run="r", config="[run]", total_clients=3))
    fill(ledger, 0, 1, 2)
    assert ledger.size_of(name_of(DATA[0])) == 300
    end(ledger)
    assert payload_bytes(tmp_path) == 0
    assert [ledger.size_of(name_of(each)) for each in DATA[:3]] == [None] * 3
    ledger.close()
    assert [each.seq for each in read_entries(tmp_path)] == list(range(5))
    assert check(tmp_path).sound
    ledger, _ = open_broker(tmp_path, BrokerSettings(), stopped_clock(), retain_bytes=HEADERS)
    ledger.close()
    assert payload_bytes(tmp_path) == 0


def test_other_runs_keep_what_they_need_until_they_end(tmp_path):
    ledger = Ledger(tmp_path, retain_bytes=HEADERS)
    other = msgspec.structs.replace(name_of(DATA[8]), run="q")
    ledger.put(other, 300, 0, DATA[8])
    ledger.use(10**6, [other])
    fill(ledger, 0, 1)
    end(ledger)
    assert bytes(ledger.payload.read(other, 0, 300)) == DATA[8]
    end(ledger, "q")
    assert payload_bytes(tmp_path) == 0
    ledger.close()


def test_the_default_deletes_the_segment_that_is_being_filled_never(tmp_path):
    ledger = Ledger(tmp_path, retain_bytes=0)
    fill(ledger, 0)
    end(ledger)
    assert payload_bytes(tmp_path) > 300
    ledger.close()
    # A later broker with the setting deletes it.
    Ledger(tmp_path, retain_bytes=HEADERS).close()
    assert payload_bytes(tmp_path) == 0


def test_segments_are_small(tmp_path):
    policy = RetentionPolicy(tmp_path, HEADERS)
    assert policy.segment_bytes(1 << 30) == len(MAGIC), "what an earlier broker left goes first"
    (tmp_path / "payload-00000000000000000000.log").write_bytes(MAGIC)
    policy.apply(lambda _: True, lambda _: True)
    assert policy.segment_bytes(1 << 30) == LEAST_SEGMENT_BYTES
    assert policy.segment_bytes(1000) == 1000


@pytest.fixture
def folder():
    with small_ledgers() as path:
        yield path


def session(folder, disk, durability):
    """Write a run to its end, or to a crash; return whether its end was committed."""
    ledger = Ledger(folder, retain_bytes=HEADERS, durability=durability, disk=disk)
    with ledger._closing():
        ledger.append(Opened(seq=0, at=0.0, run="r", config="c", total_clients=1))
        fill(ledger, *range(5))
        end(ledger)
    return True


@pytest.mark.parametrize(
    ("durability", "lose"),
    [
        ("process", VirtualDisk.die),
        ("power", VirtualDisk.die),
        ("power", VirtualDisk.lose_power),
    ],
)
def test_after_a_crash_at_any_operation_the_next_broker_deletes_it(folder, durability, lose):
    operation, finished = 0, False
    while not finished:
        disk = VirtualDisk(dice(operation))
        disk.crash_at(operation)
        with contextlib.suppress(Crash):
            finished = session(folder, disk, durability)
        lose(disk)
        found = []
        again = {"retain_bytes": HEADERS, "durability": durability, "disk": disk}
        ledger = Ledger(folder, found.append, **again)
        ended = any(isinstance(each, Ended) for each in found)
        if not ended:
            for entry in found[1:]:
                ledger.use(entry.seq, [name_of(DATA[entry.seq - 1])])
            ledger.commit()
            kept = [bytes(ledger.payload.read(name_of(DATA[e.seq - 1]), 0, 300)) for e in found[1:]]
            assert kept == [DATA[entry.seq - 1] for entry in found[1:]]
        else:
            ledger.commit()
            assert payload_bytes(folder) == 0
        assert ended or not finished
        ledger.close()
        disk.die()
        shutil.rmtree(folder)
        operation += 1
    assert operation > 20


def test_a_full_disk_delays_the_deletion(folder):
    disk = VirtualDisk(dice(0))
    ledger = Ledger(folder, retain_bytes=HEADERS, disk=disk)
    fill(ledger, 0, 1)
    ledger.append(Ended(seq=ledger.next_seq, at=0.0, run="r", reason="done"))
    disk.full = True
    with pytest.raises(NoSpace):
        ledger.commit()
    assert payload_bytes(folder) > 600
    disk.full = False
    disk.fail_at(DiskFault.NO_SPACE, disk.met[DiskFault.NO_SPACE] + 1)  # after the entry itself
    ledger.commit()
    assert payload_bytes(folder) > 600
    ledger.commit()
    assert payload_bytes(folder) == 0
    ledger.close()


def test_a_segment_that_cannot_be_deleted_is_an_error(folder):
    disk = VirtualDisk(dice(0))
    ledger = Ledger(folder, retain_bytes=HEADERS, disk=disk)
    fill(ledger, 0)
    disk.fail_at(DiskFault.UNLINK_ERROR, disk.met[DiskFault.UNLINK_ERROR])
    with pytest.raises(LedgerError, match="cannot delete"):
        end(ledger)
    ledger.abandon()
    assert msgspec.structs.asdict(list(read_entries(folder))[-1])["reason"] == "done"
