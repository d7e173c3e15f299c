"""A broker of an honest run and its attackers: no sockets, virtual time, in both columns.

Attackers and honest nodes are raw peers, whose bytes go through the broker's own decoder, core,
driver and ledger. ``keys`` is the column: without, every connection is keyless, as on loopback;
with, the transport has proven a key for each, and the rights of the attacker's key are lesser.
"""

import collections
import contextlib

import msgspec

from fedmq.broker.access.rights import LOCAL, Access, Invite, Origin, Rights
from fedmq.broker.core.events import ReceivedFrom, Unreadable
from fedmq.broker.driver import BrokerDriver
from fedmq.broker.errors import WireError
from fedmq.broker.ledger.entries import Accepted, Refusal
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.rejections import Code, RejectCode
from fedmq.broker.settings import BrokerSettings, LedgerSettings
from fedmq.broker.wire.clock import Clock
from fedmq.broker.wire.encoding import decode_frame, decode_message, split_header
from fedmq.broker.wire.schema import MAX_BUFFERS
from tests.attacks.peer import Peer

CONFIG = "[run]\n"
CLIENTS = 10
MALLORY = "mallory"
"""The attacker's name: an admitted worker that hosts client 9."""


def public_key(name):
    """Return a string that stands for a CURVE public key."""
    return f"{name}-".ljust(40, "k")


RIGHTS = {
    "aggregator": Rights(name="aggregator", roles=("aggregator",), runs=("r",)),
    "w1": Rights(name="w1", roles=("worker",), clients=((0, 4),), runs=("r",)),
    "w2": Rights(name="w2", roles=("worker",), clients=((5, 8),), runs=("r",), read_files=True),
    "eva": Rights(name="eva", roles=("evaluator",), runs=("r",)),
    "watcher": Rights(name="watcher", roles=("observer",), runs=("r",)),
    MALLORY: Rights(name=MALLORY, roles=("worker",), clients=((9, 9),), runs=("r",)),
}
"""What each key may do, by name of the node that holds it."""
INVITED = Rights(name="invited", roles=("worker",), clients=((9, 9),), runs=("r",))


class MemoryAccess:
    """An `AccessStore` in memory."""

    def __init__(self, access):
        self.access = access
        self.fails = ""
        self._seen = None

    def load(self):
        self._seen = self.access
        return self.access

    def changed(self):
        return self._seen is not self.access

    def enroll(self, key, invite, now):
        if self.fails:
            raise OSError(self.fails)
        found = self.access.invites.get(invite)
        if found is None:
            raise ValueError("the invite was revoked")
        if key not in found.enrolled:
            if now >= found.expires_at:
                raise ValueError("the invite has expired")
            if not found.uses:
                raise ValueError("the invite has no uses left")
            enrolled = (*found.enrolled, key)
            left = msgspec.structs.replace(found, uses=found.uses - 1, enrolled=enrolled)
            rights = msgspec.structs.replace(found.rights, key=key, name=f"new {len(enrolled)}")
            self.access = msgspec.structs.replace(
                self.access,
                keys={**self.access.keys, key: rights},
                invites={**self.access.invites, invite: left},
            )
        return self.load()

    def change(self, **keys):
        """Replace the rights of keys by name; None revokes one."""
        rights = dict(self.access.keys)
        for name, each in keys.items():
            if each is None:
                del rights[public_key(name)]
            else:
                rights[public_key(name)] = msgspec.structs.replace(each, key=public_key(name))
        self.access = msgspec.structs.replace(self.access, keys=rights)


class Wire:
    """A connection of the world: the wire of a `Peer`."""

    def __init__(self, world, peer, origin):
        self.world, self.peer, self.origin = world, peer, origin
        self.arrived = collections.deque()
        self.is_up = True

    def send(self, parts):
        if self.is_up:
            self.world.receive(self, parts)

    def receive(self, timeout_s):
        return self.arrived.popleft() if self.arrived else None


class World:
    """A broker in a folder, with its driver; it is the driver's port, too.

    Args:
        folder: of the ledger.
        keys: whether the broker has keys.
        settings: of the broker.

    Attributes:
        now: virtual time, in seconds since 1970.
        wires: connections by routing id; a later one with the same id replaces the earlier.
        logs: (event, fields) of what the broker logged.
        access: who may connect.
        charged: number of posts that the broker counts as costly.
        closed: routing ids of the connections that the broker closed.
        not_reading: routing ids of the connections that do not read what they are sent.
        validates: whether the core checks its state after each turn.
    """

    def __init__(self, folder, *, keys, settings=None):
        self.folder, self.keys = folder, keys
        self.settings = settings or BrokerSettings()
        self.now = 1_000_000.0
        self.wires = {}
        self.logs = []
        self.closed = []
        self.charged = 0
        self.not_reading = set()
        self.validates = True
        known = {
            public_key(name): msgspec.structs.replace(rights, key=public_key(name))
            for name, rights in RIGHTS.items()
        }
        invites = {}
        for name, uses, expires_at in (
            ("invite", 1, self.now + 60),
            ("expired", 1, self.now - 60),
            ("used-up", 0, self.now + 60),
        ):
            rights = msgspec.structs.replace(INVITED, key=public_key(name))
            invites[public_key(name)] = Invite(rights=rights, uses=uses, expires_at=expires_at)
        invites = invites if keys else {}
        self.access = MemoryAccess(
            Access(
                keys=known if keys else {},
                invites=invites,
                keyless=None if keys else LOCAL,
            )
        )
        self.start()

    # ---- the broker

    def start(self):
        self.driver = BrokerDriver.open(
            self.folder,
            self.settings,
            LedgerSettings(),
            self,
            Clock(lambda: self.now, lambda: self.now),
            access=self.access if self.keys else None,
        )
        self.turn([])

    def close(self):
        self.driver.close()

    def restart(self):
        """Replace the broker by one that continues from the ledger; all connections are gone."""
        self.close()
        for wire in self.wires.values():
            wire.is_up = False
        self.wires.clear()
        self.start()

    def turn(self, events=()):
        self.driver.turn(events)
        if self.validates:
            self.driver.core.validate_state()

    def advance(self, seconds):
        """Let time pass; the broker wakes at each of its deadlines."""
        until = self.now + seconds
        for _ in range(1000):
            due = self.driver.deadline
            if due is None or due >= until:
                break
            self.now = max(self.now, due)
            self.turn()
        self.now = until
        self.turn()

    def receive(self, wire, parts):
        """Handle a message as the broker's loop does."""
        try:
            events = list(self._frames(wire, parts))
        except WireError as error:
            events = [Unreadable(wire.peer, error, wire.origin)]
        self.turn(events)

    def _frames(self, wire, parts):
        left = list(parts[1:])
        nbytes = sum(map(len, parts))
        room = MAX_BUFFERS
        for header, count in split_header(parts[0]):
            frame = decode_frame(header)
            buffers = []
            while left and len(buffers) != count:
                if not room:
                    raise WireError("too many buffers")
                room -= 1
                buffers.append(left.pop(0))
            yield ReceivedFrom(wire.peer, frame, buffers, nbytes, wire.origin)
            nbytes = 0

    # ---- the port of its driver

    def send(self, peer, header, buffers):
        wire = self.wires.get(peer)
        if wire is not None and wire.is_up:
            wire.arrived.append([bytes(header), *map(bytes, buffers)])

    def has_room(self, peer):
        return peer not in self.not_reading

    def charge(self, peer):
        self.charged += 1

    def is_up(self, peer):
        wire = self.wires.get(peer)
        return wire is not None and wire.is_up

    def disconnect(self, peer):
        self.closed.append(peer)

    def on_space(self, reason):
        pass

    def log(self, level, event, fields):
        self.logs.append((event, fields))

    # ---- peers

    def connect(self, key, peer=None, address="127.0.0.1"):
        """Return a peer with the key of this name; without keys, a peer of this host."""
        peer = peer or f"{key}#{len(self.wires)}".encode()
        origin = Origin(public_key(key), address) if self.keys else Origin("", address)
        wire = self.wires[peer] = Wire(self, peer, origin)
        return Peer(wire)

    # ---- the ledger

    def entries(self):
        return list(read_entries(self.folder))

    def messages(self, sender=None):
        """Return the accepted messages, of one sender or of all."""
        found = [each.read() for each in self.entries() if isinstance(each, Accepted)]
        return [each for each in found if sender in (None, each.sender)]

    def refusals(self):
        return [each for each in self.entries() if isinstance(each, Refusal)]


def outcome(frames):
    """Return the typed answer in what a peer has heard; a word if it got no such answer."""
    found = [_typed(frame, buffers) for frame, buffers in frames]
    found = [each for each in found if each is not None]
    return found[0] if found else "ignored"


def _typed(frame, buffers):
    match frame:
        case {"kind": "reject", "code": code}:
            return RejectCode(code)
        case {"kind": "deliver", "message": data}:
            message = decode_message(data)
            if message.kind == "refused":
                return Code(message.body["code"])
        case {"kind": "chunk"}:
            return "bytes" if buffers else "no bytes"
        case {"kind": "welcome"}:
            return "admitted"
        case {"kind": "wait"}:
            return "waits"
        case {"kind": "stranger"}:
            return "unknown session"
        case {"kind": "enrolled"}:
            return "enrolled"
    return None


@contextlib.contextmanager
def world_of(folder, *, keys, settings=None):
    """Yield a world, and close its ledger."""
    world = World(folder, keys=keys, settings=settings)
    try:
        yield world
    finally:
        world.close()
