"""The virtual disk itself: what may be left, and that each of it is drawn."""

import errno
import io
import os

import pytest

from fedmq.broker.ledger.disk import APPEND, READ, REWRITE, append_all
from fedmq.broker.virtual.disk import PAGE_BYTES, Crash, DiskFault, VirtualDisk
from tests.broker.ledger.failing_disk import dice

OLD, NEW = b"o" * 700, b"n" * 1000


def draws(folder, change, *, count=200):
    """Return the contents of a file after `change` and a power failure, for many seeds."""
    found = set()
    for seed in range(count):
        path = folder / f"{seed}"
        disk = VirtualDisk(dice(seed))
        fd = disk.open(path, APPEND)
        disk.writev(fd, [OLD])
        disk.sync(fd)
        sync_folder(disk, folder)
        change(disk, fd, path)
        disk.lose_power()
        found.add(path.read_bytes() if path.exists() else None)
    return found


def sync_folder(disk, folder):
    fd = disk.open(folder, READ)
    disk.sync(fd)
    disk.close(fd)


def test_a_write_may_be_kept_lost_torn_or_zero(tmp_path):
    found = draws(tmp_path, lambda disk, fd, _path: disk.writev(fd, [NEW]))
    assert {OLD, OLD + NEW} <= found
    assert all(each.startswith(OLD) for each in found)
    page = 2 * PAGE_BYTES - len(OLD)
    zeros, torn = OLD + bytes(len(NEW)), OLD + bytes(page) + NEW[page:]
    assert {zeros, torn} <= found
    assert len(found) > 5


def test_what_was_synced_stays(tmp_path):
    def change(disk, fd, _path):
        disk.writev(fd, [NEW])
        disk.sync(fd)

    assert draws(tmp_path, change) == {OLD + NEW}


def test_a_truncation_may_be_undone_and_a_page_rewritten_or_not(tmp_path):
    def change(disk, fd, path):
        disk.truncate(fd, 600)
        other = disk.open(path, REWRITE)
        disk.pwrite(other, b"x" * 100, 0)

    found = draws(tmp_path, change)
    assert {OLD, OLD[:600], b"x" * 100 + OLD[100:], b"x" * 100 + OLD[100:600]} <= found


def test_a_name_is_on_the_device_once_its_folder_is_synced(tmp_path):
    def delete(disk, _fd, path):
        disk.unlink(path)

    def delete_and_sync(disk, fd, path):
        delete(disk, fd, path)
        sync_folder(disk, tmp_path)

    assert draws(tmp_path, delete) == {OLD, None}
    assert draws(tmp_path, delete_and_sync) == {None}
    kept = set()
    for seed in range(20):
        disk = VirtualDisk(dice(seed))
        fd = disk.open(tmp_path / f"new {seed}", APPEND)
        disk.writev(fd, [NEW])
        disk.sync(fd)
        disk.lose_power()
        kept.add((tmp_path / f"new {seed}").exists())
    assert kept == {True, False}


def test_a_failed_sync_is_reported_once_and_its_pages_may_be_lost(tmp_path):
    def change(disk, fd, _path):
        disk.writev(fd, [NEW])
        disk.fail_at(DiskFault.SYNC_ERROR, disk.met[DiskFault.SYNC_ERROR])
        with pytest.raises(OSError, match="Input/output error"):
            disk.sync(fd)
        disk.sync(fd)

    found = draws(tmp_path, change)
    assert OLD + NEW in found
    assert OLD + bytes(len(NEW)) in found


def test_a_process_that_dies_leaves_all_that_it_wrote(tmp_path):
    disk = VirtualDisk(dice(0))
    fd = disk.open(tmp_path / "a", APPEND)
    disk.writev(fd, [OLD])
    disk.die()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert (tmp_path / "a").read_bytes() == OLD


def test_a_crash_leaves_a_prefix_and_nothing_works_until_the_process_is_gone(tmp_path):
    sizes = set()
    for seed in range(50):
        path = tmp_path / f"{seed}"
        disk = VirtualDisk(dice(seed))
        fd = disk.open(path, APPEND)
        disk.crash_at(disk.operations)
        with pytest.raises(Crash):
            disk.writev(fd, [NEW])
        with pytest.raises(Crash):
            disk.writev(fd, [OLD])
        with pytest.raises(Crash):
            disk.sync(fd)
        disk.close(fd)  # as a dying process may do
        disk.die()
        sizes.add(path.stat().st_size)
        assert NEW.startswith(path.read_bytes())
        disk.open(path, APPEND)
        disk.die()
    assert len(sizes) > 20


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (DiskFault.WRITE_ERROR, errno.EIO),
        (DiskFault.NO_SPACE, errno.ENOSPC),
        (DiskFault.SYNC_ERROR, errno.EIO),
        (DiskFault.TRUNCATE_ERROR, errno.EIO),
        (DiskFault.UNLINK_ERROR, errno.EIO),
        (DiskFault.CLOSE_ERROR, errno.EIO),
        (DiskFault.READ_ERROR, errno.EIO),
    ],
)
def test_each_operation_fails_when_it_is_planned_and_only_then(tmp_path, fault, code):
    disk = VirtualDisk(dice(0))
    path = tmp_path / "a"
    fd = disk.open(path, APPEND)
    disk.fail_at(fault, disk.met[fault])
    codes = []
    for act in (
        lambda: disk.writev(fd, [OLD]),
        lambda: disk.sync(fd),
        lambda: disk.pread(fd, 10, 0),
        lambda: disk.truncate(fd, 0),
        lambda: disk.close(fd),
        lambda: disk.unlink(path),
    ):
        try:
            act()
        except OSError as error:
            codes.append(error.errno)
    assert codes == [code]
    assert disk.made[fault] == 1


def test_a_short_write_is_whole_in_the_end_and_a_flipped_bit_is_back_at_the_next_read(tmp_path):
    disk = VirtualDisk(dice(0))
    fd = disk.open(tmp_path / "a", APPEND)
    disk.rates = {DiskFault.SHORT_WRITE: 0.9}
    assert append_all(disk, fd, [OLD, NEW]) == len(OLD + NEW)
    assert disk.made[DiskFault.SHORT_WRITE] > 2
    disk.rates = {DiskFault.FLIPPED_BIT: 1.0}
    flipped = [disk.pread(fd, 5000, 0)]
    for read in (io.BufferedReader.read, lambda file: file.read(1700)):
        with disk.reader(tmp_path / "a") as file:
            disk.pread(fd, 1, 0)  # not flipped: a flipped bit is transient
            flipped.append(read(file))
    for each in flipped:
        assert sum((a ^ b).bit_count() for a, b in zip(each, OLD + NEW, strict=True)) == 1
    disk.rates = {}
    assert disk.pread(fd, 5000, 0) == OLD + NEW


def test_files_that_were_there_before_are_on_the_device(tmp_path):
    (tmp_path / "a").write_bytes(OLD)
    for seed in range(10):
        disk = VirtualDisk(dice(seed))
        disk.writev(disk.open(tmp_path / "a", APPEND), [b"more"])
        disk.lose_power()
        assert (tmp_path / "a").read_bytes().startswith(OLD)
