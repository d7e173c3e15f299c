"""Errors of a device: reported with their position, and nothing written is lost."""

import errno
import os

import pytest

import fedmq.broker.ledger.writer as ledger_module
from fedmq.broker.errors import BrokerFailed, LedgerDamage, LedgerError, NoSpace
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import MESSAGES, PAYLOAD, segment_path
from fedmq.broker.ledger.manifest import MANIFEST_FILE
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.records import MAGIC
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.router import BrokerServer
from tests.broker.ledger.small_ledger import ENTRIES, accepted, name_of, put, write
from tests.broker.loops import ANY

CODES = [errno.EIO, errno.EROFS, errno.ENODEV, errno.ENOSPC]


def refusing(code):
    def refuse(*_args, **_more):
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.fixture(params=CODES, ids=errno.errorcode.get)
def code(request):
    return request.param


def test_a_write_is_refused_with_its_place(tmp_path, monkeypatch, code):
    ledger = Ledger(tmp_path)
    ledger.append(ENTRIES[0])
    ledger.commit()
    size = segment_path(tmp_path, MESSAGES, 0).stat().st_size
    ledger.append(ENTRIES[1])
    with monkeypatch.context() as device:
        device.setattr(os, "writev", refusing(code))
        with pytest.raises(LedgerError, match=f"cannot write: {os.strerror(code)}") as caught:
            ledger.commit()
    assert (caught.value.segment, caught.value.offset) == (f"{MESSAGES}-{0:020d}.log", size)
    assert isinstance(caught.value, NoSpace) == (code == errno.ENOSPC)
    ledger.close()
    assert list(read_entries(tmp_path)) == ENTRIES[:2]


def test_what_a_failed_write_left_is_cut_before_the_next_one(tmp_path, monkeypatch, code):
    ledger = Ledger(tmp_path)
    ledger.append(ENTRIES[0])
    ledger.commit()
    size = segment_path(tmp_path, MESSAGES, 0).stat().st_size
    ledger.append(ENTRIES[1])

    def half(fd, buffers):
        os.write(fd, b"".join(buffers)[:30])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as device:
        device.setattr(os, "writev", half)
        device.setattr(os, "ftruncate", refusing(code))
        with pytest.raises(NoSpace, match="cannot write"):
            ledger.commit()
        assert segment_path(tmp_path, MESSAGES, 0).stat().st_size == size + 30
        assert list(read_entries(tmp_path)) == ENTRIES[:1]
        with pytest.raises(LedgerError, match=f"cannot cut: {os.strerror(code)}") as caught:
            ledger.commit()
        assert caught.value.offset == size
    ledger.close()
    assert list(read_entries(tmp_path)) == ENTRIES[:2]


def test_a_failed_sync_is_never_waited_for(tmp_path, monkeypatch, code):
    """The kernel reports a failed write once: the next sync would succeed."""
    ledger = Ledger(tmp_path, durability="power")
    ledger.append(ENTRIES[0])
    with monkeypatch.context() as device:
        device.setattr(os, "fsync", refusing(code))
        with pytest.raises(LedgerError, match=f"cannot sync.*: {os.strerror(code)}") as caught:
            ledger.commit()
        assert not isinstance(caught.value, NoSpace)
    for _ in range(2):
        with pytest.raises(LedgerError, match="cannot sync"):
            ledger.commit()
    with pytest.raises(LedgerError, match="cannot sync"):
        ledger.close()


def test_a_torn_tail_that_cannot_be_cut_is_reported(tmp_path, monkeypatch, code):
    write(tmp_path, ENTRIES)
    path = segment_path(tmp_path, MESSAGES, 0)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + bytes(30))
    with monkeypatch.context() as device:
        device.setattr(os, "ftruncate", refusing(code))
        with pytest.raises(LedgerError, match=f"cannot cut: {os.strerror(code)}") as caught:
            Ledger(tmp_path)
    assert (caught.value.segment, caught.value.offset) == (path.name, size)
    Ledger(tmp_path).close()


def test_a_blob_that_cannot_be_read_is_reported_with_its_place(tmp_path, monkeypatch, code):
    ledger = Ledger(tmp_path)
    put(ledger, b"some bytes")
    ledger.commit()
    ledger.payload._recent.clear()
    with monkeypatch.context() as device:
        device.setattr(os, "pread", refusing(code))
        with pytest.raises(LedgerError, match=f"cannot read: {os.strerror(code)}") as caught:
            ledger.payload.read(name_of(b"some bytes"), 3, 4)
        assert caught.value.segment == f"{PAYLOAD}-{0:020d}.log"
        assert caught.value.offset == len(MAGIC)
        # An upload that would go on from there begins again.
        assert ledger.resume(name_of(b"some bytes"), 10)[0] == 0
    ledger.close()


def test_a_segment_that_cannot_be_opened_or_listed_is_reported(tmp_path, monkeypatch, code):
    write(tmp_path, ENTRIES)
    with monkeypatch.context() as device:
        device.setattr("pathlib.Path.open", refusing(code))
        with pytest.raises(LedgerError, match=f"cannot read: {os.strerror(code)}") as caught:
            list(read_entries(tmp_path))
        assert caught.value.segment == f"{MESSAGES}-{0:020d}.log"
    with monkeypatch.context() as device:
        device.setattr(os, "scandir", refusing(code))
        with pytest.raises(LedgerError, match=f"cannot read {tmp_path}: {os.strerror(code)}"):
            Trace(tmp_path)


def test_a_segment_that_cannot_be_deleted_is_reported(tmp_path, monkeypatch, code):
    monkeypatch.setattr(ledger_module, "_PAYLOAD_SEGMENT_BYTES", 10)
    ledger = Ledger(tmp_path, retain_bytes=0)
    put(ledger, b"some bytes")
    ledger.commit()
    ledger.unpin([name_of(b"some bytes")])
    with monkeypatch.context() as device:
        device.setattr("pathlib.Path.unlink", refusing(code))
        put(ledger, b"other bytes")
        with pytest.raises(LedgerError, match=f"cannot delete: {os.strerror(code)}"):
            ledger.commit()
    ledger.close()


@pytest.mark.end_to_end
def test_a_broker_waits_for_space_and_for_nothing_else(tmp_path, monkeypatch):
    server = BrokerServer(ANY, tmp_path)
    server._driver.ledger.append(accepted(0))
    calls, said = [], []
    server.on_space = said.append

    def writev(_fd, _buffers):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.EIO, "Input/output error")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as device:
        device.setattr(os, "writev", writev)
        # Its lease of nobody is long over: each turn tries to write.
        server._timeout_ms = lambda: 300
        with pytest.raises(BrokerFailed, match=r"Input/output error \(at messages-"):
            server.serve()
    assert len(calls) >= 3
    assert said
    assert all("No space left on device" in each for each in said)
    Ledger(tmp_path).close()


@pytest.mark.end_to_end
def test_space_again_is_reported(tmp_path, monkeypatch):
    server = BrokerServer(ANY, tmp_path)
    server._driver.ledger.append(accepted(0))
    said = []

    def on_space(reason):
        said.append(reason)
        if len(said) == 2:
            device.undo()
        if not reason:
            server.stop()

    server.on_space = on_space
    server._timeout_ms = lambda: 300
    with monkeypatch.context() as device:
        device.setattr(os, "writev", refusing(errno.ENOSPC))
        server.serve()
    assert [bool(each) for each in said] == [True, True, False]


# ---- whole segments


def several(folder, monkeypatch):
    """Write a ledger of several segments of each family; return their names."""
    monkeypatch.setattr(ledger_module, "_MESSAGES_SEGMENT_BYTES", 1)
    monkeypatch.setattr(ledger_module, "_PAYLOAD_SEGMENT_BYTES", 1)
    ledger = Ledger(folder)
    for entry in [accepted(seq) for seq in range(4)]:
        put(ledger, b"blob %d" % entry.seq)
        ledger.append(entry)
        ledger.commit()
    ledger.close()
    return sorted(path.name for path in folder.glob("*.log"))


def test_a_missing_segment_is_detected(tmp_path, monkeypatch):
    names = several(tmp_path, monkeypatch)
    assert len(names) > 8
    for name in names:
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        with pytest.raises(LedgerDamage, match=f"{name} is missing from {tmp_path}$"):
            Ledger(tmp_path)
        (tmp_path / name).write_bytes(data)
    Ledger(tmp_path).close()


def test_missing_messages_are_detected_also_without_a_list(tmp_path, monkeypatch):
    """A broker once began a new ledger beside payload that no entry named."""
    names = several(tmp_path, monkeypatch)
    (tmp_path / MANIFEST_FILE).unlink()
    for name in names:
        if name.startswith(MESSAGES):
            (tmp_path / name).unlink()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(LedgerDamage, match=r"expected messages-.* beside the payload"):
        Ledger(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_ledger_of_an_older_release_is_listed_as_it_is(tmp_path, monkeypatch):
    names = several(tmp_path, monkeypatch)
    (tmp_path / MANIFEST_FILE).unlink()
    segment_path(tmp_path, PAYLOAD, 1).unlink()  # its retention may have deleted that
    Ledger(tmp_path).close()
    lines = (tmp_path / MANIFEST_FILE).read_text().splitlines()
    assert "+ payload 0" in lines
    assert "+ payload 1" not in lines
    assert len([line for line in lines if line.startswith("+")]) >= len(names) - 1
    Ledger(tmp_path).close()


def test_a_deleted_segment_does_not_count_as_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "_PAYLOAD_SEGMENT_BYTES", 10)
    ledger = Ledger(tmp_path, retain_bytes=0)
    for number in range(4):
        put(ledger, b"some bytes %d" % number)
        ledger.commit()
        ledger.unpin([name_of(b"some bytes %d" % number)])
    ledger.close()
    assert len(list(tmp_path.glob("payload-*.log"))) < 4
    Ledger(tmp_path).close()


@pytest.mark.slow
def test_a_truncated_line_of_the_list_is_ignored(tmp_path, monkeypatch):
    several(tmp_path, monkeypatch)
    path = tmp_path / MANIFEST_FILE
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        Ledger(tmp_path).close()
        missing = segment_path(tmp_path, MESSAGES, 3)
        data = missing.read_bytes()
        missing.unlink()
        with pytest.raises(LedgerDamage, match="missing"):
            Ledger(tmp_path)
        missing.write_bytes(data)


@pytest.mark.parametrize("limit", [16 << 20, 50_000_000, 20_000_000_000])
def test_a_limit_is_several_segments(tmp_path, limit):
    ledger = Ledger(tmp_path, retain_bytes=limit)
    size = ledger._retention.segment_bytes(ledger_module._PAYLOAD_SEGMENT_BYTES)
    assert 4 << 20 <= size <= 128 << 20
    assert 3 * size < limit
    ledger.close()
