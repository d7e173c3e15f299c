"""Leases and probes: slow nodes, gone nodes, and a suspended broker."""

import itertools
import math
import random

import pytest

from fedmq.broker.core.events import Gone, Probe, TimerFired
from fedmq.broker.core.sessions import MAX_SILENT_LEASES, Sessions
from fedmq.broker.wire.encoding import decode_message
from fedmq.broker.wire.schema import (
    Deliver,
    Heartbeat,
    UnknownSession,
)

AGG, W1 = b"agg:s1", b"w1:s1"
LEASE_S, BEAT_S = 10.0, 1.0


@pytest.fixture
def room(bench):
    bench.joined("agg", "aggregator")
    bench.joined("w1", clients=((0, 4),))
    bench.take(AGG)
    return bench


def probes(actions):
    return [action.peer for action in actions if isinstance(action, Probe)]


def pass_time(bench, until, *peers):
    """Advance the virtual time while these peers send heartbeats; return the probes of others."""
    found = []
    while bench.now < until:
        bench.now = min(bench.now + 0.5, until)
        for peer in peers:
            bench.say(peer, Heartbeat())
        found += [(peer, bench.now) for peer in probes(bench.handle(TimerFired()))]
    return found


def test_a_silent_node_whose_connection_stands_is_only_slow(room):
    """Its I/O thread answers while Python is busy; its work must not be lost."""
    room.standing.add(W1)
    found = pass_time(room, 3 * LEASE_S, AGG)
    assert [peer for peer, _ in found] == [W1] * len(found)
    assert found[0][1] == LEASE_S
    pauses = [b - a for (_, a), (_, b) in itertools.pairwise(found)]
    assert set(pauses) == {BEAT_S}
    assert room.said("left") == []
    room.say(W1, Heartbeat())
    assert isinstance(room.take(W1)[-1], Heartbeat)


def test_a_slow_node_that_speaks_again_has_a_whole_lease(room):
    room.standing.add(W1)
    pass_time(room, 15.0, AGG)
    room.say(W1, Heartbeat())
    assert pass_time(room, 15.0 + LEASE_S - 0.5, AGG) == []
    assert pass_time(room, 15.0 + LEASE_S, AGG) == [(W1, 15.0 + LEASE_S)]


def test_a_connection_that_goes_later_is_found_at_the_next_probe(room):
    room.standing.add(W1)
    pass_time(room, 15.5, AGG)
    room.standing.clear()
    pass_time(room, 17.0, AGG)
    [(_, body)] = room.said("left")
    assert body["reason"] == "silent for 16.0 s, its connection is gone"


def test_a_node_that_is_silent_for_very_long_has_left_though_its_connection_stands(room):
    """A hanging process keeps its connection for ever."""
    room.standing.add(W1)
    pass_time(room, MAX_SILENT_LEASES * LEASE_S - 1, AGG)
    assert room.said("left") == []
    pass_time(room, MAX_SILENT_LEASES * LEASE_S + 1, AGG)
    [(_, body)] = room.said("left")
    assert body["reason"] == "silent for 100.0 s"
    room.say(W1, Heartbeat())
    assert UnknownSession() in room.take(W1)


def test_a_late_answer_to_a_probe_removes_no_node(room):
    pass_time(room, 5.0, AGG, W1)
    room.joined("w1", clients=((0, 4),), peer=b"w1:another connection")
    room.handle(Gone(W1))
    room.handle(Gone(b"never heard of"))
    assert room.said("left") == []


def test_a_suspended_broker_renews_all_leases(room):
    """After a suspension of its host, all nodes seem to have been silent."""
    pass_time(room, 5.0, AGG, W1)
    room.now = 500.0
    assert probes(room.handle(TimerFired())) == []
    assert room.said("left") == []
    room.say(AGG, Heartbeat())
    room.say(W1, Heartbeat())
    pass_time(room, 530.0, AGG, W1)
    assert room.said("left") == []


def test_after_a_suspension_an_absent_node_leaves_a_lease_later(room):
    pass_time(room, 5.0, AGG, W1)
    room.now = 500.0
    room.handle(TimerFired())
    pass_time(room, 500.0 + LEASE_S + BEAT_S, AGG)
    assert [body["node"] for _, body in room.said("left")] == ["w1"]


def test_a_wake_that_is_a_little_late_extends_no_lease(room):
    pass_time(room, LEASE_S - 0.5, AGG)
    room.now = LEASE_S + 0.9 * BEAT_S
    assert probes(room.handle(TimerFired())) == [W1]


def test_several_nodes_may_lapse_at_once(bench):
    agg = bench.joined("agg", "aggregator")
    for name, clients in (("w1", (0, 1)), ("w2", (2, 3)), ("w3", (4, 5))):
        bench.joined(name, clients=(clients,))
    bench.standing.add(b"w2:s1")
    bench.timer(agg, "t", LEASE_S)
    bench.take(agg)
    pass_time(bench, LEASE_S, agg)
    messages = [decode_message(frame.message) for frame in bench.take(agg, Deliver)]
    assert sorted(each.kind for each in messages) == ["left", "left", "tick"]
    assert {each.body.get("node") for each in messages} == {"w1", "w3", None}


def test_a_turn_does_not_visit_all_nodes(bench, monkeypatch):
    """A broker must not visit very many silent nodes at each turn."""
    looks = itertools.count()
    alive = Sessions.alive

    def counted(self):
        next(looks)
        return alive(self)

    bench.joined("agg", "aggregator")
    for number in range(10):
        bench.joined(f"w{number}", clients=((number, number),))
    monkeypatch.setattr(Sessions, "alive", counted)
    for _ in range(100):
        bench.now += BEAT_S / 100
        bench.say(W1, Heartbeat())
        bench.handle(TimerFired())
        assert bench.core.deadline <= LEASE_S + bench.now
    assert next(looks) == 0
    assert len(pass_time(bench, 2 * LEASE_S, AGG)) == 10


def test_a_deadline_is_never_later_than_the_end_of_a_lease_or_a_pause(bench):
    dice = random.Random(5)  # noqa: S311 - a test's own dice
    bench.standing = {f"w{number}:s1".encode() for number in range(0, 8, 2)}
    bench.joined("agg", "aggregator")
    for number in range(8):
        bench.joined(f"w{number}", clients=((number, number),))
        bench.post(AGG, f"client/{number}", "a task that many sessions die of")
    nodes = bench.core._sessions.peers
    pauses = 0
    for _ in range(1000):
        bench.now += dice.choice((0.0, 0.1, 1.0, 4.0))
        number = dice.randrange(8)
        peer = f"w{number}:s1".encode()
        match dice.randrange(4):
            case 0 if nodes[peer].alive:
                bench.say(peer, Heartbeat())
            case 1:
                bench.join(f"w{number}", clients=((number, number),))
            case 2:
                bench.handle(Gone(peer))
            case _:
                bench.say(AGG, Heartbeat())
        bench.handle(TimerFired())
        living = [node for node in nodes.values() if node.alive]
        resuming = [node.resume_at for node in living if node.resume_at]
        pauses += bool(resuming)
        deadline = bench.core.deadline or math.inf
        assert bench.now < deadline
        assert deadline <= min([node.lease_until for node in living] + resuming, default=math.inf)
    assert pauses > 20
