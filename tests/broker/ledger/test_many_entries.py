"""Several messages in one record, as 0.1.0 wrote them: each is read as an entry."""

import itertools
from pathlib import Path

import pytest

import fedmq.broker.ledger.writer as ledger_module
from fedmq.broker.ledger.entries import MESSAGES, AcceptedAll, segment_path
from fedmq.broker.ledger.reader import EntryIndex, LedgerTail, read_entries
from fedmq.broker.ledger.writer import Ledger
from tests.broker.ledger.small_ledger import accepted


def many(seq, count, size=0):
    messages = (accepted(number, "x" * size).message for number in range(seq, seq + count))
    return AcceptedAll(seq=seq, at=float(seq), messages=tuple(messages))


def write(folder, counts):
    """Write records with these numbers of messages; return the entries, one for each message."""
    ledger, entries = Ledger(folder), []
    for count in counts:
        if count == 1:
            entries.append(accepted(len(entries)))
            ledger.append(entries[-1])
        else:
            record = many(len(entries), count)
            ledger.append(record)
            entries += record.each()
            ledger.next_seq = len(entries)  # `append` counts a record as one entry
        ledger.commit()
    ledger.close()
    return entries


@pytest.mark.parametrize("segment_bytes", [1, 5000, 1 << 20])
def test_each_of_many_is_an_entry_of_its_own(tmp_path, monkeypatch, segment_bytes):
    monkeypatch.setattr(ledger_module, "_MESSAGES_SEGMENT_BYTES", segment_bytes)
    monkeypatch.setattr(ledger_module, "_RECENT_BYTES", 2000)
    entries = write(tmp_path, [1, 200, 1, 1, 63, 64, 65, 3, 1, 130, 1])
    assert list(read_entries(tmp_path)) == entries
    index, follower = EntryIndex(tmp_path), LedgerTail(tmp_path)
    for entry in follower.poll():
        index.add(entry.seq, *follower.at)
    ledger = Ledger(tmp_path)
    for seq in [*range(len(entries)), *range(len(entries) - 1, -1, -7)]:
        assert index.read(seq) == ledger.read(seq) == entries[seq]
    assert ledger.next_seq == len(entries)
    ledger.close()


def test_a_reader_that_stops_in_the_middle_of_many_continues_there(tmp_path):
    entries = write(tmp_path, [2, 5, 1, 4])
    follower = LedgerTail(tmp_path)
    found = []
    for count in (1, 3, 2, 3, 100):
        found += itertools.islice(follower.poll(), count)
    assert found == entries


def test_of_many_that_are_torn_none_is_kept(tmp_path):
    entries = write(tmp_path, [2, 6])
    path = segment_path(tmp_path, MESSAGES, 0)
    whole = path.read_bytes()
    for cut in range(1, 200, 7):
        path.write_bytes(whole[:-cut])
        assert list(read_entries(tmp_path)) == entries[:2]
        copy = Path(tmp_path / f"cut-{cut}")
        copy.mkdir()
        segment_path(copy, MESSAGES, 0).write_bytes(whole[:-cut])
        ledger = Ledger(copy)
        assert (ledger.next_seq, ledger.cut_bytes > 0) == (2, True)
        ledger.close()
