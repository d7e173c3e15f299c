"""Reading is a right: a node gets the blobs of what was delivered to it, or posted by it."""

import pytest

from fedmq.broker.access.rights import LOCAL, Origin, Rights
from fedmq.broker.core.state import MAX_READABLE
from fedmq.broker.wire.chunked_transfer import Owned
from fedmq.broker.wire.schema import Chunk, ChunkRequest, Deliver, Done, Welcome, digest

AGG, W1, W2 = b"agg:1", b"w1:s1", b"w2:s1"


@pytest.fixture
def room(bench):
    bench.joined("agg", "aggregator", session="1")
    bench.joined("w1", clients=((0, 4),))
    bench.joined("w2", clients=((5, 9),))
    return bench


def read(room, peer, owner, data, start=0, size=None):
    """Request a blob; return the bytes that come, or None for the answer of a missing blob."""
    room.sent.pop(peer, None)
    size = len(data) - start if size is None else size
    room.say(peer, ChunkRequest(owner=owner, digest=digest(data), start=start, size=size))
    [(chunk, buffers)] = room.sent.pop(peer)
    assert chunk == Chunk(owner=owner, digest=digest(data), start=start)
    return bytes(buffers[0]) if buffers else None


def task(room, client, data):
    room.post(AGG, f"client/{client}", blobs=[data])
    return len(room.entries) - 1


def test_a_node_reads_what_was_delivered_to_it_until_it_has_handled_it(room):
    assert read(room, W1, "agg", b"model") is None
    seq = task(room, 0, b"model")
    assert read(room, W1, "agg", b"model") == b"model"
    assert read(room, W1, "agg", b"model", 2, 2) == b"de"
    assert read(room, W2, "agg", b"model") is None
    room.tell(W1, Done(seqs=(seq,)))
    assert read(room, W1, "agg", b"model") is None


def test_no_answer_tells_whether_a_blob_exists(room):
    """A forbidden blob, a missing one, and a range past the end get the same answer."""
    task(room, 0, b"model")
    assert read(room, W2, "agg", b"model") is None
    assert read(room, W2, "agg", b"nothing") is None
    assert read(room, W1, "agg", b"model", 2, 9) is None


def test_a_node_reads_what_it_has_posted_and_the_aggregator_all_of_its_run(room):
    room.post(W1, "aggregator", blobs=[b"result"])
    assert read(room, W1, "w1", b"result") == b"result"
    assert read(room, W2, "w1", b"result") is None
    assert read(room, AGG, "w1", b"result") == b"result"
    room.joined("agg", "aggregator", run="q", session="9", peer=b"q:9")
    assert read(room, b"q:9", "w1", b"result") is None
    assert read(room, b"q:9", "agg", b"result") is None


def test_the_bytes_of_a_checkpoint_are_the_aggregators(room):
    room.post(AGG, "checkpoint", blobs=[b"state"])
    assert read(room, W1, "agg", b"state") is None
    new = room.join("agg", "aggregator", session="2")
    assert room.take(new, Welcome)[0].checkpoint is not None
    assert read(room, new, "agg", b"state") == b"state"
    room.restart()
    new = room.joined("agg", "aggregator", session="3")
    assert read(room, new, "agg", b"state") == b"state"


def test_a_message_that_is_queued_and_not_delivered_gives_no_right(room):
    room.restart()
    room.join("agg", "aggregator", session="1")
    task(room, 0, b"model")  # w1 is awaited
    peer = room.joined("w3")
    assert read(room, peer, "agg", b"model") is None
    room.join("w1", clients=((0, 4),))
    assert read(room, W1, "agg", b"model") == b"model"


@pytest.mark.parametrize("then", ["reconnect", "restart", "lapse"])
def test_a_session_goes_on_reading_what_it_has(room, then):
    seq = task(room, 0, b"model")
    if then == "restart":
        room.restart()
    elif then == "lapse":
        room.wake(room.now + 30.0)
    room.take(W1)
    room.join("w1", clients=((0, 4),), got=seq + 1)
    assert room.take(W1, Deliver) == []
    assert read(room, W1, "agg", b"model") == b"model"


def test_a_message_that_moves_takes_its_right_along(room):
    task(room, 0, b"model")
    room.wake(room.now + 30.0)
    new = room.join("w3", clients=((0, 4),))
    assert read(room, new, "agg", b"model") == b"model"
    room.join("w1", session="2", clients=())
    assert read(room, b"w1:2", "agg", b"model") is None


def test_what_a_node_may_read_is_bounded_in_memory(room):
    node = room.core._mailboxes.runs["r"].nodes["w1"]
    room.validates = False
    for number in range(2 * MAX_READABLE):
        seq = task(room, 0, b"model %d" % number)
        room.tell(W1, Done(seqs=(seq,), taken=seq + 1))
        room.take(W1)
    assert len(node.readable) <= MAX_READABLE + 1
    task(room, 0, b"the last")
    assert node.may_read(Owned("agg", digest(b"the last")))


def test_only_nodes_that_may_read_files_learn_where_blobs_are(new_bench):
    bench = new_bench()
    key = "k" * 40
    bench.allow(Rights(name="k", key=key), keyless=LOCAL)
    agg = bench.joined("agg", "aggregator", session="1")
    bench.say(agg, ChunkRequest(owner="x", digest=b"d" * 16, start=0, size=1))
    data = bytes(300_000)
    sends = {}
    for name, origin in (("far", Origin(key)), ("near", Origin())):
        client = 0 if name == "far" else 1
        peer = name.encode()
        bench.join(name, clients=((client, client),), origin=origin, peer=peer)
        actions = bench.post(b"agg:1", f"client/{client}", blobs=[data])
        sends[name] = [each for each in actions if getattr(each, "peer", b"") == peer]
    assert [len(each.apart) for each in sends["far"]] == [0]
    assert [len(each.apart) for each in sends["near"]] == [1]
    nodes = bench.core._mailboxes.runs["r"].nodes
    assert (nodes["far"].pointed_bytes, nodes["near"].pointed_bytes) == (0, len(data))


def test_a_node_reads_a_blob_until_the_last_delivery_that_names_it_is_handled(room):
    """In whatever order it handles them."""
    first, second, third = (task(room, client, b"model") for client in (0, 1, 2))
    for seq in (third, first):
        room.tell(W1, Done(seqs=(seq,)))
        assert read(room, W1, "agg", b"model") == b"model"
    room.tell(W1, Done(seqs=(second,)))
    assert read(room, W1, "agg", b"model") is None
