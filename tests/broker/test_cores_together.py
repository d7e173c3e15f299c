"""One Broker core and several Link cores; bytes both ways, virtual time, cuts at will."""

import random
from collections import defaultdict, deque

import pytest

from fedmq.broker import link as node
from fedmq.broker.core import Broker
from fedmq.broker.ledger import Ledger, read_entries
from fedmq.broker.state import Append, BrokerSettings, Drop, Log, Put, Received, Send, Wake
from fedmq.broker.wire import (
    CHUNK_BYTES,
    Blob,
    Chunk,
    Done,
    Hello,
    Message,
    Over,
    Tick,
    decode_frame,
    encode_frame,
)

TICK_S = 0.01
"""Virtual time that a frame takes from one end to the other."""


def tick(token, after_s):
    return Tick(token=token, after_s=after_s)


class Member:
    """One node: its link core, and what the node above it has seen."""

    def __init__(self, hello):
        self.core = node.Link(hello)
        self.name = hello.node
        self.connection = 0
        self.inbox = []
        self.fetched = []
        self.refused = []
        self.ended = None
        self.cut = False

    @property
    def peer(self):
        return f"{self.name}#{self.connection}".encode()


class Net:
    """Carries encoded frames between the cores, in order, one hop a step."""

    def __init__(self, folder, lease_s=10.0):
        self.now = 0.0
        self.ledger = Ledger(folder)
        self.broker = Broker(BrokerSettings(lease_s, 1.0), self.ledger.payload.size_of)
        self.members = {}
        self.up = defaultdict(deque)
        self.down = defaultdict(deque)
        self.chunk_bytes_under_way = 0
        self.counts = defaultdict(int)

    def add(self, name, role="worker", clients=(), session="s1", **more):
        hello = Hello(node=name, role=role, session=session, clients=clients, **more)
        member = self.members[name] = Member(hello)
        return member

    def tell(self, name, event):
        member = self.members[name]
        for action in member.core.handle(event, self.now):
            match action:
                case node.Send(frame, buffers):
                    if not member.cut:
                        parts = [encode_frame(frame), *[bytes(each) for each in buffers]]
                        self.up[member.peer].append(parts)
                case node.Deliveries(delivery):
                    member.inbox.append(delivery)
                case node.Fetched():
                    member.fetched.append(action)
                case node.RefusedBack(id=name):
                    member.refused.append(name)
                case node.Ended():
                    member.ended = action

    def post(self, name, to, number, *blobs, consumes=()):
        message = Message(
            kind="note",
            id=f"{name}/{number}",
            run="r",
            sender=name,
            to=to,
            body={"number": number},
            blobs=tuple(Blob.of(each) for each in blobs),
        )
        self.tell(name, node.Outgoing(message, blobs, consumes))

    def cut(self, name, *, silently=False):
        """Lose a connection with all that is under way on it; the next one is a new peer."""
        member = self.members[name]
        self.up.pop(member.peer, None)
        self.down.pop(member.peer, None)
        member.connection += 1
        member.cut = silently

    def step(self):
        """Let every queue move by one frame, and time pass; tells whether anything moved."""
        self.now += TICK_S
        moved = False
        sends = []
        for peer, queue in list(self.up.items()):
            if queue:
                moved = True
                header, *buffers = queue.popleft()
                frame = decode_frame(header)
                self.counts[peer.partition(b"#")[0].decode(), type(frame).__name__] += 1
                sends += self._broker(Received(peer, frame, buffers))
        sends += self._broker(Wake())
        self.ledger.commit()
        for send in sends:
            buffers = [bytes(self.ledger.payload.read(*each)) for each in send.blobs]
            self.down[send.peer].append([encode_frame(send.frame), *buffers])
        for name, member in self.members.items():
            queue = self.down[member.peer]
            if queue and not member.cut:
                moved = True
                chunks = [parts for parts in queue if isinstance(decode_frame(parts[0]), Chunk)]
                self.chunk_bytes_under_way = max(
                    self.chunk_bytes_under_way, sum(len(b) for parts in chunks for b in parts[1:])
                )
                header, *buffers = queue.popleft()
                self.tell(name, node.Received(decode_frame(header), buffers))
            self.tell(name, node.Wake())
        return moved

    def _broker(self, event):
        sends = []
        for action in self.broker.handle(event, self.now):
            match action:
                case Append(entry):
                    self.ledger.append(entry)
                case Put(name, size, start, data):
                    self.ledger.put(name, size, start, data)
                case Drop(name, size):
                    self.ledger.drop(name, size)
                case Send():
                    sends.append(action)
                case Log():
                    pass
        return sends

    def run(self, seconds):
        until = self.now + seconds
        while self.now < until:
            self.step()

    def until(self, condition, seconds=60.0):
        until = self.now + seconds
        while not condition():
            assert self.now < until, "it does not happen"
            self.step()

    def read(self, name, delivery, index=0):
        """Return the bytes of a delivery's blob, fetched through the link if need be."""
        if index in delivery.inline:
            return bytes(delivery.inline[index])
        member, blob = self.members[name], delivery.message.blobs[index]
        have = len(member.fetched)
        self.tell(name, node.Fetch(delivery.message.sender, blob))
        self.until(lambda: len(member.fetched) > have)
        return bytes(member.fetched[-1].data)


@pytest.fixture
def net(tmp_path):
    """An aggregator, and two workers with clients 0-4 and 5-9, all admitted."""
    net = Net(tmp_path)
    net.add("agg", "aggregator", run="r", config="[run]", total_clients=10)
    net.add("w1", clients=((0, 4),))
    net.add("w2", clients=((5, 9),))
    net.run(0.5)
    assert notes(net, "agg", "joined") == ["w1", "w2"]
    yield net
    net.ledger.close()


def notes(net, name, kind="note"):
    key = "number" if kind == "note" else "node"
    messages = [each.message for each in net.members[name].inbox]
    return [each.body[key] for each in messages if each.kind == kind]


def lose_the_answers(net, name, steps):
    """Let the broker take what is under way, and cut before it is heard."""
    net.members[name].cut = True
    for _ in range(steps):
        net.step()
    net.cut(name)


def model(size, seed=0):
    return random.Random(seed).randbytes(size)  # noqa: S311 - test data


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
    assert all(member.core.unreceipted == 0 for member in net.members.values())
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
def test_a_connection_cut_in_the_middle_of_an_upload_costs_only_what_was_under_way(net, after):
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
    assert net.members["agg"].core.unreceipted == 0


@pytest.mark.parametrize("after", range(0, 12, 2))
def test_a_connection_cut_in_the_middle_of_a_download_costs_only_what_was_under_way(net, after):
    weights = model(6 * CHUNK_BYTES + 3)
    net.post("agg", "client/0", 0, weights)
    net.until(lambda: notes(net, "w1") == [0])
    member = net.members["w1"]
    net.tell("w1", node.Fetch("agg", member.inbox[0].message.blobs[0]))
    for _ in range(after):
        net.step()
    net.cut("w1")
    net.until(lambda: member.fetched)
    assert [bytes(each.data) for each in member.fetched] == [weights]
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
    net.until(lambda: all(m.core.unreceipted == 0 for m in net.members.values()))
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


def test_a_tick_asked_for_just_before_a_cut_comes_all_the_same(net):
    net.tell("agg", node.Say(tick("deadline", 1.0)))
    net.cut("agg")
    net.run(15.0)
    kinds = [each.message.kind for each in net.members["agg"].inbox]
    assert kinds.count("tick") == 1


def test_a_refusal_that_was_lost_in_a_cut_is_said_again(net):
    """Refused is said: the receipt of a resent post must not be all that its sender hears."""
    for number in range(2):
        net.post("w1", "client/99", number)
    lose_the_answers(net, "w1", steps=2)
    net.run(3.0)
    assert net.members["w1"].core.unreceipted == 0
    assert sorted(set(net.members["w1"].refused)) == ["w1/0", "w1/1"]


def test_what_was_done_with_is_handed_on_once_though_the_post_that_said_so_is_refused(net):
    """Whatever is lost of the refusal, and however often the session reconnects."""
    net.post("agg", "client/0", 0)
    net.until(lambda: notes(net, "w1") == [0])
    net.tell("w1", node.Say(Done(seqs=(net.members["w1"].inbox[0].seq,))))
    net.post("w1", "client/99", 1)
    lose_the_answers(net, "w1", steps=1)
    net.run(2.0)
    net.cut("w1")
    net.run(12.0)
    assert notes(net, "w1") == [0]


def test_the_end_of_a_run_said_just_before_a_cut_reaches_every_node(net):
    net.tell("agg", node.Say(Over(reason="done")))
    net.cut("agg")
    net.run(15.0)
    assert [member.ended for member in net.members.values()] == [node.Ended("done")] * 3


def test_a_broker_that_was_away_with_posts_under_way_gets_each_of_them_once(net):
    """A cut with many posts on their way must not multiply them: one Hello, one resend."""
    for number in range(30):
        net.post("w1", "aggregator", number)
    net.step()
    net.cut("w1")
    for number in range(30, 60):
        net.post("w1", "aggregator", number)
    net.until(lambda: net.members["w1"].core.unreceipted == 0)
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
    net.tell("agg", node.Say(Done(seqs=tuple(each.seq for each in net.members["agg"].inbox))))
    net.tell("agg", node.Say(Over(reason="done")))
    net.run(1.0)
    assert all(member.ended for member in net.members.values())
    accepted, gone = set(), []
    for entry in read_entries(tmp_path):
        if hasattr(entry, "message"):
            accepted |= {entry.seq} if entry.read().to != "record" else set()
            gone += entry.consumes
        gone += getattr(entry, "of", None) or ()
    assert sorted(gone) == sorted(accepted)
