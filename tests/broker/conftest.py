"""A test bench for the Broker core: no sockets, virtual time, a ledger of plain lists."""

import functools
import itertools
import types
from collections import defaultdict

import msgspec
import pytest
import xxhash
from msgspec.structs import replace

from fedmq.broker.access import rights
from fedmq.broker.access.rights import KEYLESS, OPEN, Access
from fedmq.broker.core.broker import Broker
from fedmq.broker.core.events import AccessChanged, Log, ReceivedFrom, TimerFired
from fedmq.broker.core.mailboxes import Mailboxes
from fedmq.broker.driver import BrokerDriver
from fedmq.broker.ledger.entries import Accepted, Consumed, Refusal
from fedmq.broker.recovery import Restorer
from fedmq.broker.settings import BrokerSettings, LedgerSettings
from fedmq.broker.wire.encoding import (
    decode_frame,
    decode_message,
    encode_message,
    inline_choice,
)
from fedmq.broker.wire.schema import (
    POST_BYTES,
    Blob,
    Deliver,
    Hello,
    Message,
    NumberedFrame,
    Post,
    Welcome,
)


class Bench:
    """A broker whose ledger are lists, which checks the invariants of each action.

    It is the driver's port, too. A connection that is probed is gone, unless it is among
    those that stand.

    Attributes:
        now: virtual time, in seconds.
        entries: the ledger.
        blobs: bytes by full name.
        uses: names of the blobs that must stay, by the number of who needs them.
        sent: frames and buffers, by peer, until they are taken.
        standing: connections that stand, however silent.
        logs: what the core wanted a person to know.
        validates: whether the core checks its state after each event.
        access: who may connect, for `enroll`; set by `allow`.
        disconnected: connections that the core wanted closed.
    """

    def __init__(self, lease_s=10.0, beat_s=1.0, deliveries=5, **more):
        self.settings = BrokerSettings(lease_s, beat_s, deliveries, **more)
        self.now = 0.0
        self.entries = []
        self.blobs = {}
        self.sizes = {}
        self.uses = {}
        self.sent = defaultdict(list)
        self.standing = set()
        self.logs = []
        self.validates = True
        self.numbers = defaultdict(int)
        self.origins = {}
        self.access, self.enroll_error = OPEN, None
        self.disconnected = []
        self.payload = types.SimpleNamespace(read=self._read_blob)
        self.cut_bytes, self.damage, self.next_seq = 0, [], 0
        self._actions, self._named = [], ()
        self.draw_identity = map("run{}".format, itertools.count(1)).__next__
        self.restart()

    def restart(self, *, redeliver_dead_letters=False):
        """Replace the broker by one that continues from the ledger, without connections."""
        restorer = Restorer(Mailboxes())
        for entry in self.entries:
            restorer.feed(msgspec.msgpack.decode(msgspec.msgpack.encode(entry), type=type(entry)))
        for seq in restorer.dead_letters if redeliver_dead_letters else ():
            data = self.entries[seq].message
            entry = Accepted(seq=len(self.entries), at=self.now, message=data, consumes=(seq,))
            self.entries.append(entry)
            restorer.feed(entry)
        self.sent.clear()
        self.uses = {}
        restorer.finish(self, self.now, self.settings.lease_s)
        self.core = Broker(self.settings, self, self.draw_identity, restorer.mailboxes)
        self.core.validate_state()
        self.core.handle = functools.partial(self._handled, self.core.handle)
        settings = LedgerSettings(share_files=False)
        self.driver = BrokerDriver(self.core, self, self, lambda: self.now, settings)
        self.driver._access = self  # keys change only by `allow`
        for run, seq in restorer.lost:
            actions = self.core.give_up(run, [seq], "lost", self.now)
            self.driver.carry_out(actions, self.now)
        self.driver.write_and_send(self.now)

    # ---- the store

    def size_of(self, name):
        if name in self.blobs and len(self.blobs[name]) == self.sizes[name]:
            return self.sizes[name]
        return None

    def used(self, run, owner):
        sizes = {n: len(data) for n, data in self.blobs.items() if n.run == run}
        return sum(size for n, size in sizes.items() if n.owner == owner), sum(sizes.values())

    def have(self, name):
        return len(self.blobs.get(name, b""))

    def resume(self, name, size):
        have = bytes(self.blobs.get(name, b""))
        return len(have), xxhash.xxh3_128(have)

    def read(self, seq):
        assert isinstance(self.entries[seq], Accepted)
        return self.entries[seq]

    # ---- the ledger, as its driver uses it

    def use(self, seq, names, *, kept=True):
        self._named = names
        if names and kept:
            self.uses[seq] = tuple(names)

    def append(self, entry):
        assert entry.seq == len(self.entries)
        assert all(self.size_of(name) is not None for name in self._named), "kept too early"
        if isinstance(entry, Accepted):
            entry.read()
        for seq in self.finished_by(entry):
            self.uses.pop(seq, None)
        self.entries.append(entry)

    def put(self, name, size, start, data):
        have = self.blobs.setdefault(name, bytearray())
        self.sizes.setdefault(name, size)
        if start == len(have):
            have += data

    def discard(self, name, size):
        self.blobs.pop(name)
        self.sizes.pop(name)

    def unpin(self, names):
        pass

    def commit(self):
        pass

    def _read_blob(self, name, start, size):
        assert self.size_of(name) is not None, "sent before it is kept"
        assert start + size <= self.sizes[name], "more than there is"
        return bytes(self.blobs[name][start : start + size])

    # ---- the port of its driver

    def send(self, peer, header, buffers):
        frame = decode_frame(header)
        if isinstance(frame, Deliver):
            assert frame.seq < len(self.entries), "delivered before it is kept"
            assert self.entries[frame.seq].message == frame.message
        self.sent[peer].append((frame, buffers))

    def has_room(self, peer):
        return True

    def charge(self, peer):
        """Ignore it: there is no limit of messages a second."""

    def disconnect(self, peer):
        """Only note it: frames may come that were sent before."""
        self.disconnected.append(peer)

    def is_up(self, peer):
        return peer in self.standing

    def on_space(self, reason):
        pass

    def log(self, level, event, fields):
        self.logs.append(Log(level, event, fields))

    # ---- keys

    def allow(self, *rights, invites=(), keyless=None):
        """Change who may connect: these keys and invites; by default nobody without a key."""
        keys = {each.key: each for each in rights}
        held = {each.rights.key: each for each in invites}
        self.access = self.driver._who = Access(keys=keys, invites=held, keyless=keyless)
        return self.handle(AccessChanged(self.access))

    def load(self):
        return self.access

    def enroll(self, key, invite, now):
        if self.enroll_error:
            raise self.enroll_error
        held = self.access.invites[invite]
        used = replace(held, uses=held.uses - 1, enrolled=(*held.enrolled, key))
        given = replace(held.rights, key=key, name=f"{held.rights.name}-{len(held.enrolled)}")
        self.access = replace(
            self.access,
            keys={**self.access.keys, key: given},
            invites={**self.access.invites, invite: used},
        )
        return self.access

    # ---- events

    def handle(self, event):
        """Handle one event at the present time; return its actions, and those that followed."""
        self._actions = []
        self.driver.carry_out(self.core.handle(event, self.now), self.now)
        self.driver.write_and_send(self.now)
        return self._actions

    def _handled(self, handle, *event):
        """Note the actions of an event, and check the core's state."""
        actions = handle(*event)
        self._actions += actions
        if self.validates:
            self.core.validate_state()
        return actions

    def say(self, peer, frame, *buffers, origin=None):
        """Handle a frame from a peer; return the actions. A peer keeps its last origin."""
        origin = self.origins.setdefault(peer, KEYLESS) if origin is None else origin
        self.origins[peer] = origin
        return self.handle(ReceivedFrom(peer, frame, buffers, origin=origin))

    def tell(self, peer, frame):
        """Handle a frame from a peer with its next number; return the actions."""
        assert isinstance(frame, NumberedFrame)
        self.numbers[peer] += 1
        return self.say(peer, msgspec.structs.replace(frame, n=self.numbers[peer] - 1))

    def wake(self, now=None):
        """Advance the virtual time, and wake the core at each of its deadlines."""
        until = self.now if now is None else now
        while self.core.deadline is not None and self.core.deadline < until:
            self.now = max(self.now, self.core.deadline)
            self.handle(TimerFired())
        self.now = until
        return self.handle(TimerFired())

    # ---- nodes

    def join(
        self, node, role="worker", session="s1", *, clients=(), peer=None, origin=KEYLESS, **more
    ):
        """Send Hello; return the peer. The aggregator opens run `r` with 10 clients.

        Each name has a secret of its own, so that its later sessions are the same node's.
        """
        more = {"key": f"secret of {node}", **more}
        peer = peer or f"{node}:{session}".encode()
        if role == "aggregator":
            more = {"run": "r", "config": "[run]", "total_clients": 10, **more}
        hello = Hello(node=node, role=role, session=session, clients=clients, **more)
        self.say(peer, hello, origin=origin)
        return peer

    def joined(self, *args, **more):
        """Send Hello, check the Welcome, and drop what was sent."""
        peer = self.join(*args, **more)
        assert any(isinstance(frame, Welcome) for frame, _ in self.sent[peer])
        self.take(peer)
        return peer

    def post(self, peer, to, text="", *, blobs=(), inline=None, n=None, consumes=(), **fields):
        """Post a message; the node's name is the part of the peer before the colon."""
        if n is None:
            n = self.numbers[peer]
            self.numbers[peer] += 1
        sender = peer.decode().partition(":")[0]
        names = tuple(Blob.of(data) for data in blobs)
        fields = {"kind": "note", "id": f"{peer.decode()}/{n}", "sender": sender, **fields}
        fields = {"run": "r", "body": {"text": text}, **fields}
        message = Message(to=to, blobs=names, **fields)
        inline = inline_choice(names, POST_BYTES) if inline is None else inline
        post = Post(n=n, message=encode_message(message), inline=inline, consumes=consumes)
        return self.say(peer, post, *[blobs[index] for index in inline])

    def timer(self, peer, token, after_s):
        """Ask for a tick."""
        return self.post(peer, "timer", body={"token": token, "after_s": after_s})

    def take(self, peer, kind=object):
        """Take the frames of a kind that were sent to a peer; drop the others."""
        return [frame for frame, _ in self.sent.pop(peer, []) if isinstance(frame, kind)]

    def inbox(self, peer):
        """Take the messages that were delivered to a peer."""
        return [decode_message(frame.message) for frame in self.take(peer, Deliver)]

    def texts(self, peer):
        """Take the notes that were delivered to a peer."""
        return [each.body["text"] for each in self.inbox(peer) if each.kind == "note"]

    # ---- the ledger

    def messages(self):
        """Every accepted message, in order."""
        return [entry.read() for entry in self.entries if isinstance(entry, Accepted)]

    def refusals(self):
        """Every refusal, in order."""
        return [entry for entry in self.entries if isinstance(entry, Refusal)]

    def said(self, *kinds):
        """Return (kind, body) of each message from the broker itself."""
        return [
            (each.kind, each.body)
            for each in self.messages()
            if each.sender == "broker" and (not kinds or each.kind in kinds)
        ]

    def finished_by(self, entry):
        """Return the numbers that an entry consumes."""
        match entry:
            case Accepted(consumes=seqs) | Consumed(of=seqs):
                return seqs
        return ()

    def account(self):
        """Return the numbers accepted for a node, consumed, and rejected after acceptance."""
        accepted, consumed, refused = [], [], []
        for entry in self.entries:
            match entry:
                case Accepted(seq=seq) if entry.read().to != "record":
                    accepted.append(seq)
                case Refusal(of=int(seq)):
                    refused.append(seq)
            consumed += self.finished_by(entry)
        return accepted, consumed, refused

    def pending(self):
        """Return the numbers of the unfinished messages in the core's state, in order."""
        found = []
        for run in self.core._mailboxes.runs.values():
            found += [seq for node in run.nodes.values() if node.alive for seq in node.pending]
            found += [seq for seqs in run.waiting.values() for seq in seqs]
            found += [] if run.checkpoint is None else [run.checkpoint]
        return sorted([*found, *(seq for _, seq, _, _ in self.core._mailboxes.timers)])


@pytest.fixture(autouse=True)
def notes(monkeypatch):
    """Let any node post a `note` to any address: the tests of the transport need no tasks."""
    places = ("client", "aggregator", "evaluator", "record", "checkpoint")
    rows = {(role, "note", to): False for role in ("worker", "evaluator") for to in places[:4]}
    rows |= {("aggregator", "note", to): False for to in places}
    for row, asked in rows.items():
        monkeypatch.setitem(rights.POSTS, row, asked)


@pytest.fixture
def bench():
    return Bench()


@pytest.fixture(scope="session")
def new_bench():
    """Return the class, for tests that need several benches or other settings."""
    return Bench
