"""Retention deletes only payload that no unfinished message needs."""

from unittest import mock

import msgspec
import pytest

import fedmq.broker.ledger.blob_store as payload_module
import fedmq.broker.ledger.writer as ledger_module
from fedmq.broker.core.events import ReceivedFrom
from fedmq.broker.driver import BrokerDriver
from fedmq.broker.errors import LedgerError
from fedmq.broker.ledger.blob_store import BlobStore
from fedmq.broker.ledger.entries import PAYLOAD, Consumed, Ended, segment_numbers
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.settings import BrokerSettings, LedgerSettings
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import (
    Blob,
    Hello,
    Message,
    Post,
    RunEnded,
)
from tests.broker.clocks import stopped_clock
from tests.broker.ledger.payload import open_payload
from tests.broker.ledger.small_ledger import accepted, name_of, put

SIZE = 300
"""Size of a blob: two of them fill a segment in these tests."""


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    monkeypatch.setattr(ledger_module, "_PAYLOAD_SEGMENT_BYTES", 2 * SIZE)


def blob(number):
    return bytes([number]) * SIZE


def fill(ledger, *numbers, used=True):
    """Put blobs, each with the message that names it, number by number."""
    for number in numbers:
        put(ledger, blob(number))
        entry = accepted(ledger.next_seq)
        ledger.append(entry)
        ledger.use(entry.seq, [name_of(blob(number))] if used else [])
        ledger.commit()


def there(ledger, numbers):
    """Return which of these blobs are complete."""
    found = []
    for number in numbers:
        name = name_of(blob(number))
        if ledger.size_of(name) == SIZE:
            assert bytes(ledger.payload.read(name, 1, SIZE - 1)) == blob(number)[1:]
            found.append(number)
    return found


def consume(ledger, *seqs):
    ledger.append(Consumed(seq=ledger.next_seq, at=0.0, node="n", of=seqs))
    ledger.commit()


def test_by_default_everything_is_kept(tmp_path):
    ledger = Ledger(tmp_path)
    fill(ledger, *range(8))
    consume(ledger, *range(8))
    fill(ledger, 8, 9)
    assert there(ledger, range(10)) == list(range(10))
    ledger.close()


def test_full_segments_that_nobody_needs_are_deleted_oldest_first(tmp_path):
    ledger = Ledger(tmp_path, retain_bytes=0)
    fill(ledger, *range(6))
    assert segment_numbers(tmp_path, PAYLOAD) == [0, 1, 2, 3]
    consume(ledger, 0, 1, 2, 4, 5)  # 3 is in the second segment
    fill(ledger, 6, 7)
    assert segment_numbers(tmp_path, PAYLOAD) == [1, 3, 4]
    assert there(ledger, range(8)) == [2, 3, 6, 7], "2 shares a segment with 3"
    ledger.close()
    assert [entry.seq for entry in read_entries(tmp_path)] == list(range(9))


def test_the_limit_of_bytes_is_retained(tmp_path):
    limit = 10 * SIZE
    ledger = Ledger(tmp_path, retain_bytes=limit)
    for number in range(12):
        fill(ledger, number)
        consume(ledger, ledger.next_seq - 1)
        assert sum(path.stat().st_size for path in tmp_path.glob(f"{PAYLOAD}-*.log")) <= limit
    kept = there(ledger, range(12))
    assert kept == list(range(12))[-len(kept) :], "the newest"
    assert 4 <= len(kept) <= 6
    ledger.close()


def test_a_blob_stays_while_any_message_that_names_it_is_unfinished(tmp_path):
    ledger = Ledger(tmp_path, retain_bytes=0)
    fill(ledger, 0)
    again = accepted(ledger.next_seq)
    ledger.append(again)
    ledger.use(again.seq, [name_of(blob(0))])
    consume(ledger, 0)
    fill(ledger, 1, 2, 3)
    assert there(ledger, [0]) == [0]
    consume(ledger, again.seq, 3)  # with it, what shares its segment
    fill(ledger, 4, 5)
    assert there(ledger, [0]) == []
    with pytest.raises(LedgerError, match="is not in the ledger"):
        ledger.payload.read(name_of(blob(0)), 0, SIZE)
    ledger.close()


def test_a_consumed_message_does_not_keep_its_blobs(tmp_path):
    ledger = Ledger(tmp_path, retain_bytes=0)
    fill(ledger, 0, 1)
    ledger.append(accepted(ledger.next_seq, consumes=(0, 1)))
    fill(ledger, 2, 3)
    assert there(ledger, range(4)) == [2, 3]
    ledger.close()


def test_the_end_of_a_run_unpins_its_blobs_only(tmp_path):
    ledger = Ledger(tmp_path, retain_bytes=0)
    other = msgspec.structs.replace(name_of(blob(9)), run="q")
    ledger.put(other, SIZE, 0, blob(9))
    ledger.use(10**6, [other])
    ledger.commit()
    fill(ledger, *range(5))
    ledger.append(Ended(seq=ledger.next_seq, at=0.0, run="r", reason="done"))
    fill(ledger, 5, 6)
    assert there(ledger, range(2, 5)) == []
    assert ledger.size_of(other) == SIZE
    ledger.close()


def test_an_arriving_blob_stays_until_its_message_comes(tmp_path):
    """A large blob arrives chunk by chunk, while others come and go."""
    ledger = Ledger(tmp_path, retain_bytes=0)
    large = bytes(range(256)) * 4
    name = name_of(large)
    for start in range(0, len(large), 256):
        ledger.put(name, len(large), start, large[start : start + 256])
        fill(ledger, start // 256)
        consume(ledger, ledger.next_seq - 1)
    assert bytes(ledger.payload.read(name, 0, len(large))) == large
    ledger.close()


def test_a_reopened_ledger_keeps_what_is_unfinished_and_may_delete_the_rest(tmp_path):
    ledger = Ledger(tmp_path)
    fill(ledger, *range(6))
    ledger.close()
    ledger = Ledger(tmp_path, retain_bytes=0)
    ledger.use(2, [name_of(blob(2))])
    fill(ledger, 6, 7)
    assert set(there(ledger, range(6))) == {2, 3}
    ledger.close()
    index = open_payload(tmp_path)
    assert index.size_of(name_of(blob(2))) == SIZE
    assert index.size_of(name_of(blob(0))) is None
    index.close()


def test_a_blob_that_was_deleted_can_come_again(tmp_path):
    ledger = Ledger(tmp_path, retain_bytes=0)
    fill(ledger, 0, 1)
    consume(ledger, 0, 1)
    fill(ledger, 2, 3)
    assert there(ledger, [0, 1]) == []
    fill(ledger, 0)
    assert there(ledger, [0]) == [0]
    ledger.close()


def test_memory_does_not_grow_with_unneeded_blobs(tmp_path, monkeypatch):
    monkeypatch.setattr(payload_module, "_IDLE_BLOBS", 5)
    ledger = Ledger(tmp_path)
    for number in range(50):
        fill(ledger, number)
        consume(ledger, ledger.next_seq - 1)
    assert len(ledger.payload._blobs) <= 6
    assert there(ledger, [49]) == [49]
    ledger.close()


def test_a_segment_is_needed_until_each_message_that_names_its_blobs_is_finished(tmp_path):
    ledger = Ledger(tmp_path)
    fill(ledger, 0, 1, 2)
    ledger.close()
    index = BlobStore(tmp_path)
    for number in segment_numbers(tmp_path, PAYLOAD):
        index.add_segment(number, verify=True)
    index.use(name_of(blob(0)))
    assert index.needs_segment(0)
    index.finish(name_of(blob(0)))
    assert not index.needs_segment(0)
    index.remove_segment(0)
    assert [index.size_of(name_of(blob(number))) for number in range(3)] == [None, None, SIZE]
    index.close()


# ---- with a broker


class Room:
    """A broker core and its ledger, with an aggregator that hosts nobody."""

    def __init__(self, folder):
        port = mock.Mock()  # of nodes that hear nothing
        port.queued.return_value = 0
        settings = LedgerSettings(retain_bytes=0, share_files=False)
        self.driver = BrokerDriver.open(folder, BrokerSettings(), settings, port, stopped_clock())
        self.ledger = self.driver.ledger
        hello = {"session": "s", "run": "r", "config": "c", "total_clients": 3}
        self.say(Hello(node="agg", role="aggregator", **hello))
        self.n = 0

    def say(self, frame, *buffers):
        self.driver.turn([ReceivedFrom(b"agg", frame, buffers)])

    def post(self, to, data, **more):
        names = (Blob.of(data),)
        fields = {"kind": "note", "run": "r", "sender": "agg", "blobs": names, **more}
        message = Message(id=f"agg/{self.n}", to=to, **fields)
        self.say(Post(n=self.n, message=encode_message(message), inline=(0,)), data)
        self.n += 1


def test_only_the_newest_checkpoint_is_kept(tmp_path):
    room = Room(tmp_path)
    for number in range(10):
        room.post("checkpoint", blob(number))
    kept = segment_numbers(tmp_path, PAYLOAD)
    assert len(kept) <= 3
    assert room.ledger.size_of(name_of(blob(9), "agg")) == SIZE
    room.ledger.close()


def test_messages_for_an_absent_client_are_kept(tmp_path):
    room = Room(tmp_path)
    room.post("client/0", blob(0))
    for number in range(1, 10):
        room.post("checkpoint", blob(number))
    assert room.ledger.size_of(name_of(blob(0), "agg")) == SIZE
    room.say(RunEnded(n=room.n, reason="done"))
    room.ledger.close()


@pytest.mark.parametrize("what", ["a record", "a message that is refused"])
def test_records_do_not_keep_segments(tmp_path, what):
    """Otherwise a run that records blobs for days would fill the disk despite its limit."""
    room = Room(tmp_path)
    for number in range(10):
        room.post("record" if what == "a record" else "client/99", blob(number))
    assert len(segment_numbers(tmp_path, PAYLOAD)) <= 3
    room.ledger.close()
