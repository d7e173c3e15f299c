from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.broker.ledger import Accepted
from fedmq.broker.wire import Bye, Deliver, Done

HOSTS = {"agg": (), "w1": ((0, 4),), "w2": ((5, 9),)}


class Nodes:
    """Honest nodes on a bench: each knows what was delivered to its session, and is done once."""

    def __init__(self, bench):
        self.bench = bench
        self.sessions = Counter()
        self.alive = set()
        self.held = {name: {} for name in HOSTS}
        self.done = {name: set() for name in HOSTS}
        self.last = {}
        for name in HOSTS:
            self.restart(name)

    def peer(self, name):
        return f"{name}:s{self.sessions[name]}".encode()

    def listen(self):
        for name in HOSTS:
            for frame in self.bench.take(self.peer(name), Deliver):
                if frame.seq not in self.done[name]:
                    self.held[name][frame.seq] = frame

    def come_back(self, name):
        role = "aggregator" if name == "agg" else "worker"
        session = f"s{self.sessions[name]}"
        self.bench.join(name, role, session=session, clients=HOSTS[name])
        self.alive.add(name)

    def restart(self, name):
        self.sessions[name] += 1
        self.held[name], self.done[name] = {}, set()
        self.last.pop(name, None)
        self.come_back(name)

    def leave(self, name):
        self.bench.say(self.peer(name), Bye())
        self.alive.discard(name)

    def take_one(self, name):
        if not self.held[name]:
            return ()
        seq = next(iter(self.held[name]))
        del self.held[name][seq]
        self.done[name].add(seq)
        return (seq,)

    def post(self, name, to, consumes=()):
        peer = self.peer(name)
        self.last[name] = (to, self.bench.numbers[peer], consumes)
        self.bench.post(peer, to, consumes=consumes)

    def step(self, what, number):
        name = ("agg", "w1", "w2")[number % 3]
        if what == "leave" and name in self.alive:
            self.leave(name)
        elif what == "return" and name not in self.alive:
            self.come_back(name)
        elif what == "restart" and name not in self.alive:
            self.restart(name)
        elif name in self.alive:
            match what:
                case "task":
                    self.post(name, f"client/{number}")
                case "bad":
                    self.post(name, "client/99")
                case "answer":
                    self.post(name, "aggregator", self.take_one(name))
                case "done":
                    self.bench.tell(self.peer(name), Done(seqs=self.take_one(name)))
                case "refuse":
                    refused = dict.fromkeys(self.take_one(name), "no")
                    self.bench.tell(self.peer(name), Done(refused=refused))
                case "again" if name in self.last:
                    to, n, consumes = self.last[name]
                    self.bench.post(self.peer(name), to, n=n, consumes=consumes)
        self.listen()

    def pending(self):
        """What fresh sessions of all nodes are offered: all that nobody is done with."""
        for name in sorted(self.alive):
            self.leave(name)
        entries = len(self.bench.entries)
        for name in HOSTS:
            self.restart(name)
        self.listen()
        return [seq for name in HOSTS for seq in self.held[name] if seq < entries]


STEPS = st.sampled_from(
    [*["task", "answer"] * 2, "done", "refuse", "bad", "again", "leave", "return", "restart"]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(STEPS, st.integers(0, 9)), max_size=50))
def test_accepted_is_consumed_and_pending_and_refused_whatever_happens(new_bench, history):
    bench = new_bench()
    nodes = Nodes(bench)
    for what, number in history:
        nodes.step(what, number)
    pending = nodes.pending()
    accepted, consumed, refused = bench.account()
    late = {seq for seq in accepted if bench.entries[seq].read().sender == "broker"} - set(
        consumed + refused + pending
    )
    assert all(bench.entries[seq].read().kind == "joined" for seq in late)  # of the restarts above
    assert len(late) <= len(HOSTS)
    assert sorted(consumed + refused + pending) == sorted(set(accepted) - late)


def test_a_node_that_is_done_twice_is_counted_once(bench):
    agg = bench.joined("agg", "aggregator")
    worker = bench.joined("w1", clients=((0, 4),))
    bench.post(agg, "client/0", "task")
    seq = bench.take(worker, Deliver)[0].seq
    for _ in range(3):
        bench.tell(worker, Done(seqs=(seq, seq)))
    assert bench.account()[1] == [seq]


@pytest.mark.parametrize("how", ["twice", "of another node", "that is not there"])
def test_a_post_consumes_only_what_its_sender_has(bench, how):
    """The ledger counts what a record says is consumed; the broker must not copy a claim."""
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


def test_what_a_refused_post_consumes_is_consumed_all_the_same(bench):
    """Its sender is done with it; offered again, it would be applied twice."""
    agg = bench.joined("agg", "aggregator")
    worker = bench.joined("w1", clients=((0, 4),))
    bench.post(agg, "client/0", "task")
    [seq] = [frame.seq for frame in bench.take(worker, Deliver)]
    bench.post(worker, "moon", "result", consumes=(seq,))
    accepted, consumed, _ = bench.account()
    assert seq in accepted
    assert consumed == [seq]
    bench.say(worker, Bye())
    assert bench.texts(bench.join("w1", session="s2", clients=((0, 4),))) == []


def test_every_post_has_exactly_one_entry_accepted_or_refused(bench):
    bench.joined("agg", "aggregator")
    worker = bench.joined("w1", clients=((0, 4),))
    entries = len(bench.entries)
    for number, to in enumerate(["aggregator", "moon", "client/99", "record", "client/1"]):
        bench.post(worker, to)
        assert len(bench.entries) == entries + number + 1
    kinds = [isinstance(entry, Accepted) for entry in bench.entries[entries:]]
    assert kinds == [True, False, False, True, True]
