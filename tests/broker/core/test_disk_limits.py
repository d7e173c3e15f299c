"""What a node and a run may store is limited; the rest is rejected before its blobs are fetched."""

import pytest

from fedmq.broker.ledger.blob_store import BlobStore
from fedmq.broker.ledger.entries import BlobName, Opened
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.rejections import Code
from fedmq.broker.settings import BrokerSettings, Limits
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Blob, Chunk, ChunkRequest, Message, Post, digest

AGG, W1, W2 = b"agg:s1", b"w1:s1", b"w2:s1"
NODE, RUN = 3_000_000, 5_000_000


@pytest.fixture
def room(bench):
    bench.settings = BrokerSettings(limits=Limits(node_disk=NODE, run_disk=RUN))
    bench.restart()
    bench.joined("agg", "aggregator")
    bench.joined("w1", clients=((0, 4),))
    bench.joined("w2", clients=((5, 9),))
    return bench


def warned(room):
    return [each.fields["limit"] for each in room.logs if "limit" in each.fields]


def post(room, peer, *blobs, text=""):
    """Post a note to the record; its blobs do not come with it."""
    name = peer.decode().partition(":")[0]
    number = room.numbers[peer]
    message = Message(
        kind="note",
        id=f"{name}/{number}",
        run="r",
        sender=name,
        to="record",
        body={"text": text},
        blobs=blobs,
    )
    room.tell(peer, Post(message=encode_message(message)))


def codes(room):
    return [each.code for each in room.refusals()]


def test_a_node_may_store_up_to_its_limit(room):
    data = bytes(1_000_000)
    for number in range(2):
        room.post(W1, "record", blobs=[bytes([number]) + data])
    assert not room.refusals()
    room.post(W1, "record", blobs=[b"2" + data])
    [refusal] = room.refusals()
    assert refusal.code == Code.LIMIT
    assert "broker.limits.node_disk" in refusal.reason
    room.post(W1, "record", blobs=[bytes([0]) + data])  # stored already
    assert len(room.refusals()) == 1
    room.post(W2, "record", blobs=[bytes([7]) + data])
    assert len(room.refusals()) == 1


def test_blobs_on_their_way_count_and_a_rejected_one_is_not_fetched(room):
    post(room, W1, Blob(digest(b"large"), NODE - 10_000))
    assert room.take(W1, ChunkRequest)
    post(room, W1, Blob(digest(b"more"), 20_000))
    assert not room.take(W1, ChunkRequest)
    room.say(W1, Chunk(owner="w1", digest=digest(b"large"), start=0))  # it has none
    assert codes(room) == [Code.MISSING_BLOB, Code.LIMIT]
    post(room, W1, Blob(digest(b"more"), 20_000))
    assert room.take(W1, ChunkRequest)


def test_a_run_has_a_limit_of_its_own(room):
    post(room, W1, Blob(digest(b"one"), 2_500_000))
    post(room, W2, Blob(digest(b"two"), 2_490_000))
    assert not room.refusals()
    post(room, AGG, Blob(digest(b"three"), 20_000))
    [refusal] = room.refusals()
    assert refusal.code == Code.LIMIT
    assert "broker.limits.run_disk" in refusal.reason


def test_messages_count_also_after_a_restart(room):
    for _ in range(74):
        post(room, W1, text="x" * 40_000)
    assert not room.refusals()
    room.restart()
    room.joined("agg", "aggregator")
    room.joined("w1", clients=((0, 4),), first=74)
    post(room, W1, text="x" * 20_000)
    assert not room.refusals()
    post(room, W1, text="x" * 40_000)
    assert codes(room) == [Code.LIMIT]


def test_bytes_are_counted_by_owner_until_their_segment_is_deleted(tmp_path):
    ledger = Ledger(tmp_path, retain_bytes=0)
    ledger.append(Opened(seq=0, at=0.0, run="r", config="", total_clients=1))
    data = bytes(1 << 20)
    for number in range(10):
        owner = "a" if number % 2 else "b"
        ledger.put(BlobName("r", owner, bytes([number]) * 16), len(data), 0, data)
        ledger.commit()
    of_a, of_run = ledger.used("r", "a")
    assert 5 * len(data) < of_a < 5.001 * len(data)
    assert 10 * len(data) < of_run < 10.001 * len(data)
    ledger.close()
    index = BlobStore(tmp_path)
    index.add_segment(0)
    assert index.usage.of("r", "a") == (of_a, of_run)
    index.remove_segment(0)
    assert index.usage.of("r", "a") == (0, 0)


def test_a_warning_is_logged_once_when_nine_tenths_are_used(room):
    post(room, W1, Blob(digest(b"one"), 2_690_000))
    assert not warned(room)
    post(room, W1, Blob(digest(b"two"), 20_000))
    post(room, W1, Blob(digest(b"three"), 20_000))
    assert warned(room) == ["broker.limits.node_disk"]
    post(room, W2, Blob(digest(b"four"), 2_000_000))
    assert warned(room) == ["broker.limits.node_disk", "broker.limits.run_disk"]
    assert not room.refusals()
