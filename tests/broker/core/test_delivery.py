"""Deliveries: in order, in a window, again until they are handled."""

import pytest

from fedmq.broker.core import delivery
from fedmq.broker.core.delivery import WINDOW_BYTES, WINDOW_MESSAGES
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import (
    INLINE_BYTES,
    Deliver,
    Done,
    Goodbye,
    Heartbeat,
    Post,
)

AGG, W1 = b"agg:s1", b"w1:s1"


@pytest.fixture
def room(bench):
    bench.joined("agg", "aggregator")
    bench.joined("w1", clients=((0, 9),))
    bench.sent.clear()
    return bench


def tasks(room, count, first=0, size=0):
    for number in range(first, first + count):
        room.post(AGG, f"client/{number % 10}", f"{number}", blobs=[bytes(size)] if size else ())


def take(room, peer=W1):
    return room.take(peer, Deliver)


def test_a_window_of_messages_is_in_flight_and_the_others_stay_in_the_ledger(room, monkeypatch):
    monkeypatch.setattr(delivery, "WINDOW_MESSAGES", 3)
    tasks(room, 8)
    first = take(room)
    assert len(first) == 3
    room.say(W1, Heartbeat(taken=first[1].seq + 1))
    assert room.texts(W1) == ["3", "4"]
    room.say(W1, Heartbeat(taken=first[1].seq + 1))
    assert room.texts(W1) == []
    room.say(W1, Heartbeat(taken=10**6))
    assert room.texts(W1) == ["5", "6", "7"]
    tasks(room, 2, first=8)
    assert room.texts(W1) == []
    room.say(W1, Heartbeat(taken=10**6))
    assert room.texts(W1) == ["8", "9"]


def test_the_window_is_wide_enough_for_many_small_messages(room):
    room.validates = False
    tasks(room, WINDOW_MESSAGES + 7)
    assert len(take(room)) == WINDOW_MESSAGES


def test_the_window_counts_the_bytes_beside_a_message_too(room):
    """A slow reader costs at most a window of memory."""
    tasks(room, 40, size=INLINE_BYTES)
    window = -(-WINDOW_BYTES // INLINE_BYTES)
    assert len(take(room)) == window
    room.say(W1, Heartbeat(taken=10**6))
    assert len(take(room)) == window


def test_a_message_larger_than_the_window_is_sent_in_its_turn(room, monkeypatch):
    """However small the window, one message may always be in flight."""
    monkeypatch.setattr(delivery, "WINDOW_BYTES", 10)
    tasks(room, 3, size=1000)
    for number in range(3):
        assert room.texts(W1) == [f"{number}"]
        room.say(W1, Heartbeat(taken=10**6))


@pytest.mark.parametrize("how", ["a post", "done"])
def test_every_frame_of_a_node_returns_credit(room, monkeypatch, how):
    monkeypatch.setattr(delivery, "WINDOW_MESSAGES", 1)
    tasks(room, 2)
    [first] = take(room)
    if how == "done":
        room.tell(W1, Done(taken=first.seq + 1))
    else:
        message = encode_message(room.messages()[0])
        room.say(W1, Post(n=0, taken=first.seq + 1, message=message))
    assert room.texts(W1) == ["1"]


def test_handling_a_message_and_taking_it_are_separate(room, monkeypatch):
    """A node may handle a message before it has read earlier ones, or long after."""
    monkeypatch.setattr(delivery, "WINDOW_MESSAGES", 2)
    tasks(room, 4)
    first, second = take(room)
    room.tell(W1, Done(seqs=(first.seq, second.seq)))
    assert take(room) == []
    room.say(W1, Heartbeat(taken=second.seq + 1))
    third, fourth = take(room)
    room.say(W1, Heartbeat(taken=fourth.seq + 1))
    assert room.pending()[-2:] == [third.seq, fourth.seq]


def test_a_message_handled_before_it_was_sent_is_not_sent(room, monkeypatch):
    monkeypatch.setattr(delivery, "WINDOW_MESSAGES", 1)
    tasks(room, 3)
    [first] = take(room)
    middle = room.pending()[-2]
    room.tell(W1, Done(seqs=(middle,)))
    room.say(W1, Heartbeat(taken=first.seq + 1))
    assert room.texts(W1) == ["2"]


def test_each_delivery_says_where_the_gap_before_it_begins(room):
    tasks(room, 2)
    room.post(AGG, "record", "for nobody here")
    tasks(room, 2, first=2)
    frames = take(room)
    assert [frame.after for frame in frames] == [0, *(frame.seq + 1 for frame in frames[:-1])]
    assert frames[2].seq == frames[1].seq + 2


def test_after_a_reconnect_what_has_not_arrived_comes_in_order_and_new_ones_behind_it(room):
    tasks(room, 5)
    frames = take(room)
    room.tell(W1, Done(seqs=(frames[3].seq,)))
    room.join("w1", clients=((0, 9),), got=frames[1].seq + 1, first=1)
    tasks(room, 1, first=5)
    again = take(room)
    assert [frame.seq for frame in again][:2] == [frames[2].seq, frames[4].seq]
    assert [frame.after for frame in again] == [
        frames[1].seq + 1,
        frames[2].seq + 1,
        frames[4].seq + 1,
    ]


def test_after_a_reconnect_the_whole_window_is_open(room, monkeypatch):
    monkeypatch.setattr(delivery, "WINDOW_MESSAGES", 2)
    tasks(room, 4)
    assert len(take(room)) == 2
    room.join("w1", clients=((0, 9),))
    assert room.texts(W1) == ["0", "1"]


def test_a_stalled_reader_costs_only_numbers(room, monkeypatch):
    monkeypatch.setattr(delivery, "WINDOW_MESSAGES", 2)
    tasks(room, 100)
    node = room.core._mailboxes.runs["r"].nodes["w1"]
    assert len(node.in_flight) == 2
    assert all(isinstance(each, int) for each in node.queue)
    room.say(W1, Goodbye())
    assert not node.queue
    assert not node.pending


def test_a_heartbeat_is_answered_with_the_number_sent(room, monkeypatch):
    monkeypatch.setattr(delivery, "WINDOW_MESSAGES", 2)
    room.say(W1, Heartbeat())
    assert room.take(W1) == [Heartbeat(sent=0)]
    tasks(room, 3)
    frames = take(room)
    room.say(W1, Heartbeat())
    assert room.take(W1) == [Heartbeat(sent=frames[-1].seq + 1)]
