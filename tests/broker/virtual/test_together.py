"""Broker and links together, over connections that are cut."""

import random
from collections import defaultdict

import pytest

from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.link import events as node
from fedmq.broker.wire.schema import CHUNK_BYTES, Done, RunEnded
from tests.broker.net import TICK_S, lose_the_answers, model, network, notes

DEADLINE = {"token": "deadline", "after_s": 1.0}


@pytest.fixture
def net(tmp_path):
    net = network(tmp_path)
    yield net
    net.ledger.close()


def test_messages_and_large_blobs_make_the_round_trip(net, tmp_path):
    weights, update = model(3 * CHUNK_BYTES + 17), model(2 * CHUNK_BYTES, seed=1)
    for client in (0, 1, 7):
        net.post("agg", f"client/{client}", client, weights)
    net.until(lambda: len(notes(net, "w1")) == 2 and notes(net, "w2") == [7])
    assert net.counts["agg", "Chunk"] == 4  # uploaded once for three tasks
    for name in ("w1", "w2"):
        assert net.read(name, net.members[name].inbox[0]) == weights
    task = net.members["w1"].inbox[0]
    net.post("w1", "aggregator", 100, update, b"small", consumes=(task.seq,))
    net.until(lambda: notes(net, "agg") == [100])
    result = net.members["agg"].inbox[-1]
    assert net.read("agg", result, 0) == update
    assert net.read("agg", result, 1) == b"small"
    net.run(0.1)
    assert all(member.core.unacknowledged == 0 for member in net.members.values())
    kept = [entry.consumes for entry in read_entries(tmp_path) if getattr(entry, "consumes", ())]
    assert kept == [(task.seq,)]


def test_a_small_message_never_waits_behind_a_large_blob(net):
    net.post("agg", "client/0", 1, model(32 * CHUNK_BYTES // 4))
    net.until(lambda: notes(net, "w1") == [1])
    net.tell("w1", node.Fetch("agg", net.members["w1"].inbox[0].message.blobs[0]))
    net.run(3 * TICK_S)
    began = net.now
    net.post("agg", "client/1", 2)
    net.until(lambda: notes(net, "w1") == [1, 2])
    assert net.now - began <= 8 * TICK_S
    assert not net.members["w1"].fetched
    net.until(lambda: net.members["w1"].fetched)
    assert net.chunk_bytes_under_way <= 4 * CHUNK_BYTES


@pytest.mark.parametrize("after", range(0, 12, 2))
def test_a_connection_cut_in_the_middle_of_an_upload_costs_only_what_was_in_flight(net, after):
    weights = model(8 * CHUNK_BYTES + 3)
    for number in range(3):
        net.post("agg", "client/0", number, weights)
    net.post("agg", "client/5", 3)
    for _ in range(after):
        net.step()
    net.cut("agg")
    net.until(lambda: notes(net, "w1") == [0, 1, 2] and notes(net, "w2") == [3])
    assert net.read("w1", net.members["w1"].inbox[0]) == weights
    assert net.counts["agg", "Chunk"] <= 9 + 4
    net.run(1.0)
    assert notes(net, "w1") == [0, 1, 2]
    assert net.members["agg"].core.unacknowledged == 0


@pytest.mark.parametrize("after", range(0, 12, 2))
def test_a_connection_cut_in_the_middle_of_a_download_costs_only_what_was_in_flight(net, after):
    weights = model(6 * CHUNK_BYTES + 3)
    net.post("agg", "client/0", 0, weights)
    net.until(lambda: notes(net, "w1") == [0])
    member = net.members["w1"]
    net.tell("w1", node.Fetch("agg", member.inbox[0].message.blobs[0]))
    for _ in range(after):
        net.step()
    net.cut("w1")
    net.until(lambda: member.fetched)
    assert [bytes(each) for each in member.fetched] == [weights]
    assert net.counts["w1", "Want"] <= 7 + 4
    net.run(1.0)
    assert notes(net, "w1") == [0]


@pytest.mark.parametrize("seed", range(12))
def test_everything_arrives_once_and_in_order_whatever_connections_are_cut(net, seed):
    rng = random.Random(seed)  # noqa: S311 - a test's own dice
    blobs = [model(size, size) for size in (10, 300_000, 2 * CHUNK_BYTES + 9)]
    for number in range(24):
        blob = blobs[number % 3]
        net.post("agg", f"client/{number % 10}", number, blob)
        net.post(("w1", "w2")[number % 2], "aggregator", number, blob)
        for _ in range(rng.randrange(6)):
            net.step()
        if rng.random() < 0.4:
            net.cut(rng.choice(["agg", "w1", "w2"]))
    net.until(lambda: all(m.core.unacknowledged == 0 for m in net.members.values()))
    net.run(3.0)
    assert notes(net, "w1") == [number for number in range(24) if number % 10 < 5]
    assert notes(net, "w2") == [number for number in range(24) if number % 10 >= 5]
    senders = defaultdict(list)
    for each in net.members["agg"].inbox:
        senders[each.message.sender].append(each.message.body.get("number"))
    assert senders["w1"] == list(range(0, 24, 2))
    assert senders["w2"] == list(range(1, 24, 2))
    seqs = [each.seq for each in net.members["agg"].inbox]
    assert seqs == sorted(set(seqs))


def test_a_partition_longer_than_the_lease_loses_nothing(net):
    net.post("agg", "client/0", 0)
    net.until(lambda: notes(net, "w1") == [0])
    net.cut("w1", silently=True)
    net.post("w1", "aggregator", 50)
    net.post("agg", "client/1", 1)
    net.run(12.0)
    assert notes(net, "agg", "left") == ["w1"]
    net.members["w1"].cut = False
    net.run(3.0)
    assert notes(net, "agg", "joined") == ["w1", "w2", "w1"]
    assert notes(net, "w1") == [0, 1]
    assert notes(net, "agg") == [50]


def test_a_timer_requested_just_before_a_cut_still_ticks(net):
    net.post("agg", "timer", 0, **DEADLINE)
    net.cut("agg")
    net.run(15.0)
    kinds = [each.message.kind for each in net.members["agg"].inbox]
    assert kinds.count("tick") == 1


def test_a_rejection_lost_in_a_cut_is_sent_again(net):
    """The sender must get the rejection, not only the acknowledgment, of a resent post."""
    for number in range(2):
        net.post("w1", "client/99", number)
    lose_the_answers(net, "w1", steps=2)
    net.run(3.0)
    assert net.members["w1"].core.unacknowledged == 0
    said = [each.message for each in net.members["w1"].inbox]
    assert [each.body["id"] for each in said if each.kind == "refused"] == ["w1/0", "w1/1"]


def test_a_rejected_post_still_consumes_across_cuts(net):
    """However often the session reconnects."""
    net.post("agg", "client/0", 0)
    net.until(lambda: notes(net, "w1") == [0])
    net.tell("w1", node.Publish(Done(seqs=(net.members["w1"].inbox[0].seq,))))
    net.post("w1", "client/99", 1)
    lose_the_answers(net, "w1", steps=1)
    net.run(2.0)
    net.cut("w1")
    net.run(12.0)
    assert notes(net, "w1") == [0]


def test_the_end_of_a_run_just_before_a_cut_reaches_every_node(net):
    net.tell("agg", node.Publish(RunEnded(reason="done")))
    net.cut("agg")
    net.run(15.0)
    assert [member.ended for member in net.members.values()] == [
        node.LinkEnded("done", over=True)
    ] * 3


def test_posts_in_flight_during_an_outage_arrive_once(net):
    """A cut with many posts in flight must not multiply them: one Hello, one resend."""
    for number in range(30):
        net.post("w1", "aggregator", number)
    net.step()
    net.cut("w1")
    for number in range(30, 60):
        net.post("w1", "aggregator", number)
    net.until(lambda: net.members["w1"].core.unacknowledged == 0)
    net.run(1.0)
    assert notes(net, "agg") == list(range(60))
    assert net.counts["w1", "Post"] <= 60 + 60
    assert net.counts["w1", "Hello"] <= 1 + 2


def test_the_ledger_accounts_for_everything_in_the_end(net, tmp_path):
    for number in range(10):
        net.post("agg", f"client/{number}", number)
    net.until(lambda: len(notes(net, "w1")) == len(notes(net, "w2")) == 5)
    for name in ("w1", "w2"):
        for each in net.members[name].inbox:
            net.post(name, "aggregator", each.message.body["number"], consumes=(each.seq,))
    net.until(lambda: len(notes(net, "agg")) == 10)
    net.tell("agg", node.Publish(Done(seqs=tuple(each.seq for each in net.members["agg"].inbox))))
    net.tell("agg", node.Publish(RunEnded(reason="done")))
    net.run(1.0)
    assert all(member.ended for member in net.members.values())
    accepted, gone = set(), []
    for entry in read_entries(tmp_path):
        if hasattr(entry, "message"):
            accepted |= {entry.seq} if entry.read().to != "record" else set()
            gone += entry.consumes
        gone += getattr(entry, "of", None) or ()
    assert sorted(gone) == sorted(accepted)
