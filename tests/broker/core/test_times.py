import pytest

from fedmq.broker.core.events import TimerFired
from fedmq.broker.ledger.entries import Ended
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.wire.encoding import decode_message
from fedmq.broker.wire.schema import (
    POST_BYTES,
    Ack,
    Deliver,
    Done,
    Goodbye,
    Heartbeat,
    NumberedFrame,
    Reject,
    RunEnded,
    UnknownSession,
    Welcome,
)

LEASE_S = BrokerSettings().lease_s


def inbox(bench, peer):
    """Take what the broker itself put into a node's inbox: (kind, time, body)."""
    frames = bench.take(peer, Deliver)
    return [
        (each.kind, frame.at, each.body)
        for frame in frames
        if (each := decode_message(frame.message)).sender == "broker"
    ]


def pass_time(bench, until, *peers, step=1.0):
    """Advance the virtual time while these peers send heartbeats."""
    while bench.now < until:
        bench.wake(min(bench.now + step, until))
        for peer in peers:
            bench.say(peer, Heartbeat())


def test_a_silent_node_has_left_when_its_lease_ends_and_the_aggregator_reads_it(bench):
    agg = bench.joined("agg", "aggregator")
    bench.now = 2.0
    bench.joined("w1", clients=((0, 4),))
    bench.take(agg)
    pass_time(bench, 2.0 + LEASE_S - 0.1, agg)
    assert inbox(bench, agg) == []
    pass_time(bench, 2.0 + LEASE_S + 0.5, agg)
    [(kind, at, body)] = inbox(bench, agg)
    assert (kind, at) == ("left", 2.0 + LEASE_S)
    assert (body["node"], body["session"], body["reason"]) == (
        "w1",
        "s1",
        "silent for 10.0 s, its connection is gone",
    )


def test_a_node_that_continues_beating_never_lapses(bench):
    agg = bench.joined("agg", "aggregator")
    worker = bench.joined("w1", clients=((0, 4),))
    pass_time(bench, 20 * LEASE_S, agg, worker, step=LEASE_S * 0.9)
    assert bench.said("left") == []
    assert isinstance(bench.take(worker)[-1], Heartbeat)


def test_any_frame_renews_the_lease(bench):
    agg = bench.joined("agg", "aggregator")
    worker = bench.joined("w1", clients=((0, 4),))
    frames = [Done(), Heartbeat(taken=9), Done(seqs=(99,)), Heartbeat()]
    for frame in frames:
        pass_time(bench, bench.now + LEASE_S - 1, agg)
        (bench.tell if isinstance(frame, NumberedFrame) else bench.say)(worker, frame)
    assert bench.said("left") == []


def test_a_returning_session_has_joined_again_and_is_delivered_what_it_had(bench):
    agg = bench.joined("agg", "aggregator")
    worker = bench.joined("w1", clients=((0, 4),))
    bench.post(agg, "client/0", "one")
    assert bench.texts(worker) == ["one"]
    pass_time(bench, LEASE_S + 1, agg)
    bench.post(agg, "client/1", "two")
    bench.say(worker, Heartbeat())
    assert bench.take(worker) == [UnknownSession()]
    bench.join("w1", clients=((0, 4),))
    assert bench.texts(worker) == ["one", "two"]
    assert [kind for kind, body in bench.said() if body["node"] == "w1"] == [
        "joined",
        "left",
        "joined",
    ]
    bench.post(worker, "aggregator", "its posts go on counting")
    assert bench.texts(agg) == ["its posts go on counting"]


def test_a_restarted_node_takes_the_name_of_its_lapsed_session(bench):
    agg = bench.joined("agg", "aggregator")
    old = bench.joined("w1", session="1", clients=((0, 4),))
    bench.post(agg, "client/0", "one")
    pass_time(bench, LEASE_S + 1, agg)
    new = bench.join("w1", session="2", clients=((0, 4),))
    assert bench.texts(new) == ["one"]
    bench.join("w1", session="1", clients=((0, 4),), peer=old)
    assert [type(frame) for frame in bench.take(old)][-1] is Reject
    bench.post(new, "aggregator", "from n 0")
    assert bench.texts(agg) == ["from n 0"]


def test_an_absent_aggregator_finds_everything_in_its_inbox_in_order(bench):
    agg = bench.joined("agg", "aggregator")
    worker = bench.joined("w1", clients=((0, 4),))
    bench.timer(agg, "deadline", 12.0)
    bench.take(agg)
    bench.say(agg, Goodbye())
    bench.post(worker, "aggregator", "result")
    pass_time(bench, 13.0, worker)
    bench.say(worker, Goodbye(reason="stopped"))
    again = bench.join("agg", "aggregator", session="s2")
    messages = [decode_message(frame.message) for frame in bench.take(again, Deliver)]
    assert [each.kind for each in messages] == ["joined", "note", "tick", "left"]
    assert bench.said("left")[0][1]["role"] == "aggregator"


def test_a_tick_is_posted_when_it_is_due_and_not_before(bench):
    agg = bench.joined("agg", "aggregator")
    bench.timer(agg, "late", 5.0)
    bench.timer(agg, "early", 2.5)
    bench.timer(agg, "now", 0.0)
    bench.handle(TimerFired())
    assert inbox(bench, agg) == [("tick", 0.0, {"token": "now"})]
    bench.wake(2.4)
    assert bench.core.deadline == 2.5
    assert inbox(bench, agg) == []
    bench.wake(6.0)
    assert inbox(bench, agg) == [
        ("tick", 2.5, {"token": "early"}),
        ("tick", 5.0, {"token": "late"}),
    ]


def test_ticks_due_together_come_in_the_order_in_which_they_were_asked(bench):
    agg = bench.joined("agg", "aggregator")
    tokens = [f"t{number}" for number in range(9)]
    for token in tokens:
        bench.timer(agg, token, 1.0)
    bench.wake(1.0)
    assert [body["token"] for _, _, body in inbox(bench, agg)] == tokens


def test_an_idle_broker_has_no_deadline(bench):
    assert bench.core.deadline is None
    assert not bench.core.idle
    bench.join("w1")
    assert bench.core.deadline is None


def test_bytes_read_in_place_count_up_to_the_bytes_offered(bench):
    agg, model = bench.joined("agg", "aggregator"), bytes(POST_BYTES)
    bench.post(agg, "client/0", "task", blobs=[model])
    for session, read in (("s1", 1000), ("s2", 1 << 62), ("s3", 0)):
        w1 = bench.joined("w1", session=session, key="k", clients=((0, 4),))
        bench.tell(w1, Done(read=read))
    bench.tell(agg, RunEnded())
    assert bench.entries[-1].nodes["w1"]["sent_bytes"] == 1000 + len(model)


def test_the_end_of_a_run_is_recorded_and_sent_to_every_node(bench):
    agg = bench.joined("agg", "aggregator")
    w1, w2 = bench.joined("w1", clients=((0, 4),)), bench.joined("w2", clients=((5, 9),))
    bench.core.sent(w1, 100)
    bench.post(agg, "record", "last words")
    bench.timer(agg, "never", 1.0)
    bench.take(agg)
    bench.tell(agg, RunEnded(reason="reached 100 versions"))
    ended = bench.entries[-1]
    assert isinstance(ended, Ended)
    assert (ended.run, ended.reason) == ("r", "reached 100 versions")
    assert set(ended.nodes) == {"agg", "w1", "w2"}
    assert ended.nodes["w1"] == {"sessions": 1, "sent_bytes": 100, "received_bytes": 0}
    assert bench.take(agg) == [Ack(upto=2), RunEnded(reason="reached 100 versions")]
    assert [bench.take(peer) for peer in (w1, w2)] == [
        [RunEnded(reason="reached 100 versions")]
    ] * 2
    bench.wake(2.0)
    assert bench.entries[-1] is ended


def test_after_the_end_the_broker_is_idle_once_every_node_has_gone(bench):
    agg, worker = bench.joined("agg", "aggregator"), bench.joined("w1", clients=((0, 4),))
    bench.joined("w2", clients=((5, 9),))
    bench.tell(agg, RunEnded(reason="done"))
    bench.take(worker)
    bench.say(worker, Heartbeat())
    assert bench.take(worker) == [RunEnded(reason="done")]
    for peer in (agg, worker):
        assert not bench.core.idle
        bench.say(peer, Goodbye())
    assert not bench.core.idle
    entries = len(bench.entries)
    bench.wake(2 * LEASE_S)
    assert bench.core.idle
    assert len(bench.entries) == entries
    assert bench.core.deadline is None


@pytest.mark.parametrize("run", ["r", ""], ids=["run named", "run not named"])
def test_a_node_that_missed_the_end_gets_it_when_it_returns(bench, run):
    agg = bench.joined("agg", "aggregator")
    silent = bench.joined("w1", clients=((0, 4),), run=run)
    pass_time(bench, LEASE_S + 1, agg)
    bench.tell(agg, RunEnded(reason="done"))
    bench.take(silent)
    bench.join("w1", clients=((0, 4),), run=run)
    assert bench.take(silent) == [RunEnded(reason="done")]


def test_two_runs_share_nothing(bench):
    one = bench.joined("agg", "aggregator", run="r")
    two = bench.joined("agg", "aggregator", session="s2", run="q")
    w1 = bench.joined("w1", run="r", clients=((0, 4),))
    w2 = bench.joined("w1", session="s2", run="q", clients=((0, 4),))
    bench.post(one, "client/0", "in r")
    bench.post(two, "client/0", "in q", run="q")
    assert (bench.texts(w1), bench.texts(w2)) == (["in r"], ["in q"])
    bench.tell(one, RunEnded(reason="done"))
    assert bench.take(w1) == [RunEnded(reason="done")]
    assert bench.take(w2) == []
    assert not bench.core.idle
    bench.post(w2, "aggregator", "goes on", run="q")
    assert bench.texts(two) == ["goes on"]


@pytest.mark.parametrize("silent_s", [10.0, 35.0])
def test_a_late_wake_reports_a_leave_once(new_bench, silent_s):
    bench = new_bench()
    bench.joined("agg", "aggregator")
    bench.joined("w1", clients=((0, 4),))
    bench.now = silent_s
    bench.handle(TimerFired())
    bench.handle(TimerFired())
    assert len(bench.said("left")) == 2
    assert isinstance(bench.take(bench.join("w1", session="s2"))[0], Welcome)
