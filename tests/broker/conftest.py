"""A bench for the Broker core: no sockets, virtual time, a ledger of plain lists."""

from collections import defaultdict

import msgspec
import pytest

from fedmq.broker.core import Broker
from fedmq.broker.ledger import Accepted, Consumed, Refusal
from fedmq.broker.state import Append, BrokerSettings, Drop, Log, Put, Received, Send, Wake
from fedmq.broker.wire import (
    Blob,
    Deliver,
    Hello,
    Message,
    Numbered,
    Post,
    Welcome,
    decode_frame,
    decode_message,
    encode_frame,
    encode_message,
    inline_choice,
)


class Bench:
    """Carries a Broker core's actions out, and checks what must hold of any of them.

    Attributes:
        now: virtual time, in seconds.
        entries: the ledger.
        blobs: bytes by full name.
        sent: frames and buffers, by peer, until they are taken.
        logs: what the core wanted a person to know.
    """

    def __init__(self, lease_s=10.0, beat_s=1.0):
        self.now = 0.0
        self.entries = []
        self.blobs = {}
        self.sizes = {}
        self.sent = defaultdict(list)
        self.logs = []
        self.numbers = defaultdict(int)
        self.core = Broker(BrokerSettings(lease_s, beat_s), self.size_of)

    def size_of(self, name):
        if name in self.blobs and len(self.blobs[name]) == self.sizes[name]:
            return self.sizes[name]
        return None

    def handle(self, event):
        """One event at the present time; returns its actions."""
        actions = self.core.handle(event, self.now)
        for action in actions:
            match action:
                case Append(entry):
                    assert entry.seq == len(self.entries)
                    if isinstance(entry, Accepted):
                        entry.read()
                    self.entries.append(entry)
                case Put(name, size, start, data):
                    have = self.blobs.setdefault(name, bytearray())
                    self.sizes.setdefault(name, size)
                    if start == len(have):
                        have += data
                case Drop(name):
                    self.blobs.pop(name)
                    self.sizes.pop(name)
                case Send(peer, frame, blobs):
                    assert decode_frame(encode_frame(frame)) == frame
                    if isinstance(frame, Deliver):
                        assert frame.seq < len(self.entries), "delivered before it is kept"
                        assert self.entries[frame.seq].message == frame.message
                    buffers = []
                    for name, start, size in blobs:
                        assert self.size_of(name) is not None, "sent before it is kept"
                        assert start + size <= self.sizes[name], "more than there is"
                        buffers.append(bytes(self.blobs[name][start : start + size]))
                    self.sent[peer].append((frame, buffers))
                case Log():
                    self.logs.append(action)
        return actions

    def say(self, peer, frame, *buffers):
        """A frame from a peer; returns the actions."""
        return self.handle(Received(peer, frame, buffers))

    def tell(self, peer, frame):
        """A numbered frame from a peer, with its next number; returns the actions."""
        assert isinstance(frame, Numbered)
        self.numbers[peer] += 1
        return self.say(peer, msgspec.structs.replace(frame, n=self.numbers[peer] - 1))

    def wake(self, now=None):
        """Let virtual time pass, waking the core at each of its deadlines on the way."""
        until = self.now if now is None else now
        while self.core.deadline is not None and self.core.deadline < until:
            self.now = max(self.now, self.core.deadline)
            self.handle(Wake())
        self.now = until
        return self.handle(Wake())

    def join(self, node, role="worker", session="s1", *, clients=(), peer=None, **more):
        """Say Hello; returns the peer. The aggregator brings run `r` with 10 clients."""
        peer = peer or f"{node}:{session}".encode()
        if role == "aggregator":
            more = {"run": "r", "config": "[run]", "total_clients": 10, **more}
        self.say(peer, Hello(node=node, role=role, session=session, clients=clients, **more))
        return peer

    def joined(self, *args, **more):
        """Say Hello, be welcomed, and forget what was sent."""
        peer = self.join(*args, **more)
        assert any(isinstance(frame, Welcome) for frame, _ in self.sent[peer])
        self.take(peer)
        return peer

    def post(self, peer, to, text="", *, blobs=(), inline=None, n=None, consumes=(), **fields):
        """Post a message; the node's name is what stands before the peer's colon."""
        if n is None:
            n = self.numbers[peer]
            self.numbers[peer] += 1
        sender = peer.decode().partition(":")[0]
        names = tuple(Blob.of(data) for data in blobs)
        fields = {"id": f"{sender}/{n}", "run": "r", "sender": sender, **fields}
        message = Message(kind="note", to=to, body={"text": text}, blobs=names, **fields)
        inline = inline_choice(names) if inline is None else inline
        post = Post(n=n, message=encode_message(message), inline=inline, consumes=consumes)
        return self.say(peer, post, *[blobs[index] for index in inline])

    def take(self, peer, kind=object):
        """Take the frames of a kind that were sent to a peer; drop the others."""
        return [frame for frame, _ in self.sent.pop(peer, []) if isinstance(frame, kind)]

    def texts(self, peer):
        """Take the notes that were delivered to a peer."""
        messages = [decode_message(frame.message) for frame in self.take(peer, Deliver)]
        return [each.body["text"] for each in messages if each.kind == "note"]

    def said(self, *kinds):
        """What the broker itself put into the ledger: (kind, body)."""
        messages = [entry.read() for entry in self.entries if isinstance(entry, Accepted)]
        return [
            (each.kind, each.body)
            for each in messages
            if each.sender == "broker" and (not kinds or each.kind in kinds)
        ]

    def account(self):
        """Read the ledger: numbers accepted for delivery, consumed, and refused by recipients."""
        accepted, consumed, refused = [], [], []
        for entry in self.entries:
            match entry:
                case Accepted(seq=seq, consumes=consumes):
                    if entry.read().to != "record":
                        accepted.append(seq)
                    consumed += consumes
                case Consumed(of=of):
                    consumed += of
                case Refusal(of=int(seq)):
                    refused.append(seq)
        return accepted, consumed, refused


@pytest.fixture
def bench():
    return Bench()


@pytest.fixture(scope="session")
def new_bench():
    """The class itself, for tests that need several, or other times."""
    return Bench
