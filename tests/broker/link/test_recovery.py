"""How a link recovers lost frames: by heartbeats, and by sending Hello again."""

import pytest
from msgspec.structs import replace

from fedmq.broker.link.core import BLOCKED_S, CREDIT_BATCH, Link
from fedmq.broker.link.events import Blocked, Fetch, Taken, Wake
from fedmq.broker.wire.schema import (
    CHUNK_BYTES,
    Ack,
    Blob,
    Chunk,
    ChunkRequest,
    Heartbeat,
    Hello,
    Post,
    StorageFull,
    UnknownSession,
    digest,
)
from tests.broker.links import HELLO, WELCOME, deliver, frames, heard, outgoing, welcomed


@pytest.fixture
def link():
    return welcomed()


def seqs(actions):
    """Return the numbers of the deliveries that are handed on."""
    return [delivery.seq for delivery in actions]


def test_a_quiet_link_heartbeats(link):
    assert link.deadline == 1.0
    assert link.handle(Wake(), 0.9) == []
    assert frames(link.handle(Wake(), 1.0)) == [Heartbeat()]
    heard(link, Heartbeat(), now=1.01)
    assert link.handle(Wake(), 1.9) == []
    assert frames(link.handle(Wake(), 2.0)) == [Heartbeat()]


def test_after_a_lease_of_silence_the_link_sends_hello(link):
    now = 0.0
    while now < 9.5:
        now += 0.5
        assert frames(link.handle(Wake(), now), Hello) == []
    assert link.deadline == 10.0
    assert frames(link.handle(Wake(), 10.0)) == [HELLO]
    assert frames(link.handle(Wake(), 11.0)) == [HELLO]
    assert link.handle(outgoing(), 11.1) == []
    assert [type(each) for each in frames(heard(link, WELCOME, now=11.2))] == [Post]


def test_heartbeats_and_numbered_frames_return_credit(link):
    for seq in (3, 4):
        [delivered] = link.handle(deliver(seq), 0.0)
        assert frames(link.handle(Taken([delivered]), 0.0)) == []
    assert frames(link.handle(Wake(), 1.0)) == [Heartbeat(taken=5)]
    [post] = frames(link.handle(outgoing(), 1.1))
    assert post.taken == 5


@pytest.mark.parametrize(("size", "after"), [(0, CREDIT_BATCH), (64 << 10, 4)])
def test_many_or_large_deliveries_return_credit_before_the_next_heartbeat(link, size, after):
    """Otherwise a fast reader would wait for credit unnecessarily."""
    told = []
    for seq in range(after):
        [delivered] = link.handle(deliver(seq, bytes(size)), 0.5)
        told += frames(link.handle(Taken([delivered]), 0.5), Heartbeat)
    assert told == [Heartbeat(taken=after)]


def test_answers_to_frequent_heartbeats_do_not_make_a_link_start_over(link):
    """They follow each other closely, so the lack of progress between them is no sign of a loss."""
    link.handle(outgoing(0), 0.5)
    sent = []
    for seq in range(25_600):
        now = 0.5 + seq / 256_000
        [delivered] = link.handle(deliver(seq), now)
        sent += frames(link.handle(Taken([delivered]), now))
        if seq % 256 == 0:
            for _ in range(3):
                sent += frames(heard(link, Heartbeat(sent=seq + 5), now=now))
    assert {type(each) for each in sent} == {Heartbeat}


def test_a_delivery_after_a_gap_is_ignored_until_the_gap_is_filled(link):
    """Taken at once, it would be out of order, and a later Hello could not express the gap."""
    assert len(link.handle(deliver(3), 0.0)) == 1
    assert link.handle(deliver(9, after=8), 0.0) == []
    assert seqs(link.handle(deliver(7, after=4), 0.0)) == [7]
    assert seqs(link.handle(deliver(9, after=8), 0.0)) == [9]


def test_hello_names_the_last_delivery_and_the_oldest_unacknowledged_frame(link):
    link.handle(deliver(3), 0.0)
    link.handle(deliver(9, after=4), 0.0)
    for number in range(3):
        link.handle(outgoing(number), 0.0)
    heard(link, Ack(upto=0))
    assert frames(heard(link, UnknownSession())) == [replace(HELLO, first=1, got=10)]


def test_nothing_is_taken_before_the_welcome():
    """It may be meant for an earlier session with the same name."""
    link = Link(HELLO)
    link.handle(Wake(), 0.0)
    assert link.handle(deliver(3), 0.1) == []
    heard(link, WELCOME, now=0.2)
    assert len(link.handle(deliver(3), 0.3)) == 1


# ---- the broker's disk is full


def test_a_full_disk_is_reported_and_hello_is_sent_again_a_little_later(link):
    link.handle(outgoing(0), 1.0)
    assert heard(link, StorageFull(reason="no space"), now=1.1) == [Blocked("no space")]
    assert link.deadline == 1.1 + BLOCKED_S
    assert link.handle(outgoing(1), 1.2) == []
    assert link.handle(Wake(), 1.1 + BLOCKED_S - 0.01) == []
    assert frames(link.handle(Wake(), 1.1 + BLOCKED_S)) == [HELLO]
    assert heard(link, StorageFull(reason="no space"), now=1.7) == [Blocked("no space")]
    assert frames(link.handle(Wake(), 1.7 + BLOCKED_S)) == [HELLO]
    again = frames(heard(link, WELCOME, now=2.3), Post)
    assert [post.n for post in again] == [0, 1]


# ---- what was lost with nobody noticing


def beats(link, count, sent=0, start=1.0, before=lambda number: None):
    """Let a link send heartbeats, and answer them; return at which ones it sent Hello again."""
    hellos = []
    for number in range(count):
        now = start + number
        assert any(isinstance(frame, Heartbeat) for frame in frames(link.handle(Wake(), now)))
        before(number)
        said = frames(heard(link, Heartbeat(sent=sent), now=now + 0.01), Hello)
        hellos += [number] * len(said)
    return hellos


def test_a_link_without_outstanding_frames_never_sends_hello_again(link):
    assert beats(link, 20) == []


@pytest.mark.parametrize("due", ["a receipt", "a delivery", "a chunk"])
def test_a_stall_is_answered_by_hello_at_growing_intervals(link, due):
    match due:
        case "a receipt":
            link.handle(outgoing(), 0.5)
        case "a chunk":
            link.handle(Fetch("agg", Blob.of(b"x")), 0.5)
    # The first answer shows where things stand, and two more that nothing has moved.
    assert beats(link, 40, sent=3 if due == "a delivery" else 0) == [2, 6, 14, 30]


def test_progress_is_not_a_stall(link):
    """A slow transfer makes progress between two heartbeats, so it is not a stall."""
    data = bytes(40 * CHUNK_BYTES)
    link.handle(Fetch("agg", Blob.of(data)), 0.5)

    def one_chunk(number):
        chunk = Chunk(owner="agg", digest=digest(data), start=number * CHUNK_BYTES)
        heard(link, chunk, data[:CHUNK_BYTES])

    assert beats(link, 20, before=one_chunk) == []


def test_a_node_that_serves_chunks_does_not_take_its_post_for_lost(link):
    """The acknowledgment of a large blob's post comes after its last chunk."""
    data = bytes(30 * CHUNK_BYTES)
    link.handle(outgoing(0, data), 0.5)

    def one_chunk(number):
        start = number * CHUNK_BYTES
        heard(link, ChunkRequest(owner="w1", digest=digest(data), start=start, size=CHUNK_BYTES))

    assert beats(link, 20, before=one_chunk) == []


def test_a_delivery_that_was_lost_comes_after_the_hello_and_is_taken_then(link):
    assert len(link.handle(deliver(3), 0.0)) == 1
    link.handle(deliver(9, after=8), 0.1)  # behind one that was lost
    assert beats(link, 3, sent=10) == [2]
    assert heard(link, WELCOME, now=3.1) == []
    taken = link.handle(deliver(7, after=4), 3.2) + link.handle(deliver(9, after=8), 3.2)
    assert seqs(taken) == [7, 9]
    assert beats(link, 5, sent=10, start=4.0) == []
