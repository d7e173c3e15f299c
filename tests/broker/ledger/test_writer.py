import pytest

import fedmq.broker.ledger.writer as ledger_module
from fedmq.broker.errors import LedgerError
from fedmq.broker.ledger.entries import MESSAGES, PAYLOAD, segment_numbers, segment_path
from fedmq.broker.ledger.reader import LedgerTail, read_entries
from fedmq.broker.ledger.records import scan
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.wire.schema import CHUNK_BYTES
from tests.broker.ledger.payload import open_payload
from tests.broker.ledger.small_ledger import ENTRIES, accepted, name_of, put, write


def test_entries_are_read_back_as_they_were_appended(tmp_path):
    write(tmp_path, ENTRIES)
    assert list(read_entries(tmp_path)) == ENTRIES
    assert next(read_entries(tmp_path)).read().body == {"text": "hello"}


def test_nothing_is_visible_before_it_is_committed(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append(ENTRIES[0])
    assert list(read_entries(tmp_path)) == []
    ledger.commit()
    assert list(read_entries(tmp_path)) == ENTRIES[:1]
    ledger.close()


def test_an_entry_must_have_the_next_number(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append(accepted(0))
    with pytest.raises(LedgerError, match="expected entry 1, got 2"):
        ledger.append(accepted(2))
    ledger.append(accepted(1))
    ledger.close()


def test_reopening_continues_where_it_stopped(tmp_path):
    write(tmp_path, ENTRIES[:2], [b"abc"])
    ledger = Ledger(tmp_path)
    assert (ledger.next_seq, ledger.cut_bytes) == (2, 0)
    assert bytes(ledger.payload.read(name_of(b"abc"), 1, 2)) == b"bc"
    for entry in ENTRIES[2:]:
        ledger.append(entry)
    put(ledger, b"defg")
    ledger.close()
    assert list(read_entries(tmp_path)) == ENTRIES
    payload = open_payload(tmp_path)
    assert bytes(payload.read(name_of(b"defg"), 0, 4)) == b"defg"
    payload.close()


def test_a_missing_entry_is_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "_MESSAGES_SEGMENT_BYTES", 1)
    ledger = Ledger(tmp_path)
    for seq in range(3):
        ledger.append(accepted(seq))
        ledger.commit()
    ledger.close()
    middle = segment_numbers(tmp_path, MESSAGES)[1]
    segment_path(tmp_path, MESSAGES, middle).unlink()
    with pytest.raises(LedgerError, match="expected entry 1, got 2"):
        list(read_entries(tmp_path))


def test_a_blob_is_read_in_any_range_across_its_chunks_and_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "_PAYLOAD_SEGMENT_BYTES", 200)
    data = bytes(range(256)) * 2
    ledger = Ledger(tmp_path)
    name = name_of(data)
    for start in range(0, len(data), 100):
        ledger.put(name, len(data), start, data[start : start + 100])
        ledger.commit()
    assert ledger.payload.size_of(name) == 512
    ledger.payload.close()
    assert len(segment_numbers(tmp_path, PAYLOAD)) > 2
    for index in (ledger.payload, open_payload(tmp_path)):
        assert (index.have(name), index.size_of(name)) == (512, 512)
        for start in range(0, 512, 37):
            for size in (0, 1, 100, 150, 512 - start):
                size = min(size, 512 - start)
                assert bytes(index.read(name, start, size)) == data[start : start + size]
        index.close()
    ledger.close()


def test_a_blob_is_stored_once_however_often_its_chunks_come(tmp_path):
    ledger = Ledger(tmp_path)
    name = name_of(b"abcdef")
    for start, data in ((0, b"abc"), (0, b"abc"), (3, b"def"), (0, b"abc"), (3, b"def")):
        ledger.put(name, 6, start, data)
    ledger.commit()
    assert bytes(ledger.payload.read(name, 0, 6)) == b"abcdef"
    ledger.close()
    index = open_payload(tmp_path)
    assert (index.have(name), bytes(index.read(name, 2, 2))) == (6, b"cd")
    index.close()


def test_a_blob_is_scoped_by_its_owner_and_incomplete_until_its_last_byte(tmp_path):
    ledger = Ledger(tmp_path)
    name = name_of(b"abcdef")
    ledger.put(name, 6, 0, b"abc")
    ledger.commit()
    assert (ledger.payload.have(name), ledger.payload.size_of(name)) == (3, None)
    with pytest.raises(LedgerError, match="not in the ledger"):
        ledger.payload.read(name, 0, 6)
    assert ledger.payload.size_of(name_of(b"abcdef", "someone else")) is None
    with pytest.raises(LedgerError, match="of someone else is not in the ledger"):
        ledger.payload.read(name_of(b"abcdef", "someone else"), 0, 1)
    ledger.close()


def test_chunks_that_were_dropped_are_gone_for_good_and_the_blob_can_come_again(tmp_path):
    ledger = Ledger(tmp_path)
    put(ledger, b"another")
    name = name_of(b"right")
    ledger.put(name, 5, 0, b"wr")
    ledger.put(name, 5, 2, b"ong")
    ledger.discard(name, 5)
    assert (ledger.payload.have(name), ledger.payload.size_of(name)) == (0, None)
    ledger.close()
    ledger = Ledger(tmp_path)
    assert (ledger.payload.have(name), ledger.payload.size_of(name)) == (0, None)
    ledger.put(name, 5, 0, b"ri")
    ledger.put(name, 5, 2, b"ght")
    ledger.commit()
    assert bytes(ledger.payload.read(name, 0, 5)) == b"right"
    ledger.close()
    index = open_payload(tmp_path)
    assert bytes(index.read(name, 0, 5)) == b"right"
    assert bytes(index.read(name_of(b"another"), 0, 7)) == b"another"
    index.close()


def test_an_empty_blob_is_a_blob_before_and_after_reopening(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.put(name_of(b""), 0, 0, b"")
    ledger.commit()
    assert bytes(ledger.payload.read(name_of(b""), 0, 0)) == b""
    ledger.close()
    index = open_payload(tmp_path)
    assert index.size_of(name_of(b"")) == 0
    assert bytes(index.read(name_of(b""), 0, 0)) == b""
    index.close()


def test_message_segments_rotate_and_read_as_one_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "_MESSAGES_SEGMENT_BYTES", 300)
    for start in (0, 10):  # reopened in between
        ledger = Ledger(tmp_path)
        for seq in range(start, start + 10):
            ledger.append(accepted(seq))
            ledger.commit()
        ledger.close()
    firsts = segment_numbers(tmp_path, MESSAGES)
    assert firsts[0] == 0
    assert len(firsts) > 3
    assert [entry.seq for entry in read_entries(tmp_path)] == list(range(20))
    for first in firsts:
        head = next(scan(segment_path(tmp_path, MESSAGES, first))).head
        assert b"n/%d" % first in head


def test_a_tail_sees_entries_as_they_come_across_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "_MESSAGES_SEGMENT_BYTES", 200)
    follower = LedgerTail(tmp_path)
    assert list(follower.poll()) == []
    ledger = Ledger(tmp_path)
    assert list(follower.poll()) == []
    for seq in range(8):
        ledger.append(accepted(seq))
        assert list(follower.poll()) == []
        ledger.commit()
        assert [entry.seq for entry in follower.poll()] == [seq]
    ledger.close()


def test_a_tail_waits_for_the_rest_of_a_record(tmp_path):
    write(tmp_path, ENTRIES)
    path = segment_path(tmp_path, MESSAGES, 0)
    whole = path.read_bytes()
    ends = [record.end for record in scan(path)]
    path.write_bytes(b"")
    follower = LedgerTail(tmp_path)
    seen = []
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        seen += follower.poll()
        assert len(seen) == sum(end <= size for end in ends)
    assert seen == ENTRIES


def test_the_largest_chunk_that_may_arrive_can_be_read_back(tmp_path):
    data = bytes(CHUNK_BYTES)
    write(tmp_path, [], [data])
    index = open_payload(tmp_path)
    assert index.size_of(name_of(data)) == CHUNK_BYTES
    index.close()
    Ledger(tmp_path).close()
