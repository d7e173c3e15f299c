import msgpack
import pytest

from fedmq.broker.core.delivery import ACK_WITHIN_S
from fedmq.broker.core.events import Append, Put, SendTo
from fedmq.broker.core.state import UPLOAD_WINDOW_CHUNKS
from fedmq.broker.core.uploads import (
    SMALL_MESSAGE_PERIOD_S,
    SMALL_MESSAGE_RATE,
    UPLOAD_CHUNKS_AMID_SMALL_MESSAGES,
)
from fedmq.broker.ledger.entries import BlobName
from fedmq.broker.wire.encoding import decode_frame
from fedmq.broker.wire.schema import (
    CHUNK_BYTES,
    MAX_HEADER_BYTES,
    POST_BYTES,
    Ack,
    Chunk,
    ChunkRequest,
    Deliver,
    Done,
    Post,
    UnknownSession,
    digest,
)


@pytest.fixture
def room(bench):
    """An aggregator, and two workers with clients 0-4 and 5-9."""
    bench.joined("agg", "aggregator")
    bench.joined("w1", clients=((0, 4),))
    bench.joined("w2", clients=((5, 6), (7, 9)))
    bench.sent.clear()
    bench.numbers.clear()
    return bench


AGG, W1, W2 = b"agg:s1", b"w1:s1", b"w2:s1"


def upto(room, peer):
    """Return the latest acknowledgment that is sent in time, or None."""
    room.wake(room.now + ACK_WITHIN_S)
    said = [frame.upto for frame, _ in room.sent.pop(peer, []) if isinstance(frame, Ack)]
    assert said == sorted(said)
    return said[-1] if said else None


def refused(room, peer):
    """Take the rejections of a node's messages: (id, reason, by)."""
    said = [each for each in room.inbox(peer) if each.kind == "refused"]
    assert all(each.re == each.body["id"] for each in said)
    return [(each.body["id"], each.body["reason"], each.body["by"]) for each in said]


def last(room):
    return room.entries[-1]


def feed(room, peer, *blobs, limit=None):
    """Answer the broker's requests from these bytes; return the number of answers."""
    by_digest = {digest(data): data for data in blobs}
    answered = 0
    while limit is None or answered < limit:
        wants = [frame for frame, _ in room.sent[peer] if isinstance(frame, ChunkRequest)]
        assert len(wants) <= UPLOAD_WINDOW_CHUNKS
        if not wants:
            break
        want = wants[0]
        room.sent[peer] = [each for each in room.sent[peer] if each[0] is not want]
        piece = by_digest[want.digest][want.start : want.start + want.size]
        chunk = Chunk(owner=want.owner, digest=want.digest, start=want.start)
        room.say(peer, chunk, piece)
        answered += 1
    return answered


def test_a_message_reaches_whichever_node_hosts_its_client(room):
    for client in (0, 4, 5, 7, 9):
        room.post(AGG, f"client/{client}", f"task {client}")
    assert room.texts(W1) == ["task 0", "task 4"]
    assert room.texts(W2) == ["task 5", "task 7", "task 9"]
    room.post(W1, "aggregator", "result")
    assert room.texts(AGG) == ["result"]


def test_an_address_has_one_spelling(room):
    """Otherwise a message for an address that no node ever hosts would be pending for ever."""
    room.post(AGG, "client/004", "task")
    assert room.texts(W1) == ["task"] or room.refusals()


def test_a_record_is_stored_and_not_delivered(room):
    room.post(W1, "record", "for the record")
    assert last(room).read().body == {"text": "for the record"}
    assert not any(room.take(peer, Deliver) for peer in (AGG, W1, W2))


def test_a_delivery_follows_its_append_and_carries_number_time_and_bytes(room):
    room.now = 12.5
    actions = room.post(AGG, "client/3", "task", blobs=[b"model"])
    kinds = [type(each) for each in actions]
    assert kinds == [Put, Append, SendTo]
    entry = actions[1].entry
    [(frame, buffers)] = room.sent[W1]
    assert frame == Deliver(seq=entry.seq, at=12.5, message=entry.message, inline=(0,), after=0)
    assert buffers == [b"model"]


def test_messages_for_an_absent_client_wait_and_come_in_order_when_it_joins(bench):
    agg = bench.joined("agg", "aggregator")
    for number in range(5):
        bench.post(agg, f"client/{number % 2}", f"task {number}")
    bench.post(agg, "client/7", "for somebody else")
    worker = bench.join("w1", clients=((0, 1),))
    assert bench.texts(worker) == [f"task {number}" for number in range(5)]


def test_messages_for_a_client_follow_it_to_another_node(room):
    room.post(AGG, "client/1", "one")
    room.post(AGG, "client/2", "two")
    room.take(W1)
    room.tell(W1, Done(seqs=(last(room).seq,)))
    room.wake(10.0)  # everybody is gone
    room.post(room.joined("agg", "aggregator", session="s2"), "client/1", "three")
    other = room.join("w9", clients=((0, 9),))
    assert room.texts(other) == ["one", "three"]


def test_acknowledgments_are_cumulative_and_follow_the_ledger(room):
    actions = []
    for number in range(3):
        actions += room.post(W1, "aggregator", f"{number}")
    assert not any(isinstance(each, SendTo) and isinstance(each.frame, Ack) for each in actions)
    actions += room.wake(room.now + ACK_WITHIN_S)
    order = [
        "kept" if isinstance(each, Append) else each.frame.upto
        for each in actions
        if isinstance(each, Append) or isinstance(each.frame, Ack)
    ]
    assert order == ["kept", "kept", "kept", 2]
    assert upto(room, W2) is None


def test_a_acknowledgment_waits_for_the_blobs_of_the_oldest_post(room):
    large = bytes(CHUNK_BYTES + 1)
    room.post(W1, "aggregator", "small")
    room.post(W1, "aggregator", "large", blobs=[large])
    room.post(W1, "aggregator", "behind it")
    assert [each.body for each in room.messages()][3:] == [{"text": "small"}]
    assert room.texts(AGG) == ["small"]
    wants = list(room.sent[W1])
    assert upto(room, W1) == 0
    room.sent[W1] = wants
    assert feed(room, W1, large) == 2
    assert room.texts(AGG) == ["large", "behind it"]
    assert upto(room, W1) == 2


def test_a_post_that_comes_twice_is_kept_once_and_acknowledged_again(room):
    for _ in range(3):
        room.post(W1, "aggregator", "once", n=0)
        assert upto(room, W1) == 0
    assert room.texts(AGG) == ["once"]
    assert len(room.messages()) == 4


def test_a_gap_in_the_posts_makes_the_link_start_over(room):
    room.post(W1, "aggregator", "third", n=2)
    assert room.take(W1) == [UnknownSession(dropped=True)]
    assert room.texts(AGG) == []
    for number, text in enumerate(["first", "second", "third"]):
        room.post(W1, "aggregator", text, n=number)
    assert room.texts(AGG) == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        ({"sender": "w2"}, "not-own", "expected a message from w1 in run r, got one from w2 in r"),
        ({"run": "q"}, "not-own", "expected a message from w1 in run r, got one from w1 in q"),
        ({"kind": "joined"}, "reserved-kind", "only the broker may send 'joined'"),
        ({"to": "timer"}, "not-allowed", "the worker may not post 'note' to 'timer'"),
        ({"to": "moon"}, "no-address", "no such address: 'moon'"),
        ({"to": "client/"}, "no-address", "no such address: 'client/'"),
        ({"to": "client/-1"}, "no-address", "no such address: 'client/-1'"),
        ({"to": "client/\u0663"}, "no-address", "no such address"),
        (
            {"to": "client/10"},
            "no-address",
            "client 10 is out of range: this run has 10 clients, 0 to 9",
        ),
        ({"to": "client/" + "9" * 100}, "no-address", "is out of range"),
    ],
)
def test_a_message_that_cannot_be_accepted_is_rejected_in_the_ledger_and_to_its_sender(
    room, fields, code, reason
):
    room.post(W1, **{"to": "aggregator", **fields})
    [refusal] = room.refusals()
    assert reason in refusal.reason
    assert (refusal.node, refusal.run, refusal.of) == ("broker", "r", None)
    assert refusal.code == code
    assert refused(room, W1) == [(refusal.id, refusal.reason, "broker")]
    room.post(W1, "aggregator", "the next one")
    assert room.texts(AGG) == ["the next one"]
    assert upto(room, W1) == 1


def test_a_rejection_names_the_message_that_it_refuses(room):
    """Without the id, the sender would not know which of its messages was rejected."""
    room.post(W1, "moon", id="w1/s1/17")
    assert room.refusals()[0].id == "w1/s1/17"
    [(name, _, _)] = refused(room, W1)
    assert name == "w1/s1/17"


@pytest.mark.parametrize(
    ("post", "buffers", "reason"),
    [
        (Post(n=0, message=b"\xc1nonsense"), [], "not a message"),
        (Post(n=0, message=b""), [], "not a message"),
    ],
)
def test_a_message_that_cannot_be_read_is_rejected(room, post, buffers, reason):
    room.say(W1, post, *buffers)
    [refusal] = room.refusals()
    assert refusal.id == "s1/0"
    assert reason in refusal.reason
    assert upto(room, W1) == 0


def test_a_message_that_fits_its_post_but_not_its_delivery_is_rejected(room):
    """The broker must be able to deliver every message that it accepts."""
    fields = {"kind": "note", "id": "w1/0", "run": "r", "sender": "w1", "to": "aggregator"}
    data = msgpack.packb({**fields, "body": {"x": bytes(MAX_HEADER_BYTES - 160)}})
    header = msgpack.packb({"kind": "post", "message": data})
    assert len(data) < len(header) <= MAX_HEADER_BYTES
    room.say(W1, decode_frame(header))
    assert "expected" in room.refusals()[0].reason


def test_inline_bytes_that_are_not_what_they_claim_are_rejected_and_not_kept(room):
    room.post(W1, "aggregator", blobs=[b"right"])
    message = last(room).message.replace(b"w1", b"w2")
    room.say(W2, Post(n=0, message=message, inline=(0,)), b"wrong")
    assert (
        room.refusals()[0].reason == "the bytes of inline blob 0 do not match its size and digest"
    )
    assert not room.size_of(BlobName("r", "w2", digest(b"right")))


def test_a_blob_beside_a_message_is_never_larger_than_the_ledger_can_read_back(room):
    """An inline buffer fits a wire frame, but a payload record holds CHUNK_BYTES at most."""
    data = bytes(CHUNK_BYTES + 1)
    actions = room.post(W1, "aggregator", blobs=[data], inline=(0,))
    for action in actions:
        if isinstance(action, Put):
            assert len(action.data) <= CHUNK_BYTES


def test_a_missing_blob_rejects_only_its_message(room):
    data = bytes(CHUNK_BYTES + 1)
    room.post(W1, "aggregator", "broken", blobs=[data])
    room.post(W1, "aggregator", "fine")
    wants = room.take(W1, ChunkRequest)
    for want in wants:
        room.say(W1, Chunk(owner="w1", digest=want.digest, start=want.start))
    assert "the sender does not have the blob that its message names" in room.refusals()[0].reason
    assert room.texts(AGG) == ["fine"]


def test_chunks_that_do_not_match_their_digest_refuse_the_message_and_good_ones_are_kept(room):
    """The wrong bytes must not be used when the right ones come later."""
    data = bytes(CHUNK_BYTES) + b"end"
    room.post(W1, "aggregator", "broken", blobs=[data])
    for want in room.take(W1, ChunkRequest):
        piece = b"x" * want.size
        room.say(W1, Chunk(owner="w1", digest=want.digest, start=want.start), piece)
    assert "do not match its digest" in room.refusals()[0].reason
    assert not room.size_of(BlobName("r", "w1", digest(data)))
    room.post(W1, "aggregator", "mended", blobs=[data])
    feed(room, W1, data)
    assert room.texts(AGG) == ["mended"]
    assert bytes(room.blobs[BlobName("r", "w1", digest(data))]) == data


def test_a_blob_is_requested_once_however_many_messages_name_it(room):
    model = bytes(3 * CHUNK_BYTES + 5)
    for client in range(4):
        room.post(AGG, f"client/{client}", f"task {client}", blobs=[model])
    assert feed(room, AGG, model) == 4
    assert room.texts(W1) == [f"task {client}" for client in range(4)]
    room.post(AGG, "client/0", "task 4", blobs=[model])
    assert room.take(AGG, ChunkRequest) == []
    assert room.texts(W1) == ["task 4"]


def test_an_empty_blob_that_is_not_beside_its_message_is_not_waited_for(room):
    """There is no chunk to request: the post and those after it must not hang."""
    room.post(W1, "aggregator", "empty", blobs=[b""], inline=())
    room.post(W1, "aggregator", "next")
    assert room.texts(AGG) == ["empty", "next"]


def test_a_node_reads_any_range_of_a_blob(room):
    room.post(AGG, "client/0", "task", blobs=[b"0123456789"])
    room.take(W1)
    name = digest(b"0123456789")
    room.say(W1, ChunkRequest(owner="agg", digest=name, start=3, size=4))
    assert room.sent.pop(W1) == [(Chunk(owner="agg", digest=name, start=3), [b"3456"])]
    room.say(W1, ChunkRequest(owner="w2", digest=name, start=3, size=4))
    assert room.sent.pop(W1) == [(Chunk(owner="w2", digest=name, start=3), [])]


@pytest.mark.parametrize(("start", "size"), [(0, 11), (9, 2), (10, 1), (1 << 40, 1)])
def test_a_request_past_the_end_of_a_blob_is_harmless(room, start, size):
    """Otherwise the driver would read it, and the broker would end with LedgerError."""
    room.post(AGG, "client/0", "task", blobs=[b"0123456789"])
    room.say(W1, ChunkRequest(owner="agg", digest=digest(b"0123456789"), start=start, size=size))
    [chunk] = room.take(W1, Chunk)
    assert chunk.start == start


def test_a_message_that_its_recipient_cannot_use_is_rejected_to_its_sender(room):
    room.post(W1, "aggregator", "odd", id="w1/7")
    seq = last(room).seq
    reasons = {seq: "of another shape", 999: "who?"}
    room.tell(AGG, Done(refused=reasons, codes={seq: "wrong-shape", 999: "unknown-task"}))
    [refusal] = room.refusals()
    assert refusal.code == "wrong-shape"
    assert (refusal.node, refusal.id, refusal.of) == ("agg", "w1/7", seq)
    assert (refusal.reason, refusal.dead_lettered) == ("of another shape", False)
    assert refused(room, W1) == [("w1/7", "of another shape", "agg")]
    entries = len(room.entries)
    room.tell(AGG, Done(refused={seq: "again"}))
    assert len(room.entries) == entries


def test_a_blob_that_was_deleted_while_its_message_waited_is_requested_again(room):
    """It was stored when the message came, but not pinned until the message was accepted."""
    large, model = bytes(CHUNK_BYTES + 1), b"model"
    room.post(W1, "aggregator", "before", blobs=[model])
    room.tell(AGG, Done(seqs=(last(room).seq,)))
    room.post(W1, "aggregator", "large", blobs=[large])
    room.post(W1, "aggregator", "small", blobs=[model], inline=())
    room.blobs.pop(BlobName("r", "w1", digest(model)))  # as retention does
    feed(room, W1, large, model)
    assert room.texts(AGG)[-2:] == ["large", "small"]


def wanted(room, peer):
    """Return the number of chunks that were requested from a node and not sent."""
    return sum(isinstance(frame, ChunkRequest) for frame, _ in room.sent[peer])


def test_an_upload_has_a_wide_window_without_small_messages(room):
    model = bytes(40 * CHUNK_BYTES)
    room.post(AGG, "client/3", "task", blobs=[model], inline=[])
    assert wanted(room, AGG) == UPLOAD_WINDOW_CHUNKS
    for number in range(3 * SMALL_MESSAGE_RATE):
        # What its receiver says to the sender waits for nothing but the upload itself.
        room.post(W1, "aggregator", f"taken {number}")
    feed(room, AGG, model, limit=1)
    assert wanted(room, AGG) == UPLOAD_WINDOW_CHUNKS


def test_small_messages_narrow_the_window_of_an_upload(room):
    model = bytes(40 * CHUNK_BYTES)
    room.post(AGG, "client/3", "task", blobs=[model], inline=[])
    for number in range(SMALL_MESSAGE_RATE):
        room.now += SMALL_MESSAGE_PERIOD_S / (SMALL_MESSAGE_RATE + 1)
        room.post(W1, "client/9", f"word {number}")
    feed(room, AGG, model, limit=UPLOAD_WINDOW_CHUNKS)
    assert wanted(room, AGG) == UPLOAD_CHUNKS_AMID_SMALL_MESSAGES
    room.now += SMALL_MESSAGE_PERIOD_S
    feed(room, AGG, model, limit=1)
    assert wanted(room, AGG) == UPLOAD_WINDOW_CHUNKS


def test_blobs_beside_a_post_are_not_requested_and_larger_ones_are(room):
    room.post(AGG, "client/3", "task", blobs=[bytes(POST_BYTES)])
    assert not wanted(room, AGG)
    room.post(AGG, "client/3", "task", blobs=[bytes(POST_BYTES + 1)], inline=[])
    assert wanted(room, AGG) == 2
    room.post(W1, "aggregator", "result", blobs=[b"x" * (POST_BYTES + 1)], inline=[0])
    [(_, reason, _)] = refused(room, W1)
    assert reason == f"expected at most {POST_BYTES} bytes of blobs with a message"
