"""Faulty and hostile nodes: each of these once ended the broker or another node."""

import pytest

from fedmq.broker.ledger.entries import Accepted, BlobName, Ended, Opened
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.recovery import open_broker
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import (
    Blob,
    Chunk,
    ChunkRequest,
    Deliver,
    Goodbye,
    Message,
    Post,
    Reject,
    RunEnded,
    Welcome,
    digest,
)
from tests.broker.clocks import stopped_clock

AGG, W1 = b"agg:s1", b"w1:s1"


@pytest.fixture
def room(bench):
    bench.joined("agg", "aggregator")
    bench.joined("w1", clients=((0, 4),))
    bench.take(AGG)
    return bench


def test_a_blob_cannot_be_named_with_another_size(room):
    """Its recipient would allocate memory for the claimed size."""
    data = b"small"
    room.post(W1, "aggregator", "honest", blobs=[data])
    lie = Blob(digest(data), 1 << 40)
    message = Message(kind="note", id="w1/9", run="r", sender="w1", to="aggregator", blobs=(lie,))
    room.tell(W1, Post(message=encode_message(message)))
    [refusal] = room.refusals()
    assert "to have 5 bytes" in refusal.reason
    nothing = Blob(digest(b"something"), 0)
    message = Message(kind="note", id="w1/8", run="r", sender="w1", to="record", blobs=(nothing,))
    room.tell(W1, Post(message=encode_message(message)))
    assert "expected the digest of no bytes" in room.refusals()[-1].reason


def test_a_wrong_blob_size_is_rejected_also_behind_a_right_one(room):
    """Both wait for the same bytes, whose last chunk must not confirm both sizes."""
    data = bytes(range(256)) * 2048
    truth = Message(
        kind="note", id="w1/0", run="r", sender="w1", to="record", blobs=(Blob.of(data),)
    )
    lie = Message(
        kind="note",
        id="w1/1",
        run="r",
        sender="w1",
        to="aggregator",
        blobs=(Blob(digest(data), 1 << 30),),
    )
    room.tell(W1, Post(message=encode_message(truth)))
    room.tell(W1, Post(message=encode_message(lie)))
    room.say(W1, Chunk(owner="w1", digest=digest(data), start=0), data)
    [refusal] = room.refusals()
    assert refusal.id == "w1/1"
    assert f"to have {len(data)} bytes" in refusal.reason


def test_a_number_consumed_twice_counts_once(room):
    room.post(AGG, "client/0", "task")
    [deliver] = room.take(W1, Deliver)
    room.post(W1, "record", "done", consumes=(deliver.seq, deliver.seq))
    assert room.entries[-1].consumes == (deliver.seq,)
    assert deliver.seq not in room.pending()


def test_an_older_aggregator_does_not_come_back_after_a_newer_one_was_there(bench):
    bench.joined("agg", "aggregator", session="1", key="k")
    newer = bench.joined("agg", "aggregator", session="2", key="k")
    bench.say(newer, Goodbye())
    peer = bench.join("agg", "aggregator", session="1", key="k", got=3, peer=b"agg:late")
    [reject] = bench.take(peer, Reject)
    assert reject.code == "replaced"


def test_ranges_that_name_more_clients_than_there_are_are_rejected_at_once(bench):
    bench.joined("agg", "aggregator")
    peer = bench.join("greedy", clients=((0, 9),) * 1000)
    assert not bench.take(peer, Welcome)
    peer = bench.join("agg2", "aggregator", run="q", total_clients=1 << 62)
    [reject] = bench.take(peer, Reject)
    assert "clients" in reject.reason


def test_a_node_that_fails_says_so_and_its_task_counts_the_death(room):
    room.post(AGG, "client/0", "deadly")
    room.say(W1, Goodbye(reason="MemoryError", failed=True))
    [(_, body)] = room.said("left")
    assert room.entries[body["interrupted"]].read().body["text"] == "deadly"


def test_the_end_of_a_run_of_very_many_nodes_can_be_read_again(room, tmp_path):
    room.validates = False
    for number in range(3000):
        name = f"node-{number:04d}-" + "x" * 90
        peer = room.join(name)
        room.say(peer, Goodbye())
    room.tell(AGG, RunEnded(reason="done"))
    [ended] = [entry for entry in room.entries if isinstance(entry, Ended)]
    total = sum(each["sessions"] for each in ended.nodes.values())
    assert total == 3002
    ledger = Ledger(tmp_path)
    for entry in room.entries:
        ledger.append(entry)
    ledger.close()
    assert sum(1 for _ in read_entries(tmp_path)) == len(room.entries)


def test_a_post_rejected_before_a_restart_is_recognised(room):
    message = Message(kind="note", id="w1/0", run="r", sender="w1", to="client/99")
    room.tell(W1, Post(message=encode_message(message)))
    assert len(room.refusals()) == 1
    room.restart()
    room.join("agg", "aggregator")
    room.join("w1", clients=((0, 4),))
    room.say(W1, Post(n=0, message=encode_message(message)))
    assert len(room.refusals()) == 1


def test_chunks_of_a_resuming_upload_are_kept(tmp_path):
    """A new index once found no user of these chunks, and they were deleted."""
    name = BlobName("r", "agg", b"d" * 16)
    ledger = Ledger(tmp_path)
    ledger.append(Opened(seq=0, at=0.0, run="r", config="", total_clients=1))
    ledger.put(name, 100, 0, b"x" * 40)
    ledger.close()
    ledger, _ = open_broker(tmp_path, BrokerSettings(), stopped_clock(), retain_bytes=0)
    assert ledger.resume(name, 100)[0] == 40
    ledger.payload.finish(BlobName("r", "agg", b"e" * 16))
    assert ledger.payload.needs_segment(0)
    ledger.unpin([name])
    assert not ledger.payload.needs_segment(0)
    ledger.close()


def test_each_request_gets_one_answer_and_a_flood_is_bounded(room):
    room.say(W1, ChunkRequest(owner="agg", digest=b"d" * 16, start=0, size=1))
    assert len(room.take(W1)) == 1
    assert all(isinstance(entry, Opened | Accepted) for entry in room.entries)


def test_a_restarted_broker_syncs_the_old_ledger_before_it_acknowledges(tmp_path, monkeypatch):
    """The earlier broker may not have synced it; a duplicate is acknowledged at once."""
    ledger = Ledger(tmp_path)
    ledger.append(Opened(seq=0, at=0.0, run="r", config="", total_clients=1))
    ledger.close()
    synced = []
    monkeypatch.setattr("os.fsync", synced.append)
    ledger = Ledger(tmp_path, durability="power")
    opening = len(synced)
    assert opening > 3  # messages, payload, the folder and those above it
    ledger.commit()
    assert len(synced) == opening
    ledger.close()
