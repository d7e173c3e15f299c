"""Broker and nodes together, when one of them crashes: nothing is lost or duplicated."""

import random
from collections import Counter, defaultdict

import pytest

from fedmq.broker.errors import NoSpace
from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.link import events as node
from fedmq.broker.wire.encoding import decode_message
from fedmq.broker.wire.schema import (
    CHUNK_BYTES,
    Done,
    RunEnded,
)
from tests.broker.net import lose_the_answers, model, network, notes

TIMER = {"token": "t", "after_s": 1.0}


@pytest.fixture
def net(tmp_path):
    net = network(tmp_path)
    yield net
    net.ledger.close()


def accepted(net, sender):
    """Return the numbers in a sender's notes, in the order of the ledger."""
    messages = [each.read() for each in read_entries(net.folder) if isinstance(each, Accepted)]
    return [each.body["number"] for each in messages if each.sender == sender]


@pytest.mark.parametrize("written", [True, False], ids=["written", "not written"])
@pytest.mark.parametrize("after", range(0, 9, 2))
def test_a_broker_can_crash_at_any_moment(net, after, written):
    for number in range(6):
        net.post("agg", f"client/{number + 2}", number)
        net.post("w1", "aggregator", number)
    for _ in range(after):
        net.step()
    net.kill_broker(written=written)
    net.run(2.0)
    net.post("w2", "aggregator", 6)
    net.start_broker()
    net.until(lambda: all(m.core.unacknowledged == 0 for m in net.members.values()))
    net.run(1.0)
    assert (notes(net, "w1"), notes(net, "w2")) == ([0, 1, 2], [3, 4, 5])
    assert Counter(notes(net, "agg")) == Counter(range(7))
    assert accepted(net, "w1") == list(range(6))
    assert notes(net, "agg", "left") == []


@pytest.mark.parametrize("after", range(0, 12, 3))
def test_an_upload_continues_after_the_broker_died_in_the_middle_of_it(net, after):
    weights = model(8 * CHUNK_BYTES + 3)
    net.post("agg", "client/0", 0, weights)
    for _ in range(after):
        net.step()
    net.kill_broker()
    net.run(0.5)
    net.start_broker()
    net.until(lambda: notes(net, "w1") == [0])
    assert net.read("w1", net.members["w1"].inbox[0]) == weights
    assert net.counts["agg", "Chunk"] <= 9 + 4


def test_a_download_continues_after_the_broker_died_in_the_middle_of_it(net):
    weights = model(8 * CHUNK_BYTES + 3)
    net.post("agg", "client/0", 0, weights)
    net.until(lambda: notes(net, "w1") == [0])
    member = net.members["w1"]
    net.tell("w1", node.Fetch("agg", member.inbox[0].message.blobs[0]))
    for _ in range(6):
        net.step()
    net.kill_broker()
    net.start_broker()
    net.until(lambda: member.fetched)
    assert bytes(member.fetched[0]) == weights
    assert net.counts["w1", "Want"] <= 9 + 4


def test_a_timer_ticks_once_even_if_the_broker_was_down_when_due(net):
    net.post("agg", "timer", 0, **TIMER)
    net.run(0.5)
    net.kill_broker()
    net.run(3.0)
    net.start_broker()
    net.run(2.0)
    assert [m.message.kind for m in net.members["agg"].inbox].count("tick") == 1


def test_a_worker_that_is_started_again_is_given_its_tasks_again(net):
    net.post("agg", "client/0", 0)
    net.post("agg", "client/1", 1)
    net.until(lambda: notes(net, "w1") == [0, 1])
    net.tell("w1", node.Publish(Done(seqs=(net.members["w1"].inbox[0].seq,))))
    net.run(0.2)
    net.restart("w1", "s2")
    net.until(lambda: notes(net, "w1") == [1])
    net.run(2.0)
    assert notes(net, "w1") == [1]
    assert notes(net, "agg", "left") == ["w1"]
    assert notes(net, "agg", "joined") == ["w1", "w2", "w1"]


def test_a_result_resent_by_a_new_session_is_not_accepted_twice(net):
    net.post("agg", "client/0", 0)
    net.until(lambda: notes(net, "w1") == [0])
    task = net.members["w1"].inbox[0]
    net.post("w1", "aggregator", 50)  # said to consume nothing: it dies before it could
    lose_the_answers(net, "w1", steps=2)
    net.restart("w1", "s2")
    net.until(lambda: notes(net, "w1") == [0])
    net.post("w1", "aggregator", 50, consumes=(task.seq,))
    net.run(1.0)
    assert notes(net, "agg") == [50]
    net.restart("w1", "s3")
    net.run(1.0)
    assert notes(net, "w1") == []


def test_an_aggregator_that_is_started_again_has_its_checkpoint_and_what_came_since(net):
    for number in range(3):
        net.post("w1", "aggregator", number)
    net.until(lambda: notes(net, "agg") == [0, 1, 2])
    weights = model(2 * CHUNK_BYTES)
    used = tuple(each.seq for each in net.members["agg"].inbox)[:-1]
    net.post("agg", "checkpoint", 100, weights)
    net.tell("agg", node.Publish(Done(seqs=used)))
    net.run(0.5)
    net.kill_broker()
    net.start_broker()
    member = net.restart("agg", "s2")
    net.until(lambda: member.welcome is not None)
    net.run(0.5)
    assert notes(net, "agg") == [2]
    found = member.welcome.checkpoint
    task = node.Delivery(found.seq, found.at, decode_message(found.message), {})
    assert task.message.body == {"number": 100}
    assert net.read("agg", task) == weights


def test_all_nodes_wait_for_a_full_disk(net, monkeypatch):
    """Links and broker, until the disk has space again."""

    def refuse(**_):
        raise NoSpace("no space")

    with monkeypatch.context() as disk:
        disk.setattr(net.ledger, "commit", refuse)
        for number in range(4):
            net.post("w1", "aggregator", number)
        net.run(15.0)
    assert net.members["w1"].blocked
    assert set(net.members["w1"].blocked) == {"no space"}
    assert notes(net, "agg") == []
    net.run(2.0)
    assert notes(net, "agg") == [0, 1, 2, 3]
    assert notes(net, "agg", "left") == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16))
def test_every_task_is_answered_once_whatever_crashes(net, seed):
    """Workers answer each task once across sessions, and the ledger records all of it."""
    rng = random.Random(seed)  # noqa: S311 - a test's own dice
    blobs = [model(size, size) for size in (10, 300_000, CHUNK_BYTES + 9)]
    sessions = Counter()
    answered = defaultdict(set)

    def work():
        for name in ("w1", "w2"):
            for each in net.members[name].inbox:
                number = each.message.body["number"]
                if (name, sessions[name], each.seq) not in answered[name]:
                    answered[name].add((name, sessions[name], each.seq))
                    net.post(name, "aggregator", number, consumes=(each.seq,))

    for number in range(30):
        net.post("agg", f"client/{number % 10}", number, blobs[number % 3])
        for _ in range(rng.randrange(12)):
            net.step()
            work()
        dice = rng.random()
        if dice < 0.15:
            net.cut(rng.choice(["agg", "w1", "w2"]))
        elif dice < 0.35:
            name = rng.choice(["w1", "w2"])
            sessions[name] += 1
            net.restart(name, f"s{10 + sessions[name]}")
        elif dice < 0.5:
            net.kill_broker(written=rng.random() < 0.5)
            for _ in range(rng.randrange(100)):
                net.step()
            net.start_broker()
    for _ in range(40):
        net.run(1.0)
        work()
    assert all(member.core.unacknowledged == 0 for member in net.members.values())
    assert accepted(net, "agg") == list(range(30))
    assert sorted(accepted(net, "w1")) == [n for n in range(30) if n % 10 < 5]
    assert sorted(accepted(net, "w2")) == [n for n in range(30) if n % 10 >= 5]
    assert Counter(notes(net, "agg")) == Counter(range(30))
    net.tell("agg", node.Publish(RunEnded(reason="done")))
    net.run(2.0)
    assert {member.ended for member in net.members.values()} == {node.LinkEnded("done", over=True)}
