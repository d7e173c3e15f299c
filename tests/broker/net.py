"""A broker and several nodes, each with its driver: virtual time, cut connections."""

import contextlib
import random
from collections import defaultdict, deque

import msgspec

from fedmq.broker.core.events import ReceivedFrom
from fedmq.broker.driver import BrokerDriver
from fedmq.broker.link import events as node
from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.settings import BrokerSettings, LedgerSettings
from fedmq.broker.wire.clock import Clock
from fedmq.broker.wire.encoding import decode_frame, encode_frame
from fedmq.broker.wire.schema import (
    Blob,
    Chunk,
    Hello,
    Message,
)

SETTINGS = BrokerSettings(lease_s=10.0, beat_s=1.0)
TICK_S = 0.01
"""Virtual time that a frame takes from one end to the other."""


class Member:
    """One node: the port of its link, and what the node has received."""

    endpoint = "net"

    def __init__(self, net, hello, connection=0):
        self.net, self.hello, self.connection = net, hello, connection
        self.name = hello.node
        self.cut = False
        self.blocked = []
        self.arrived = []
        self.clock = Clock(lambda: net.now, lambda: net.now)
        self.lock = contextlib.nullcontext()
        self.link = NodeLink(self, hello)
        self._inbox = []

    @property
    def peer(self):
        return f"{self.name}#{self.connection}".encode()

    @property
    def core(self):
        return self.link.core

    @property
    def inbox(self):
        """Return all deliveries; takes those that have arrived."""
        while self.link._inbox:
            self._inbox.append(self.link.get())
        return self._inbox

    @property
    def fetched(self):
        """Return the fetched blobs that were not read."""
        return list(self.link.blobs.fetched.values())

    @property
    def welcome(self):
        return self.link._welcome

    @property
    def ended(self):
        return self.link._ended

    def turn(self):
        self.link.turn_in_background()
        self.inbox  # noqa: B018 - a program that waits takes each delivery at once
        self.link.validate_state()

    # ---- the port of its link

    def start(self, loop):
        pass

    def restart(self):
        pass

    def send(self, frame, buffers):
        if not self.cut and not self.net.away:
            parts = [encode_frame(frame), *[bytes(each) for each in buffers]]
            self.net.up[self.peer].append(parts)

    def flush(self):
        pass

    def wait(self, until):
        pass

    def receive(self):
        arrived, self.arrived = self.arrived, []
        return arrived

    def report(self, report):
        if isinstance(report, node.Blocked):
            self.blocked.append(report.reason)

    def report_failure(self, error):
        raise error


class Killed(Exception):
    """The broker dies in the middle of a turn."""


class Net:
    """Carries encoded frames between the cores, in order, one hop a step.

    It is the port of the broker's driver, too.
    """

    def __init__(self, folder):
        self.now = 0.0
        self.folder = folder
        self.away = self.dying = False
        self.members = {}
        self.up = defaultdict(deque)
        self.down = defaultdict(deque)
        self.chunk_bytes_under_way = 0
        self.counts = defaultdict(int)
        self.start_broker()

    @property
    def broker(self):
        return self.driver.core

    @property
    def ledger(self):
        return self.driver.ledger

    def add(self, name, role="worker", clients=(), session="s1", **more):
        hello = Hello(node=name, role=role, session=session, clients=clients, **more)
        member = self.members[name] = Member(self, hello)
        return member

    def tell(self, name, event):
        self.members[name].link._handle(event)

    def post(self, name, to, number, *blobs, consumes=(), **body):
        message = Message(
            kind="note",
            id=f"{name}/{number}",
            run="r",
            sender=name,
            to=to,
            body={"number": number, **body},
            blobs=tuple(Blob.of(each) for each in blobs),
        )
        self.tell(name, node.PostMessage(message, blobs, consumes))

    def cut(self, name, *, silently=False):
        """Cut a connection with all frames in flight; the next one is a new peer."""
        member = self.members[name]
        self.up.pop(member.peer, None)
        self.down.pop(member.peer, None)
        member.connection += 1
        member.cut = silently

    def restart(self, name, session):
        """Kill a node, and start it again without any state."""
        self.cut(name)
        before = self.members[name]
        hello = msgspec.structs.replace(before.hello, session=session)
        member = self.members[name] = Member(self, hello, before.connection)
        return member

    def kill_broker(self, *, written=True):
        """Kill the broker in its next turn, before or after it has ``written``, before it sends."""
        ledger, commit = self.ledger, self.ledger.commit
        self.dying = True
        if not written:
            ledger.commit = self.die
        with contextlib.suppress(Killed):
            self.driver.turn(self._arrived())
        ledger.commit = commit
        ledger._chunks, ledger._messages = [], []
        ledger.close()
        self.away, self.dying = True, False
        for name in self.members:
            self.cut(name)

    def die(self, **_):
        raise Killed

    def start_broker(self, continuation=None):
        """Start the broker, or start it again."""
        settings = LedgerSettings(share_files=False)
        clock = Clock(lambda: self.now, lambda: self.now)
        self.driver = BrokerDriver.open(
            self.folder, SETTINGS, settings, self, clock, continuation=continuation
        )
        self.away = False

    def step(self):
        """Move every queue by one frame and advance the time; return whether anything moved."""
        self.now += TICK_S
        moved = False
        if not self.away:
            arrived = self._arrived()
            moved = bool(arrived)
            self.driver.turn(arrived)
        for member in self.members.values():
            queue = self.down[member.peer]
            if queue and not member.cut:
                moved = True
                chunks = [parts for parts in queue if isinstance(decode_frame(parts[0]), Chunk)]
                self.chunk_bytes_under_way = max(
                    self.chunk_bytes_under_way, sum(len(b) for parts in chunks for b in parts[1:])
                )
                header, *buffers = queue.popleft()
                member.arrived.append((decode_frame(header), buffers))
            member.turn()
        return moved

    def _arrived(self):
        """Return the oldest frame of each connection."""
        events = []
        for peer, queue in self.up.items():
            if queue:
                header, *buffers = queue.popleft()
                frame = decode_frame(header)
                self.counts[peer.partition(b"#")[0].decode(), type(frame).__name__] += 1
                events.append(ReceivedFrom(peer, frame, buffers))
        return events

    # ---- the port of the broker's driver

    def send(self, peer, header, buffers):
        if self.dying:
            raise Killed
        self.down[peer].append([header, *[bytes(each) for each in buffers]])

    def has_room(self, peer):
        return True

    def charge(self, peer):
        """Ignore it: there is no limit of messages a second."""

    def disconnect(self, peer):
        """Ignore it: the core rejects what still comes."""

    def is_up(self, peer):
        member = self.members[peer.partition(b"#")[0].decode()]
        return not member.cut and member.peer == peer

    def on_space(self, reason):
        pass

    def log(self, level, event, fields):
        pass

    # ---- what tests wait for

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
        name_of_blob = (delivery.message.sender, blob.digest)
        self.tell(name, node.Fetch(delivery.message.sender, blob))
        self.until(lambda: name_of_blob in member.link.blobs.fetched)
        return bytes(member.link.blobs.fetched.pop(name_of_blob))


def network(folder):
    """An aggregator, and two workers with clients 0-4 and 5-9, all admitted."""
    net = Net(folder)
    net.add("agg", "aggregator", key="ka", run="r", config="[run]", total_clients=10)
    net.add("w1", key="k1", clients=((0, 4),))
    net.add("w2", key="k2", clients=((5, 9),))
    net.run(0.5)
    assert notes(net, "agg", "joined") == ["w1", "w2"]
    return net


def notes(net, name, kind="note"):
    key = "number" if kind == "note" else "node"
    messages = [each.message for each in net.members[name].inbox]
    return [each.body[key] for each in messages if each.kind == kind]


def lose_the_answers(net, name, steps):
    """Let the broker receive the frames in flight, and cut the connection before its answers."""
    net.members[name].cut = True
    for _ in range(steps):
        net.step()
    net.cut(name)


def model(size, seed=0):
    return random.Random(seed).randbytes(size)  # noqa: S311 - test data
