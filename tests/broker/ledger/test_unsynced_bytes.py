"""Bytes that were not synced, or were read wrongly, and what the next start does with them."""

import pytest

import fedmq.broker.ledger.writer as ledger_module
from fedmq.broker.errors import LedgerDamage, LedgerError, NoSpace
from fedmq.broker.ledger.entries import MESSAGES, PAYLOAD, Opened, segment_path
from fedmq.broker.ledger.manifest import Manifest
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.records import MAGIC, scan
from fedmq.broker.ledger.sync_point import (
    SYNC_POINT_FILE,
    SyncPoint,
    SyncPointFile,
    read_sync_point,
    write_again,
)
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.virtual.disk import Crash, DiskFault, VirtualDisk
from tests.broker.ledger.failing_disk import dice, small_ledgers
from tests.broker.ledger.small_ledger import ENTRIES, accepted, name_of, put


@pytest.fixture
def disk():
    return VirtualDisk(dice(1))


def start(folder, disk, durability="power", each=None):
    return Ledger(folder, each, durability=durability, disk=disk)


def commit(ledger, *entries):
    for entry in entries:
        ledger.append(entry)
    ledger.commit()


def spoil(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_hole_after_the_last_sync_is_set_aside_and_one_before_it_is_damage(tmp_path, disk):
    """The batch with the hole was not acknowledged; its bytes are kept for a person to see."""
    ledger = start(tmp_path, disk)
    commit(ledger, *(accepted(seq) for seq in range(3)))
    synced = segment_path(tmp_path, MESSAGES, 0).stat().st_size
    disk.crash_at(disk.operations + 1)
    with pytest.raises(Crash):
        commit(ledger, *(accepted(seq, "x" * 200) for seq in range(3, 9)))
    disk.die()
    path = segment_path(tmp_path, MESSAGES, 0)
    size = path.stat().st_size
    records = list(scan(path))
    spoil(path, records[4].offset, bytes(300))
    ledger = start(tmp_path, disk)
    assert ledger.next_seq == 4
    assert ledger.cut_bytes == size - records[4].offset
    assert path.with_name(f"{path.name}.cut-{records[4].offset}").stat().st_size == ledger.cut_bytes
    ledger.close()
    spoil(path, records[1].offset, bytes(records[1].end - records[1].offset))
    assert records[1].end <= synced
    with pytest.raises(LedgerDamage, match="lengths are wrong"):
        start(tmp_path, disk)


def test_a_hole_in_the_payload_after_the_last_sync_is_set_aside(tmp_path, disk):
    ledger = start(tmp_path, disk)
    name = put(ledger, b"some bytes")
    commit(ledger, accepted(0))
    put(ledger, bytes(range(1, 251)), piece=50)
    disk.crash_at(disk.operations + 1)
    with pytest.raises(Crash):
        ledger.commit()
    disk.die()
    path = segment_path(tmp_path, PAYLOAD, 0)
    hole = list(scan(path))[2].offset
    spoil(path, hole, bytes(80))
    ledger = start(tmp_path, disk)
    assert (ledger.damage, path.stat().st_size) == ([], hole)
    assert path.with_name(f"{path.name}.cut-{hole}").exists()
    assert ledger.payload.read(name, 0, 10) == b"some bytes"
    ledger.close()


def test_a_hole_is_damage_if_the_broker_acknowledged_without_a_sync(tmp_path):
    """Under `process`, no one knows which batch was the last before the power failure."""
    start(tmp_path, VirtualDisk(dice(0)), "power").close()
    ledger = Ledger(tmp_path)
    commit(ledger, *(accepted(seq, "x" * 200) for seq in range(6)))
    ledger.close()
    assert not (tmp_path / SYNC_POINT_FILE).exists()
    path = segment_path(tmp_path, MESSAGES, 0)
    spoil(path, list(scan(path))[2].offset, bytes(300))
    for durability in ("process", "power"):
        with pytest.raises(LedgerDamage, match="lengths are wrong"):
            Ledger(tmp_path, durability=durability)


def test_a_segment_without_its_first_page_is_begun_again(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(ledger_module, "_MESSAGES_SEGMENT_BYTES", 10)
    ledger = start(tmp_path, disk)
    commit(ledger, accepted(0))
    disk.crash_at(disk.operations + 5)
    with pytest.raises(Crash):
        commit(ledger, *(accepted(seq, "x" * 200) for seq in range(1, 9)))
    disk.die()
    path = segment_path(tmp_path, MESSAGES, 1)
    assert path.stat().st_size > 1000
    spoil(path, 0, bytes(512))
    ledger = start(tmp_path, disk)
    assert ledger.next_seq == 1
    commit(ledger, accepted(1))
    ledger.close()
    assert list(read_entries(tmp_path)) == [accepted(0), accepted(1)]


def test_what_a_failed_sync_may_have_lost_is_written_again(tmp_path, disk):
    ledger = start(tmp_path, disk)
    put(ledger, b"some bytes")
    disk.fail_at(DiskFault.SYNC_ERROR, disk.met[DiskFault.SYNC_ERROR])
    with pytest.raises(LedgerError, match="cannot sync"):
        commit(ledger, accepted(0))
    with pytest.raises(LedgerError, match="cannot sync"):
        ledger.commit()
    disk.die()
    ledger = start(tmp_path, disk)
    found = ledger.next_seq, ledger.have(name_of(b"some bytes"))
    ledger.close()
    disk.lose_power()
    ledger = start(tmp_path, disk)
    assert (ledger.next_seq, ledger.have(name_of(b"some bytes"))) == found
    ledger.close()


def test_all_of_a_segment_is_written_again_although_a_bit_flips(tmp_path):
    ledger = Ledger(tmp_path)
    commit(ledger, *ENTRIES[:2])
    ledger.close()
    path = segment_path(tmp_path, MESSAGES, 0)
    expected = [0, *(record.offset for record in scan(path))]
    for occasion in range(8):
        disk = VirtualDisk(dice(occasion))
        disk.fail_at(DiskFault.FLIPPED_BIT, occasion)
        write, offsets = disk.pwrite, []
        disk.pwrite = lambda fd, data, offset: offsets.append(offset) or write(fd, data, offset)  # noqa: B023 - called at once
        write_again(path, 0, disk)
        assert offsets == expected


@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_bit_that_flips_while_it_is_read_cuts_and_changes_nothing(tmp_path, disk, durability):
    """The last record ends with a zero, as does one that a power failure has torn."""
    ledger = start(tmp_path, disk, durability)
    commit(ledger, *ENTRIES[:3], accepted(3, "end"))
    put(ledger, b"some bytes")
    ledger.close()
    for occasion in range(40):
        again = VirtualDisk(dice(occasion))
        again.fail_at(DiskFault.FLIPPED_BIT, occasion)
        found = []
        try:
            ledger = start(tmp_path, again, durability, found.append)
        except LedgerError:
            continue  # the next broker starts
        assert found == [*ENTRIES[:3], accepted(3, "end")]
        assert ledger.cut_bytes == 0
        ledger.payload._recent.clear()
        assert ledger.payload.read(name_of(b"some bytes"), 1, 4) == b"ome "
        ledger.close()


def test_a_torn_tail_is_truncated_whichever_of_its_readings_is_wrong(tmp_path):
    """A torn record that stays in place would hide the next one."""
    ledger = Ledger(tmp_path)
    put(ledger, b"some bytes")
    ledger.close()
    path = segment_path(tmp_path, PAYLOAD, 0)
    torn = path.read_bytes()[: len(MAGIC) + 25]
    data = b"other bytes"
    opened = 0
    for seed in range(24):
        path.write_bytes(torn)
        disk = VirtualDisk(dice(seed))
        disk.fail_at(DiskFault.FLIPPED_BIT, seed % 12)
        try:
            ledger = start(tmp_path, disk, "process")
        except LedgerError:
            continue  # the next broker starts
        put(ledger, data)
        ledger.close()
        opened += 1
        ledger = Ledger(tmp_path)
        assert not ledger.damage
        assert ledger.payload.read(name_of(data), 0, len(data)) == data
        ledger.close()
    assert opened > 12


def test_a_last_record_that_ends_with_a_zero_is_not_taken_for_a_torn_one(tmp_path):
    ledger = Ledger(tmp_path)
    commit(ledger, *ENTRIES[:2], ENTRIES[2].__class__(seq=2, at=1.0, node="n", of=(0,)))
    ledger.close()
    path = segment_path(tmp_path, MESSAGES, 0)
    *_, last = scan(path)
    assert path.read_bytes().endswith(b"\0")
    spoil(path, last.offset + 25, b"?")
    with pytest.raises(LedgerDamage, match="checksum of the last record"):
        Ledger(tmp_path)


def test_a_damaged_chunk_is_never_passed_on(tmp_path):
    ledger = Ledger(tmp_path)
    name = put(ledger, bytes(range(200)))
    ledger.commit()
    ledger.payload._recent.clear()
    path = segment_path(tmp_path, PAYLOAD, 0)
    spoil(path, path.stat().st_size - 1, b"?")
    for start_, size in ((0, 200), (0, 4), (3, 100)):
        with pytest.raises(LedgerDamage, match="checksum does not match") as caught:
            ledger.payload.read(name, start_, size)
        assert (caught.value.segment, caught.value.offset) == (path.name, len(MAGIC))
    ledger.close()


def test_a_truncated_line_never_names_another_segment(tmp_path, disk):
    (tmp_path / "segments").write_text("+ messages 0\n+ payload 1")  # of "+ payload 12"
    assert Manifest(tmp_path).expected == {(MESSAGES, 0)}
    Manifest(tmp_path).add(PAYLOAD, 12)
    assert Manifest(tmp_path).expected == {(MESSAGES, 0), (PAYLOAD, 12)}


def test_a_segment_is_not_deleted_before_the_manifest_says_so(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(ledger_module, "_PAYLOAD_SEGMENT_BYTES", 10)
    ledger = Ledger(tmp_path, retain_bytes=0, disk=disk)
    name = put(ledger, b"some bytes")
    commit(ledger, accepted(0))
    ledger.unpin([name])
    put(ledger, b"other bytes")
    write, calls = disk.writev, []

    def no_space_for_lines(fd, buffers):
        if bytes(buffers[0]).strip().startswith(b"-"):
            calls.append(1)
            raise OSError(28, "No space left on device")
        return write(fd, buffers)

    monkeypatch.setattr(disk, "writev", no_space_for_lines)
    ledger.commit()
    assert calls
    disk.die()
    assert segment_path(tmp_path, PAYLOAD, 0).exists()
    Ledger(tmp_path).close()


def test_the_names_of_new_folders_are_on_the_device_too(tmp_path, monkeypatch, disk):
    opened = []
    monkeypatch.setattr(disk, "sync", lambda fd: opened.append(disk._folders.get(fd)))
    start(tmp_path / "run" / "ledger", disk).close()
    assert {tmp_path / "run" / "ledger", tmp_path / "run", tmp_path} <= set(opened)


def test_a_note_names_a_new_payload_segment_only_once_it_is_on_the_device():
    with small_ledgers() as folder:
        lose_power_beside_a_new_segment(folder)


def lose_power_beside_a_new_segment(folder):
    for seed in range(300):
        disk = VirtualDisk(dice(seed))
        settings = {"durability": "power", "disk": disk}
        ledger = Ledger(folder / str(seed), **settings)
        commit(ledger, Opened(seq=0, at=0.0, run="r", config="c", total_clients=1))
        ledger.use(1, [put(ledger, b"x" * 3500)])
        commit(ledger, accepted(1))  # the segment is full: the next one begins
        commit(ledger, accepted(2))
        put(ledger, b"y" * 700)
        disk.crash_at(disk.operations + 1)  # after the write, in the sync
        with pytest.raises(Crash):
            ledger.commit()
        disk.lose_power()
        found = []
        Ledger(folder / str(seed), found.append, **settings).close()
        assert [each.seq for each in found] == [0, 1, 2]


def test_notes_that_cannot_be_written_leave_the_last_good_one(tmp_path, disk):
    file = SyncPointFile(tmp_path, disk)
    file.begin(SyncPoint(0, 100, 0, 100))
    file.advance(SyncPoint(0, 200, 0, 100))
    write = disk.pwrite

    def torn(fd, data, offset):
        write(fd, bytes(data)[:50], offset)
        raise OSError(5, "Input/output error")

    disk.pwrite = torn
    for _ in range(3):
        file.advance(SyncPoint(0, 300, 0, 100))
    assert read_sync_point(tmp_path, disk) == SyncPoint(0, 200, 0, 100)


def test_a_sync_point_is_on_the_device_before_anything_is_acknowledged(tmp_path, disk):
    """Without it, a power failure in the first commit could leave what counts as damage."""
    first = Ledger(tmp_path, durability="power")
    commit(first, accepted(0))
    first.close()
    path = tmp_path / SYNC_POINT_FILE
    point = read_sync_point(tmp_path, disk)
    assert point.messages_bytes == segment_path(tmp_path, MESSAGES, 0).stat().st_size
    notes = path.read_bytes()
    path.write_bytes(notes.replace(point.encode(), point.encode()[:50] + bytes(51)))
    assert read_sync_point(tmp_path, disk) < point  # the newest is torn, the other one is older
    path.write_bytes(b"no note")
    assert read_sync_point(tmp_path, disk) is None
    writes = disk.pwrite

    def fails(fd, data, offset):
        if len(data) == len(point.encode()):
            raise OSError(5, "Input/output error")
        return writes(fd, data, offset)

    disk.pwrite = fails
    with pytest.raises(LedgerError, match="cannot write: Input/output error"):
        start(tmp_path, disk)
    disk.pwrite = writes
    ledger = start(tmp_path, disk)
    disk.pwrite = fails  # the earlier one is true as well
    commit(ledger, accepted(1))
    ledger.close()
    disk.lose_power()
    assert read_sync_point(tmp_path, disk) == point
    assert list(read_entries(tmp_path)) == [accepted(0), accepted(1)]
    path.unlink()
    path.mkdir()
    with pytest.raises(LedgerError, match="cannot open: Is a directory"):
        Ledger(tmp_path, durability="power")


def test_a_full_disk_is_waited_for_under_power(tmp_path, disk):
    ledger = start(tmp_path, disk)
    disk.full = True
    for _ in range(2):
        with pytest.raises(NoSpace):
            commit(ledger, *([accepted(0)] if not ledger.next_seq else []))
    disk.full = False
    commit(ledger, accepted(1))
    disk.lose_power()
    assert list(read_entries(tmp_path)) == [accepted(0), accepted(1)]
