"""What the broker skips for most messages: it still decides as if it had looked everything up."""

import pytest

from fedmq.broker.core import delivery
from fedmq.broker.ledger.entries import BlobName
from fedmq.broker.rejections import Code
from fedmq.broker.settings import Limits
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Blob, Chunk, ChunkRequest, Deliver, Message, Post, digest

AGG, W1, W2 = b"agg:1", b"w1:s1", b"w2:s1"
MB = 1_000_000


def joined(bench):
    bench.joined("agg", "aggregator", session="1")
    bench.joined("w1", clients=((0, 4),))
    bench.joined("w2", clients=((5, 9),))
    return bench


@pytest.fixture
def room(bench):
    return joined(bench)


def node(bench, name):
    return bench.core._mailboxes.runs["r"].nodes[name]


def codes(bench):
    return [each.code for each in bench.refusals()]


def name_blobs(bench, peer, *blobs):
    """Post a note to the record; its blobs do not come with it."""
    sender, number = peer.decode().partition(":")[0], bench.numbers[peer]
    given = {"kind": "note", "id": f"{sender}/{number}", "run": "r", "sender": sender}
    bench.tell(peer, Post(message=encode_message(Message(to="record", blobs=blobs, **given))))


@pytest.mark.parametrize("most", [0, 1, 100])
def test_an_answer_is_checked_against_its_request_whether_or_not_its_id_is_kept(
    room, monkeypatch, most
):
    monkeypatch.setattr(delivery, "MAX_REQUESTS", most)
    for number in range(3):
        room.post(AGG, "client/0", kind="task", id=f"task/{number}")
    tasks = room.take(W1, Deliver)
    assert len(node(room, "w1").requests) == min(most, 3)
    room.post(W1, "aggregator", kind="result", re="task/1", consumes=(tasks[2].seq,))
    assert codes(room) == [Code.NOT_ASKED]
    for number in (0, 1):
        given = {"re": f"task/{number}", "consumes": (tasks[number].seq,)}
        room.post(W1, "aggregator", kind="result", **given)
        room.post(W1, "aggregator", kind="result", id=f"again/{number}", **given)
    assert codes(room) == [Code.NOT_ASKED] * 3
    assert not {each.seq for each in tasks[:2]} & node(room, "w1").requests.keys()


def test_a_restarted_broker_checks_answers_to_what_it_delivered_before(room):
    room.post(AGG, "client/0", kind="task", id="task/0")
    [task] = room.take(W1, Deliver)
    room.restart()
    room.joined("agg", "aggregator", session="1", first=1)
    room.joined("w1", clients=((0, 4),), got=task.seq + 1)
    assert not node(room, "w1").requests
    room.post(W1, "aggregator", kind="result", re="task/9", consumes=(task.seq,))
    assert codes(room) == [Code.NOT_ASKED]


def test_a_stored_blob_that_is_deleted_while_its_post_waits_is_fetched_again(room):
    room.post(W1, "record", blobs=[b"stored"])
    stored, late = Blob.of(b"stored"), Blob.of(b"late")
    name_blobs(room, W1, stored, late)
    assert [each.digest for each in room.take(W1, ChunkRequest)] == [late.digest]
    name = BlobName("r", "w1", stored.digest)
    del room.blobs[name], room.sizes[name]
    room.say(W1, Chunk(owner="w1", digest=late.digest, start=0), b"late")
    assert [each.digest for each in room.take(W1, ChunkRequest)] == [stored.digest]
    assert "w1/1" not in [each.id for each in room.messages()]
    room.say(W1, Chunk(owner="w1", digest=stored.digest, start=0), b"stored")
    assert [each.id for each in room.messages() if each.kind == "note"] == ["w1:s1/0", "w1/1"]


def test_a_duplicate_of_a_post_that_was_applied_at_once_changes_nothing(room):
    room.post(W1, "record", id="same", blobs=[b"stored"])
    count = len(room.entries)
    room.post(W1, "record", id="same", blobs=[b"stored"])
    assert len(room.entries) == count
    room.post(W1, "record", id="same", blobs=[b"another"])
    assert codes(room) == [Code.DUPLICATE_ID]


def test_usage_is_compared_again_after_others_have_filled_the_run(new_bench):
    room = joined(new_bench(limits=Limits(node_disk=1000 * MB, run_disk=1000 * MB)))
    name_blobs(room, W1, Blob(digest(b"small"), 100))
    assert node(room, "w1").unchecked_bytes > 0.9 * MB
    name_blobs(room, W2, Blob(digest(b"large"), 990 * MB))
    name_blobs(room, W1, Blob(digest(b"too large"), 20 * MB))
    room.say(W1, Chunk(owner="w1", digest=digest(b"small"), start=0))  # it has none
    assert codes(room) == [Code.MISSING_BLOB, Code.LIMIT]


def test_no_node_can_store_more_than_its_limit_in_small_steps(new_bench):
    room = joined(new_bench(limits=Limits(node_disk=3 * MB)))
    for number in range(400):
        room.post(W1, "record", "x" * 900, blobs=[b"%d" % number + bytes(9000)])
        if room.refusals():
            break
    used = sum(len(data) for name, data in room.blobs.items() if name.owner == "w1")
    used += node(room, "w1").run.message_bytes["w1"]
    assert 2.98 * MB < used <= 3 * MB
