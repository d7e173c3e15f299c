"""Timers and checkpoints, which the aggregator posts to the broker itself."""

import pytest

from fedmq.broker.core.mailboxes import MAX_TIMER_S
from fedmq.broker.wire.encoding import decode_message
from fedmq.broker.wire.schema import (
    Deliver,
    Done,
    RunEnded,
    Welcome,
    digest,
)

AGG, W1 = b"agg:s1", b"w1:s1"


@pytest.fixture
def room(bench):
    bench.joined("agg", "aggregator", key="ka")
    bench.joined("w1", clients=((0, 4),))
    bench.sent.clear()
    return bench


def welcome(room, session, **more):
    """Return the Welcome of a new session of the aggregator."""
    peer = room.join("agg", "aggregator", session=session, key="ka", **more)
    return room.take(peer, Welcome)[-1]


def test_a_timer_is_kept_and_its_tick_consumes_it(room):
    room.timer(AGG, "t", 2.0)
    request = room.entries[-1].seq
    assert request in room.pending()
    assert room.take(AGG, Deliver) == []
    room.wake(2.0)
    tick = room.entries[-1]
    assert tick.consumes == (request,)
    assert request not in room.pending()
    [frame] = room.take(AGG, Deliver)
    message = decode_message(frame.message)
    assert (message.kind, message.sender, message.body) == ("tick", "broker", {"token": "t"})


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"token": "t"},
        {"token": "", "after_s": 1.0},
        {"token": 3, "after_s": 1.0},
        {"token": "t", "after_s": -0.1},
        {"token": "t", "after_s": float("nan")},
        {"token": "t", "after_s": float("inf")},
        {"token": "t", "after_s": MAX_TIMER_S * 2},
        {"token": "t", "after_s": "1"},
        {"token": "t", "after_s": None},
    ],
    ids=repr,
)
def test_an_invalid_timer_request_is_rejected(room, body):
    room.post(AGG, "timer", body=body)
    [refusal] = room.refusals()
    assert refusal.reason == "expected a body with a token and after_s from 0 to 1e+09"
    assert not room.core._mailboxes.timers


def test_a_request_that_comes_twice_ticks_once(room):
    for _ in range(2):
        room.post(AGG, "timer", n=0, body={"token": "t", "after_s": 1})
    welcome(room, "s2")
    room.post(b"agg:s2", "timer", id="agg:s1/0", body={"token": "t", "after_s": 1})
    room.wake(5.0)
    assert len(room.said("tick")) == 1


@pytest.mark.parametrize("address", ["timer", "checkpoint"])
def test_only_the_aggregator_may_write_there(room, address):
    room.post(W1, address, body={"token": "t", "after_s": 1.0})
    [refusal] = room.refusals()
    assert refusal.reason == f"the worker may not post 'note' to {address!r}"
    assert room.core._mailboxes.runs["r"].checkpoint is None


def test_a_checkpoint_is_delivered_to_nobody_and_consumes_the_one_before(room):
    seqs = []
    for number in range(3):
        room.post(AGG, "checkpoint", f"{number}", blobs=[b"%d" % number])
        seqs.append(room.entries[-1].seq)
        assert room.entries[-1].consumes == tuple(seqs[-2:-1])
    assert not room.take(AGG, Deliver)
    assert [seq for seq in room.pending() if seq in seqs] == seqs[-1:]
    assert sorted(room.uses) == seqs[-1:], "only its bytes are needed"


def test_a_checkpoint_may_consume_what_its_sender_is_handled_as_well(room):
    room.post(W1, "aggregator", "result")
    seq = room.take(AGG, Deliver)[-1].seq
    room.post(AGG, "checkpoint", "0")
    first = room.entries[-1].seq
    room.post(AGG, "checkpoint", "1", consumes=(seq,))
    assert sorted(room.entries[-1].consumes) == sorted((seq, first))


def test_a_new_session_is_welcomed_with_the_newest_and_without_the_configuration(room):
    assert welcome(room, "s2").checkpoint is None
    room.post(b"agg:s2", "checkpoint", "0")
    room.post(b"agg:s2", "checkpoint", "1", blobs=[b"model"])
    entry = room.entries[-1]
    got = welcome(room, "s3")
    assert got.checkpoint == Deliver(seq=entry.seq, at=entry.at, message=entry.message)
    assert got.config == "", "it has brought its own"
    assert decode_message(got.checkpoint.message).blobs[0].digest == digest(b"model")


def test_a_reconnect_is_welcomed_without_a_checkpoint(room):
    """The same session has made the checkpoint."""
    room.post(W1, "aggregator", "result")
    [frame] = room.take(AGG, Deliver)
    room.post(AGG, "checkpoint", "0")
    assert welcome(room, "s1", got=frame.seq + 1, first=1).checkpoint is None


def test_a_worker_is_welcomed_with_the_configuration_and_no_checkpoint(room):
    room.post(AGG, "checkpoint", "0")
    peer = room.join("w2", clients=((5, 9),))
    [got] = room.take(peer, Welcome)
    assert (got.config, got.checkpoint) == ("[run]", None)


def test_messages_after_the_checkpoint_follow_it_in_order(room):
    for number in range(4):
        room.post(W1, "aggregator", f"result {number}")
    seqs = [frame.seq for frame in room.take(AGG, Deliver)]
    room.post(AGG, "checkpoint", "after two")
    room.tell(AGG, Done(seqs=seqs[:2]))
    peer = room.join("agg", "aggregator", session="s2", key="ka")
    assert isinstance(room.sent[peer][0][0], Welcome)
    assert room.texts(peer) == ["result 2", "result 3"]


def test_a_run_that_is_over_needs_no_checkpoint_and_no_timer(room):
    room.post(AGG, "checkpoint", "0", blobs=[b"x"])
    room.timer(AGG, "t", 1.0)
    room.tell(AGG, RunEnded(reason="done"))
    room.wake(9.0)
    assert room.said("tick") == []
    room.restart()
    assert room.pending() == []
    assert room.uses == {}
