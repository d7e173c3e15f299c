import os

import pytest

from fedmq.broker.errors import LedgerDamage, LedgerError
from fedmq.broker.ledger.entries import MESSAGES, PAYLOAD, segment_path
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.records import MAGIC, scan
from fedmq.broker.ledger.writer import Ledger
from tests.broker.ledger.small_ledger import ENTRIES, name_of, write


def test_a_torn_tail_of_messages_is_cut_at_every_byte_and_reported(tmp_path):
    write(tmp_path, ENTRIES)
    path = segment_path(tmp_path, MESSAGES, 0)
    whole = path.read_bytes()
    last = list(scan(path))[-1]
    for size in range(last.offset, last.end):
        path.write_bytes(whole[:size])
        assert list(read_entries(tmp_path)) == ENTRIES[:-1]
        ledger = Ledger(tmp_path)
        assert (ledger.cut_bytes, ledger.next_seq) == (size - last.offset, len(ENTRIES) - 1)
        ledger.append(ENTRIES[-1])
        ledger.close()
        assert path.read_bytes() == whole


def test_a_torn_tail_of_payload_is_cut_at_every_byte_and_the_blob_resumes(tmp_path):
    first, second = b"first piece", b"second piece"
    name = name_of(first + second)
    ledger = Ledger(tmp_path)
    ledger.put(name, len(first + second), 0, first)
    ledger.put(name, len(first + second), len(first), second)
    ledger.close()
    path = segment_path(tmp_path, PAYLOAD, 0)
    whole = path.read_bytes()
    last = list(scan(path))[-1]
    for size in range(last.offset, last.end):
        path.write_bytes(whole[:size])
        ledger = Ledger(tmp_path)
        assert ledger.cut_bytes == size - last.offset
        assert (ledger.payload.have(name), ledger.payload.size_of(name)) == (len(first), None)
        ledger.put(name, len(first + second), len(first), second)
        ledger.commit()
        assert bytes(ledger.payload.read(name, 0, len(first + second))) == first + second
        ledger.close()
        assert path.read_bytes() == whole


@pytest.mark.parametrize("zeros", [1, 15, 16, 17, 4096, 200_000])
@pytest.mark.parametrize("whole_records", [True, False], ids=["whole", "torn"])
def test_zeros_that_a_crash_left_are_cut(tmp_path, zeros, whole_records):
    write(tmp_path, ENTRIES)
    path = segment_path(tmp_path, MESSAGES, 0)
    if not whole_records:
        last = list(scan(path))[-1]
        os.truncate(path, last.offset + 20)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(bytes(zeros))
    expected = ENTRIES if whole_records else ENTRIES[:-1]
    assert list(read_entries(tmp_path)) == expected
    ledger = Ledger(tmp_path)
    assert ledger.next_seq == len(expected)
    assert ledger.cut_bytes == (zeros if whole_records else zeros + 20)
    ledger.close()
    assert path.stat().st_size == size - (0 if whole_records else 20)


def test_a_crash_while_a_segment_was_made_is_mended(tmp_path):
    write(tmp_path, [])
    path = segment_path(tmp_path, MESSAGES, 0)
    for size in range(len(MAGIC)):
        path.write_bytes(MAGIC[:size])
        assert list(read_entries(tmp_path)) == []
        write(tmp_path, [])
        assert path.read_bytes() == MAGIC


def outcome(folder):
    """Return what a reader gets: the entries, and the error, if any."""
    entries = []
    try:
        for entry in read_entries(folder):
            entries.append(entry)  # noqa: PERF402 - what came before the error counts
    except LedgerError as error:
        return entries, error
    return entries, None


@pytest.mark.slow
@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_no_flipped_byte_ever_yields_a_wrong_entry(tmp_path, mask):
    write(tmp_path, ENTRIES)
    path = segment_path(tmp_path, MESSAGES, 0)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
        entries, error = outcome(tmp_path)
        assert entries == ENTRIES[: len(entries)], f"byte {at}"
        assert len(entries) < len(ENTRIES), f"byte {at}"
        if error:
            assert error.segment == path.name


@pytest.mark.slow
@pytest.mark.parametrize("mask", [0x01, 0x10, 0x80, 0xFF])
def test_a_flipped_byte_that_records_follow_is_damage_with_its_place(tmp_path, mask):
    """It is not a torn tail: opening for writing would truncate everything after it."""
    write(tmp_path, ENTRIES)
    path = segment_path(tmp_path, MESSAGES, 0)
    whole = path.read_bytes()
    records = list(scan(path))
    taken_for_a_tail = []
    for record in records[:-1]:
        for at in range(record.offset, record.end):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
            _, error = outcome(tmp_path)
            if error is None:
                taken_for_a_tail.append(at - record.offset)
            else:
                assert (error.segment, error.offset) == (path.name, record.offset)
    assert taken_for_a_tail == []


def test_damaged_messages_are_never_opened_for_writing(tmp_path):
    write(tmp_path, ENTRIES, [b"abc", b"defghi"])
    path = segment_path(tmp_path, MESSAGES, 0)
    whole = path.read_bytes()
    at = next(scan(path)).end - 1
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(LedgerDamage) as caught:
        Ledger(tmp_path)
    assert (caught.value.segment, caught.value.offset) == (path.name, len(MAGIC))
    assert str(caught.value).endswith(f"(at {path.name}, byte {len(MAGIC)})")
    path.write_bytes(whole)
    Ledger(tmp_path).close()


def test_a_file_that_is_no_segment_is_reported(tmp_path):
    segment_path(tmp_path, MESSAGES, 0).write_bytes(b"something else altogether")
    with pytest.raises(LedgerError, match="not a ledger segment"):
        Ledger(tmp_path)
    with pytest.raises(LedgerError, match="cannot create"):
        Ledger(segment_path(tmp_path, MESSAGES, 0))
