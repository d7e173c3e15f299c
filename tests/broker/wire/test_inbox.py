"""Messages are read in turns, and within the rate of each connection."""

import pytest

from fedmq.broker.errors import WireError
from fedmq.broker.wire.encoding import encode_frame, join_headers
from fedmq.broker.wire.inbox import (
    MOST_DROPPED,
    MOST_DROPPED_BYTES,
    SHARED_BYTES_PER_S,
    SMALL_MESSAGE_PERIOD_S,
    SMALL_MESSAGE_RATE,
    TURN_FRAMES,
    Inbox,
)
from fedmq.broker.wire.schema import Heartbeat, Hello, Post
from fedmq.broker.wire.window import RESERVED_BYTES

A, B = b"a", b"b"
BEAT = encode_frame(Heartbeat())
POST = encode_frame(Post(message=b"of no matter here"))
HELLO = encode_frame(Hello(node="n", role="worker", session="s"))


class Part(bytes):
    """A part of a message, as ZeroMQ would hand it over."""

    @property
    def buffer(self):
        return memoryview(self)

    @property
    def bytes(self):
        return bytes(self)


@pytest.fixture
def inbox():
    return Inbox(100.0, 1e6, 5.0, most=400_000, most_total=600_000)


def put(inbox, peer, header=BEAT, *buffers, count=1):
    parts = [Part(header), *map(Part, buffers)]
    for _ in range(count):
        inbox.put(peer, parts, sum(map(len, parts)), "origin")


def take(inbox, now):
    """Take turns until nothing more may be handled now; return the connections of the frames."""
    found = []
    while (due := inbox.due) is not None and due <= now:
        found += [peer for peer, *_ in inbox.take(now)]
    return found


def test_a_connection_may_send_a_burst_and_then_so_many_a_second(inbox):
    put(inbox, A, count=500)
    sent = len(take(inbox, 10.0))
    assert 98 <= sent <= 101
    assert inbox.due == pytest.approx(10.0, abs=0.02)
    assert 98 <= len(take(inbox, 11.0)) <= 101
    assert take(inbox, 11.0) == []
    assert len(take(inbox, 100.0)) <= 101
    assert inbox.dropped == 0


def test_large_messages_count_by_their_bytes(inbox):
    for now in range(4):
        for _ in range(3):
            put(inbox, A, BEAT, bytes(300_000))
            take(inbox, float(now))
    # Three a second are sent: 900 kB, and three messages.
    assert inbox.dropped == 0
    for _ in range(10):
        put(inbox, A, BEAT, bytes(300_000))
        take(inbox, 3.5)
    assert inbox.dropped > 3


def test_hellos_and_what_is_unreadable_cost_more(inbox):
    put(inbox, A, HELLO, count=100)
    assert 4 <= len(take(inbox, 10.0)) <= 6
    put(inbox, B, b"garbage", count=100)
    assert 4 <= len(take(inbox, 10.0)) <= 6


def test_a_rejected_post_costs_more(inbox):
    put(inbox, A, count=100)
    found = 0
    for _ in inbox.take(10.0):
        inbox.charge(A)
        found += 1
    assert 4 <= found <= 6


def test_a_slow_connection_does_not_wait_for_a_fast_one(inbox):
    put(inbox, A, count=90)
    put(inbox, B)
    turn = [peer for peer, *_ in inbox.take(10.0)]
    assert turn == [A] * TURN_FRAMES + [B]
    assert take(inbox, 10.0) == [A] * (90 - TURN_FRAMES)


def test_a_blocked_connection_does_not_keep_others_from_being_read(inbox):
    put(inbox, A, count=600)
    take(inbox, 10.0)
    assert inbox.wants_more
    put(inbox, B)
    assert B in take(inbox, 10.0)


def test_what_exceeds_the_limit_of_waiting_bytes_is_dropped(inbox):
    while not inbox.dropped:
        put(inbox, A)
    put(inbox, B)
    assert take(inbox, 10.0).count(B) == 1
    assert inbox.dropped == 1


def test_beyond_the_total_each_connection_may_have_a_little(inbox):
    for peer in (b"1", b"2", b"3"):
        before = inbox.dropped
        while inbox.dropped == before:
            put(inbox, peer)
    assert inbox._bytes < 600_000 + RESERVED_BYTES + 1000
    before = inbox.dropped
    put(inbox, B, count=10)
    assert inbox.dropped == before


def test_a_joined_message_is_read_frame_by_frame(inbox):
    header = join_headers([(BEAT, 0), (BEAT, 2), (b"\x80", 0), (BEAT, 0)])
    put(inbox, A, header, b"one", b"two")
    put(inbox, A)
    found = list(inbox.take(10.0))
    assert [list(buffers) for _, _, buffers, _, _ in found] == [[], [b"one", b"two"], [], []]
    assert [isinstance(frame, WireError) for _, frame, *_ in found] == [False, False, True, False]
    sizes = [nbytes for *_, nbytes, _ in found]
    assert sizes == [len(header) + 6, 0, 0, len(BEAT)]
    assert inbox._bytes == 0


def test_records_of_silent_connections_are_dropped(inbox):
    put(inbox, A)
    take(inbox, 10.0)
    inbox.sweep(10.0)
    assert inbox._lanes
    inbox.sweep(10.1)
    assert not inbox._lanes


def test_a_large_post_is_followed_by_a_pause_while_others_send_small_ones():
    inbox = Inbox(1e6, 4e9, 100.0, most=1 << 24, most_total=1 << 26)
    put(inbox, A, POST, bytes(256_000), count=3)
    assert len(list(inbox.take(10.0))) == 1
    assert len(list(inbox.take(10.0))) == 1  # it is alone
    put(inbox, B, POST, count=SMALL_MESSAGE_RATE)
    assert [peer for peer, *_ in inbox.take(10.0)] == [A] + [B] * SMALL_MESSAGE_RATE
    put(inbox, A, POST, bytes(256_000), count=3)
    assert take(inbox, 10.0) == [A]
    assert inbox.due == pytest.approx(10.0 + 256_000 / SHARED_BYTES_PER_S)
    put(inbox, B, POST)
    assert take(inbox, 10.0) == [B]
    assert take(inbox, 10.0011) == [A]
    assert take(inbox, 10.0 + SMALL_MESSAGE_PERIOD_S + 0.1) == [A]  # no small messages any more


def test_a_connection_that_floods_is_closed_and_its_messages_are_dropped():
    inbox = Inbox(1e6, 4e9, 100.0, most=1 << 24, most_total=1 << 26)
    data = Part(bytes(1 << 20))
    for _ in range(200):
        inbox.put(A, [Part(POST), data], len(POST) + len(data), "origin")
    assert inbox.flooders == [A]
    assert inbox._bytes == 0
    assert inbox.due is None
    assert inbox.dropped > MOST_DROPPED_BYTES >> 20  # what came after it was closed, too
    inbox.sweep(1.0)
    put(inbox, A)  # another peer may have its routing id now
    assert take(inbox, 2.0) == [A]


def test_a_connection_that_is_closed_while_it_waits_is_not_read_again(inbox):
    put(inbox, A, count=200)
    take(inbox, 10.0)
    put(inbox, A, BEAT, bytes(1000), count=MOST_DROPPED + 1000)
    assert inbox.flooders == [A]
    put(inbox, B)
    assert take(inbox, 100.0) == [B]
    assert inbox.due is None
