import contextlib
import errno
import os
from pathlib import Path

import pytest

import fedmq.broker.ledger.writer as ledger_module
from fedmq.broker.errors import LedgerError
from fedmq.broker.ledger import disk
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.records import MAGIC
from fedmq.broker.ledger.writer import Ledger
from tests.broker.ledger.payload import open_payload
from tests.broker.ledger.small_ledger import ENTRIES, name_of, put


class FullDisk:
    """A stand-in for `os.writev`: writes `room` bytes, and then fails until it is reset."""

    def __init__(self, room):
        self.room = room
        self.full = True

    def __call__(self, fd, buffers):
        if not self.full:
            return os.write(fd, b"".join(buffers))
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = os.write(fd, b"".join(buffers)[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("room", [0, 1, 16, 60, 130, 200])
def test_a_refused_write_leaves_the_segments_whole_and_what_was_queued_goes_next(
    tmp_path, monkeypatch, room
):
    ledger = Ledger(tmp_path)
    ledger.append(ENTRIES[0])
    put(ledger, b"before")
    ledger.commit()
    disk = FullDisk(room)
    monkeypatch.setattr(os, "writev", disk)
    put(ledger, b"during")
    ledger.append(ENTRIES[1])
    ledger.append(ENTRIES[2])
    for _ in range(2):
        with pytest.raises(LedgerError, match="cannot write: No space left on device"):
            ledger.commit()
        assert list(read_entries(tmp_path)) == ENTRIES[:1]
        open_payload(tmp_path).close()
    disk.full = False
    ledger.append(ENTRIES[3])
    put(ledger, b"after")
    ledger.commit()
    monkeypatch.undo()
    for data in (b"before", b"during", b"after"):
        assert bytes(ledger.payload.read(name_of(data), 0, len(data))) == data
    ledger.close()
    assert list(read_entries(tmp_path)) == ENTRIES[:4]
    index = open_payload(tmp_path)
    for data in (b"before", b"during", b"after"):
        assert bytes(index.read(name_of(data), 1, len(data) - 1)) == data[1:]
    index.close()
    Ledger(tmp_path).close()


def test_a_write_refused_while_message_segments_rotate_loses_nothing(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path)
    ledger.append(ENTRIES[0])
    ledger.commit()
    monkeypatch.setattr(ledger_module, "_MESSAGES_SEGMENT_BYTES", 1)
    disk = FullDisk(0)
    monkeypatch.setattr(os, "writev", disk)
    ledger.append(ENTRIES[1])
    for _ in range(2):
        with pytest.raises(LedgerError, match="No space left"):
            ledger.commit()
    disk.full = False
    ledger.append(ENTRIES[2])
    ledger.close()
    assert list(read_entries(tmp_path)) == ENTRIES[:3]


def refuse_new_segments(monkeypatch):
    """Existing files can grow; new ones cannot be created."""
    write = os.writev

    def refuse(fd, buffers):
        if [bytes(each) for each in buffers] == [MAGIC]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, buffers)

    monkeypatch.setattr(os, "writev", refuse)


def test_a_payload_segment_grows_on_while_no_other_can_be_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "_PAYLOAD_SEGMENT_BYTES", 1)
    ledger = Ledger(tmp_path)
    with monkeypatch.context() as disk:
        refuse_new_segments(disk)
        for data in (b"first", b"second"):
            put(ledger, data)
            ledger.commit()
            assert bytes(ledger.payload.read(name_of(data), 0, len(data))) == data
    put(ledger, b"third")
    ledger.commit()
    put(ledger, b"fourth")
    ledger.close()
    index = open_payload(tmp_path)
    for data in (b"first", b"second", b"third", b"fourth"):
        assert bytes(index.read(name_of(data), 0, len(data))) == data
    index.close()
    assert sum(path.stat().st_size > len(MAGIC) for path in tmp_path.glob("payload-*")) == 2


def open_files():
    disk._evictions.submit(lambda: None).result()  # it closes what it was given
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("family", ["messages", "payload"])
def test_a_segment_that_cannot_be_begun_leaves_no_file_open(tmp_path, monkeypatch, family):
    """A write to a full disk is retried four times a second, for hours if necessary."""
    monkeypatch.setattr(ledger_module, f"_{family.upper()}_SEGMENT_BYTES", 1)
    ledger = Ledger(tmp_path)
    ledger.append(ENTRIES[0])
    ledger.commit()
    refuse_new_segments(monkeypatch)
    before = open_files()
    for number in range(5):
        put(ledger, b"blob %d" % number)
        if family == "messages" and not number:
            ledger.append(ENTRIES[1])
        with contextlib.suppress(LedgerError):
            ledger.commit()
    assert open_files() == before
    monkeypatch.undo()
    ledger.close()


def test_closing_on_a_full_disk_still_closes_the_files(tmp_path, monkeypatch):
    before = open_files()
    ledger = Ledger(tmp_path)
    ledger.append(ENTRIES[0])
    monkeypatch.setattr(os, "writev", FullDisk(0))
    with pytest.raises(LedgerError, match="No space left"):
        ledger.close()
    assert open_files() == before
