"""Finding one entry among many on disk, with a few bytes of memory."""

import pytest

import fedmq.broker.ledger.writer as ledger_module
from fedmq.broker.errors import LedgerError
from fedmq.broker.ledger.entries import MESSAGES, Accepted, segment_numbers
from fedmq.broker.ledger.reader import EntryIndex, LedgerTail
from fedmq.broker.ledger.writer import Ledger
from tests.broker.ledger.small_ledger import ENTRIES, accepted, write


def index_of(folder):
    index, follower = EntryIndex(folder), LedgerTail(folder)
    for entry in follower.poll():
        index.add(entry.seq, *follower.at)
    return index


@pytest.mark.parametrize("segment_bytes", [1, 700, 5000, 1 << 20])
def test_any_entry_is_read_from_whatever_segment_it_is_in(tmp_path, monkeypatch, segment_bytes):
    monkeypatch.setattr(ledger_module, "_MESSAGES_SEGMENT_BYTES", segment_bytes)
    entries = [accepted(seq, "x" * (seq % 50)) for seq in range(300)]
    ledger = Ledger(tmp_path)
    for number, entry in enumerate(entries):
        ledger.append(entry)
        if number % 7 == 0:
            ledger.commit()
    ledger.close()
    index = index_of(tmp_path)
    for seq in [*range(300), *range(299, -1, -7), *range(0, 300, 64), 63, 64, 65, 127, 128]:
        assert index.read(seq) == entries[seq]


def test_every_kind_of_entry_can_be_read(tmp_path):
    write(tmp_path, ENTRIES)
    index = index_of(tmp_path)
    assert [index.read(seq) for seq in range(len(ENTRIES))] == ENTRIES


@pytest.mark.parametrize("seq", [-1, 100, 10**9])
def test_a_number_that_is_not_there_is_reported(tmp_path, seq):
    write(tmp_path, [accepted(each) for each in range(100)])
    with pytest.raises(LedgerError, match=f"entry {seq} is not in the ledger"):
        index_of(tmp_path).read(seq)
    with pytest.raises(LedgerError, match="is not in the ledger"):
        EntryIndex(tmp_path).read(0)


def test_what_was_appended_since_is_found_too(tmp_path):
    ledger = Ledger(tmp_path)
    for seq in range(10):
        ledger.append(accepted(seq))
    ledger.commit()
    assert ledger._entries.read(9) == accepted(9)
    for seq in range(10, 70):
        ledger.append(accepted(seq))
    ledger.commit()
    assert [ledger._entries.read(seq).seq for seq in (5, 30, 69)] == [5, 30, 69]
    ledger.close()


def test_a_ledger_reads_a_message_whether_it_is_written_or_not(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "_RECENT_BYTES", 100)
    monkeypatch.setattr(ledger_module, "_MESSAGES_SEGMENT_BYTES", 2000)
    ledger = Ledger(tmp_path)
    for seq in range(200):
        ledger.append(accepted(seq))
        if seq % 9 == 0:
            ledger.commit()
        for each in {0, seq // 2, seq}:
            assert ledger.read(each) == accepted(each)
    assert len(ledger._recent) < 20
    assert len(segment_numbers(tmp_path, MESSAGES)) > 3
    ledger.close()
    ledger = Ledger(tmp_path)
    assert all(ledger.read(seq) == accepted(seq) for seq in range(200))
    ledger.close()


def test_an_entry_that_is_no_message_is_not_read_as_one(tmp_path):
    ledger = Ledger(tmp_path)
    for entry in ENTRIES:
        ledger.append(entry)
    ledger.commit()
    for entry in ENTRIES:
        if isinstance(entry, Accepted):
            assert ledger.read(entry.seq) == entry
        else:
            with pytest.raises(LedgerError, match=f"entry {entry.seq} is not a message"):
                ledger.read(entry.seq)
    ledger.close()


def test_memory_holds_one_offset_for_many_entries(tmp_path):
    write(tmp_path, [accepted(seq) for seq in range(1000)])
    index = index_of(tmp_path)
    assert sum(len(marks) for marks in index._offsets.values()) <= 1000 // 64 + 1


def test_a_ledger_hands_out_what_it_holds_in_order_when_it_is_opened(tmp_path):
    write(tmp_path, ENTRIES)
    found = []
    ledger = Ledger(tmp_path, found.append)
    assert found == ENTRIES
    assert ledger.next_seq == len(ENTRIES)
    ledger.close()
