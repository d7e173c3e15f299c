from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedmq.broker.wire.schema import Deliver, Done, Goodbye, Heartbeat

HOSTS = {"agg": (), "w1": ((0, 4),), "w2": ((5, 9),)}


class Nodes:
    """Correct nodes on a bench: each takes and handles a delivery once."""

    def __init__(self, bench):
        self.bench = bench
        self.sessions = Counter()
        self.alive = set()
        self.got = Counter()
        self.held = {name: [] for name in HOSTS}
        self.last = {}
        for name in HOSTS:
            self.restart(name)

    def peer(self, name):
        return f"{name}:{self.session(name)}".encode()

    def session(self, name):
        return f"s{self.sessions[name]:03}"  # they sort by time

    def listen(self):
        for name in HOSTS:
            for frame in self.bench.take(self.peer(name), Deliver):
                if frame.after <= self.got[name] <= frame.seq:
                    self.got[name] = frame.seq + 1
                    self.held[name].append(frame.seq)

    def come_back(self, name):
        """Send Hello, and resend the last post, which is unacknowledged."""
        self.alive.add(name)
        peer, last = self.peer(name), self.last.get(name)
        self.bench.join(
            name,
            "aggregator" if name == "agg" else "worker",
            session=self.session(name),
            key=f"key of {name}",
            clients=HOSTS[name],
            got=self.got[name],
            first=last[1] if last else self.bench.numbers[peer],
        )
        self.listen()
        if last:
            self.post(name, *last)

    def restart(self, name):
        self.sessions[name] += 1
        self.got[name], self.held[name] = 0, []
        self.last.pop(name, None)
        self.come_back(name)

    def pass_time(self, seconds):
        """Connected nodes send heartbeats meanwhile."""
        for _ in range(seconds):
            self.bench.wake(self.bench.now + 1)
            for name in self.alive:
                self.bench.say(self.peer(name), Heartbeat(taken=self.got[name]))
            self.listen()

    def take_one(self, name):
        return (self.held[name].pop(0),) if self.held[name] else ()

    def post(self, name, fields, n=None, consumes=()):
        peer = self.peer(name)
        if n is None:
            n = self.bench.numbers[peer]
            self.bench.numbers[peer] += 1
            self.last[name] = (fields, n, consumes)
        self.bench.post(peer, **fields, n=n, consumes=consumes)

    def say(self, name, **fields):
        self.last.pop(name, None)  # a later frame: the post before it has its receipt
        self.bench.tell(self.peer(name), Done(**fields))

    def step(self, what, number):
        name = ("agg", "w1", "w2")[number % 3]
        match what:
            case "broker":
                self.bench.restart(redeliver_dead_letters=number == 9)
                for each in sorted(self.alive):
                    self.come_back(each)
            case "time":
                self.pass_time(1 + 3 * number)
            case "restart":
                self.restart(name)
            case "return" if name not in self.alive:
                self.come_back(name)
            case _ if name in self.alive:
                self.act(name, what, number)
        self.listen()

    def act(self, name, what, number):
        match what:
            case "leave":
                self.bench.say(self.peer(name), Goodbye())
                self.alive.discard(name)
            case "die":
                self.alive.discard(name)
                self.pass_time(11)
            case "task":
                self.post(name, {"to": f"client/{number}"})
            case "bad":
                self.post(name, {"to": "client/99"})
            case "timer":
                self.post(name, {"to": "timer", "body": {"token": "t", "after_s": number}})
            case "checkpoint":
                self.post(name, {"to": "checkpoint"})
            case "answer":
                self.post(name, {"to": "aggregator"}, None, self.take_one(name))
            case "done":
                self.say(name, seqs=self.take_one(name))
            case "refuse":
                seqs = self.take_one(name)
                self.say(name, seqs=seqs, refused=dict.fromkeys(seqs, "no"))
            case "refuse and keep" if self.held[name]:
                self.say(name, refused={self.held[name][number % len(self.held[name])]: "no"})
            case "again" if name in self.last:
                self.post(name, *self.last[name])


def check(bench):
    """A rejected message counts as rejected, whether it is consumed later or not."""
    accepted, consumed, refused = bench.account()
    pending = bench.pending()
    for each in (accepted, consumed, refused, pending):
        assert sorted(set(each)) == sorted(each), "something is counted twice"
    assert not set(consumed) & set(pending)
    settled = set(consumed) - set(refused)
    waiting = set(pending) - set(refused)
    assert sorted([*settled, *waiting, *refused]) == accepted


STEPS = st.sampled_from(
    [
        *["task", "answer"] * 3,
        *["done", "refuse", "refuse and keep", "bad", "again", "timer", "checkpoint"],
        *["leave", "die", "return", "restart", "broker", "time"],
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(STEPS, st.integers(0, 9)), max_size=50))
@example([("task", 4), *[("die", 1), ("restart", 1)] * 3, ("time", 0), ("broker", 9)])
def test_accepted_is_always_consumed_plus_pending_plus_rejected(new_bench, history):
    bench = new_bench(deliveries=3)
    nodes = Nodes(bench)
    for what, number in history:
        nodes.step(what, number)
        check(bench)
    pending = bench.pending()
    bench.restart()
    assert bench.pending() == pending
    check(bench)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(STEPS, st.integers(0, 9)), max_size=40))
@example([("task", 1), *[("restart", 1)] * 4])
def test_new_sessions_get_all_unfinished_messages(new_bench, history):
    bench = new_bench(deliveries=3)
    nodes = Nodes(bench)
    for what, number in history:
        nodes.step(what, number)
    entries = len(bench.entries)
    for name in sorted(nodes.alive):
        nodes.act(name, "leave", 0)
    expected = [seq for seq in bench.pending() if seq < entries]
    for name in HOSTS:
        nodes.restart(name)
    nodes.pass_time(40)  # past the pause after an interruption
    elsewhere = ("node/", "checkpoint", "timer")
    named = [seq for seq in expected if not bench.read(seq).read().to.startswith(elsewhere)]
    held = {seq for seqs in nodes.held.values() for seq in seqs}
    assert all(seqs == sorted(seqs) for seqs in nodes.held.values())
    assert [seq for seq in named if seq not in held] == []
    assert {seq for seq in held if seq < entries} <= set(expected)


def test_handling_a_message_twice_counts_once(bench):
    agg = bench.joined("agg", "aggregator")
    worker = bench.joined("w1", clients=((0, 4),))
    bench.post(agg, "client/0", "task")
    seq = bench.take(worker, Deliver)[0].seq
    for _ in range(3):
        bench.tell(worker, Done(seqs=(seq, seq)))
    assert bench.account()[1] == [seq]


@pytest.mark.parametrize("how", ["twice", "of another node", "that is not there"])
def test_a_post_consumes_only_what_its_sender_has(bench, how):
    """The ledger counts what a record consumes, so the broker must check the claim."""
    agg = bench.joined("agg", "aggregator")
    worker = bench.joined("w1", clients=((0, 4),))
    bench.joined("w2", clients=((5, 9),))
    bench.post(agg, "client/0", "mine")
    [mine] = [frame.seq for frame in bench.take(worker, Deliver)]
    bench.post(agg, "client/9", "another's")
    theirs = bench.entries[-1].seq
    bench.tell(worker, Done(seqs=(mine,)))
    claimed = {"twice": mine, "of another node": theirs, "that is not there": 999}[how]
    bench.post(worker, "aggregator", "result", consumes=(claimed,))
    assert bench.account()[1] == [mine]


def test_a_rejected_post_still_consumes(bench):
    """Its sender has handled it; delivered again, it would be applied twice."""
    agg = bench.joined("agg", "aggregator")
    worker = bench.joined("w1", clients=((0, 4),))
    bench.post(agg, "client/0", "task")
    [seq] = [frame.seq for frame in bench.take(worker, Deliver)]
    bench.post(worker, "moon", "result", consumes=(seq,))
    accepted, consumed, _ = bench.account()
    assert seq in accepted
    assert consumed == [seq]
    bench.say(worker, Goodbye())
    assert bench.texts(bench.join("w1", session="s2", clients=((0, 4),))) == []


def test_every_post_has_exactly_one_entry_accepted_or_rejected(bench):
    bench.joined("agg", "aggregator")
    worker = bench.joined("w1", clients=((0, 4),))
    addresses = ["aggregator", "moon", "client/99", "record", "client/1"]
    for to in addresses:
        bench.post(worker, to)
    names = [f"w1:s1/{number}" for number in range(len(addresses))]
    accepted = [each.id for each in bench.messages() if each.sender == "w1"]
    assert accepted == [names[0], names[3], names[4]]
    assert [each.id for each in bench.refusals()] == names[1:3]
