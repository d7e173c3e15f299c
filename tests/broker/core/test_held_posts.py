"""Posts that wait for their blobs take bounded memory; the others wait at their sender."""

import pytest

from fedmq.broker.core.events import DiskFull
from fedmq.broker.link.unacknowledged import UnacknowledgedFrames
from fedmq.broker.settings import BrokerSettings, Limits
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import (
    Ack,
    Blob,
    Chunk,
    ChunkRequest,
    Goodbye,
    Heartbeat,
    Message,
    Post,
    UnknownSession,
    digest,
)
from fedmq.broker.wire.window import RESERVED_BYTES
from tests.broker import net as net_module
from tests.broker.net import model, network, notes

AGG, W1, W2 = b"agg:s1", b"w1:s1", b"w2:s1"
DATA = bytes(range(256)) * 2000
LIMITS = Limits(held_bytes=100_000, held_bytes_total=150_000)


@pytest.fixture
def room(bench):
    bench.settings = BrokerSettings(limits=LIMITS)
    bench.restart()
    bench.joined("agg", "aggregator")
    bench.joined("w1", clients=((0, 4),))
    bench.joined("w2", clients=((5, 9),))
    return bench


def post(room, peer, number, *, blob=None, size=10_000):
    """Post a note of about ``size`` bytes; the blob does not come with it."""
    name = peer.decode().partition(":")[0]
    message = Message(
        kind="note",
        id=f"{name}/{number}",
        run="r",
        sender=name,
        to="record",
        body={"number": number, "text": "x" * size},
        blobs=(Blob(digest(blob), len(blob)),) if blob else (),
    )
    room.say(peer, Post(n=number, message=encode_message(message)))


def held(room, name):
    return room.core._mailboxes.runs["r"].nodes[name].held_bytes


def numbers(room, name):
    read = [each.read() for each in room.entries if hasattr(each, "read")]
    return [each.body["number"] for each in read if each.sender == name]


def test_posts_behind_a_missing_blob_are_held_up_to_the_limit(room):
    post(room, W1, 0, blob=DATA)
    for number in range(1, 50):
        post(room, W1, number)
    assert LIMITS.held_bytes <= held(room, "w1") < LIMITS.held_bytes + 12_000
    assert not room.take(W1, UnknownSession)  # it would send all of them again, without an end
    room.say(W1, Chunk(owner="w1", digest=digest(DATA), start=0), DATA)
    before = numbers(room, "w1")
    assert before == list(range(len(before)))
    assert 5 < len(before) < 15
    assert held(room, "w1") == 0
    assert len(room.take(W1, UnknownSession)) == 1
    for number in range(len(before), 50):  # as a link does after its next Welcome
        post(room, W1, number)
    assert numbers(room, "w1") == list(range(50))


def test_many_blob_names_count_as_memory(room):
    blobs = tuple(Blob(digest(bytes([number])), 1 << 20) for number in range(60))
    many = Message(kind="note", id="w1/0", run="r", sender="w1", to="record", blobs=blobs)
    room.say(W1, Post(n=0, message=encode_message(many)))
    assert held(room, "w1") > LIMITS.held_bytes
    post(room, W1, 1)
    assert len(room.core._mailboxes.runs["r"].nodes["w1"].pending_frames) == 1


def test_the_total_is_bounded_and_each_node_may_have_a_little(room):
    post(room, W1, 0, blob=DATA)
    for number in range(1, 8):
        post(room, W1, number)
    before = held(room, "w1")
    assert before < LIMITS.held_bytes
    post(room, W2, 0, blob=DATA)
    for number in range(1, 20):
        post(room, W2, number)
    assert RESERVED_BYTES <= held(room, "w2") < RESERVED_BYTES + 12_000
    post(room, W1, 8)
    assert held(room, "w1") == before


def test_the_frames_of_a_node_that_leaves_are_dropped_and_sent_again(room):
    post(room, W1, 0, blob=DATA)
    post(room, W1, 1)
    room.say(W1, Goodbye())
    assert held(room, "w1") == 0
    room.join("w1", clients=((0, 4),))
    room.take(W1)
    post(room, W1, 0, blob=DATA)
    post(room, W1, 1)
    [request] = room.take(W1, ChunkRequest)
    assert request.start == 0
    room.say(W1, Chunk(owner="w1", digest=digest(DATA), start=0), DATA)
    assert numbers(room, "w1") == [0, 1]
    room.wake(room.now + 1.0)
    [ack] = room.take(W1, Ack)
    assert ack.upto == 1


def test_a_link_sends_no_more_than_a_window(tmp_path):
    """A broker without a limit for held posts would get all of them behind the large blob."""
    net = network(tmp_path)
    net.post("w1", "aggregator", 0, DATA * 10)
    for number in range(1, 1500):
        net.post("w1", "aggregator", number)
    assert len(net.up[net.members["w1"].peer]) == 1024
    net.until(lambda: len(notes(net, "agg")) >= 1500)
    assert net.members["w1"].core.unacknowledged < 128
    assert notes(net, "agg") == list(range(1500))
    assert net.counts["w1", "Post"] == 1500  # none was lost, and none sent again


def test_a_heartbeat_asks_for_an_acknowledgment_of_its_own_node(room):
    post(room, W1, 0)
    post(room, W2, 0)
    room.say(W1, Heartbeat())
    assert not room.take(W1, Ack)
    room.say(W1, Heartbeat(ack=True))
    assert room.take(W1, Ack) == [Ack(upto=0)]
    assert not room.take(W2, Ack)
    room.wake(room.now + 1.0)
    assert (room.take(W1, Ack), room.take(W2, Ack)) == ([], [Ack(upto=0)])


def test_a_heartbeat_is_acknowledged_only_after_what_a_full_disk_does_not_hold_yet(room):
    room.handle(DiskFull("no space"))
    room.core._acks.add(room.core._mailboxes.runs["r"].nodes["w1"], room.now)
    room.say(W1, Heartbeat(ack=True))
    assert not room.take(W1, Ack)


@pytest.mark.parametrize(
    ("posts", "size", "blob_each", "most"),
    [(300, 20_000, 10, 900), (300, 1_000, 3, 1_000), (1_000, 1_000, 100, 3_000)],
)
def test_when_others_use_all_memory_few_frames_are_sent_again(
    tmp_path, monkeypatch, posts, size, blob_each, most
):
    """Each drop once made a link send its whole window again: 4,950 posts instead of 300."""
    settings = BrokerSettings(beat_s=1.0, limits=Limits(held_bytes_total=1))
    monkeypatch.setattr(net_module, "SETTINGS", settings)
    net = network(tmp_path)
    for number in range(posts):
        blobs = [model(1_500_000, number)] if number % blob_each == 0 else []
        net.post("w1", "aggregator", number, *blobs, text="x" * size)
    net.until(lambda: len(notes(net, "agg")) >= posts)
    assert notes(net, "agg") == list(range(posts))
    assert posts < net.counts["w1", "Post"] < most


def test_a_window_that_was_shrunk_grows_with_acknowledgments():
    frames = UnacknowledgedFrames()
    for _ in range(6_000):
        frames.add(Post(message=bytes(20_000)), blobs=())
    frames.shrink_window()
    sent = [len(list(frames.ready()))]
    assert sent[0] * 20_000 < RESERVED_BYTES + 20_000
    assert (frames.wants_ack(), frames.wants_ack()) == (True, False)
    upto = -1
    while len(frames):
        upto += sent[-1]
        frames.acknowledged(upto)
        frames.validate_state()
        sent.append(len(list(frames.ready())))
    assert max(sent) > 300
    assert not frames.wants_ack()
    assert [sent[n] / sent[0] for n in (8, 16)] == pytest.approx([2.0, 4.0], rel=0.5)
