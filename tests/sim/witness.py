"""What is seen of a history while it runs, and what can only be checked then.

A `Witness` stands outside of all processes. It sees which messages their senders were told to be
in the ledger, what was delivered, and when, in true time.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field

from fedmq.broker.core.events import Append, DiskFull, ReceivedFrom, SendTo, TimerFired
from fedmq.broker.core.sessions import MAX_SILENT_LEASES
from fedmq.broker.driver import ACCESS_EACH_S
from fedmq.broker.ledger.entries import Accepted, Ended, Refusal
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.link.events import Delivery
from fedmq.broker.virtual.broker import VirtualBroker
from fedmq.broker.wire.addresses import BROKER, TIMER
from fedmq.broker.wire.schema import Blob, Welcome

TIMER_SLACK_S = 0.1
"""A turn of the broker may begin this much later than planned, in seconds."""


@dataclass
class Session:
    """What one session of a node has received.

    Attributes:
        node: the `VirtualNode`.
        deliveries: each delivery, with the number of entries in the ledger when it arrived.
    """

    node: object
    deliveries: list[tuple[Delivery, int]] = field(default_factory=list)


class Witness:
    """Sees a history; called by `Simulation` with the broker and with sessions that start.

    Args:
        folder: of the ledger.
        drift: largest relative error of a clock's rate.
        lease_s: of the broker.

    Attributes:
        sessions: of all nodes, in the order of their starts.
        entries: of the ledger, when the broker was last started.
        wrong_reads: (number, index) of each blob that a node has read with other bytes. It is only
            noted: a node might take an exception for one of the task.
    """

    def __init__(self, folder, drift, lease_s):
        self.folder, self._drift, self._lease_s = folder, drift, lease_s
        self.sessions, self.entries, self.wrong_reads = [], [], []
        self.broker = self.network = self.simulation = None
        self._owners = {}
        """Owner of each node's name, as its last `joined` message says."""
        self._messages = {}
        self._pending_timers = {}
        """Latest true time at which each timer fires, by number."""
        self._is_full = False
        self._last_heard = {}
        """True time of the last frame over each connection that this broker has admitted."""

    def __call__(self, started):
        """Watch a broker or a session that has just started."""
        if isinstance(started, VirtualBroker):
            self._watch_broker(started)
        else:
            self._watch_node(started)

    def message_of(self, entry):
        """Return the message of an accepted entry."""
        found = self._messages.get(entry.message)
        if found is None:
            found = self._messages[entry.message] = entry.read()
        return found

    # ---- durability

    def check_durability(self):
        """Durability: everything acknowledged or delivered so far is in the ledger."""
        entries = self.entries = list(read_entries(self.folder))
        here = {each.message for each in entries if isinstance(each, Accepted)}
        rejected = None
        for session in self.sessions:
            port = session.node.port
            for n, data in port.posts.items():
                if n > port.acknowledged_to:
                    break
                if data not in here:
                    rejected = rejected or {each.id for each in entries if _is_rejected_post(each)}
                    name = self.message_of(Accepted(seq=0, at=0.0, message=data)).id
                    assert name in rejected, f"lost: {name} of {port.name} was acknowledged"
            for delivery, _ in session.deliveries:
                seq = delivery.seq
                assert seq < len(entries), f"lost: {seq} was delivered to {port.name}"
                entry = entries[seq]
                assert isinstance(entry, Accepted), f"{seq} was delivered, now it is {entry}"
                same = entry.at == delivery.at and self.message_of(entry) == delivery.message
                assert same, f"{seq} is not what was delivered to {port.name}"

    # ---- the broker

    def _watch_broker(self, broker):
        self.broker, self.network = broker, broker.network
        self.check_durability()
        now = self.network.now
        self._is_full = False
        self._last_heard.clear()
        self._pending_timers.clear()
        self._owners.clear()
        for entry in self.entries:
            self._note(entry, now)
            if isinstance(entry, Accepted):
                self._note_owner(self.message_of(entry))
        _watch(broker.core, self._broker_handled)

    def _broker_handled(self, actions, event, _):
        """See an event of the broker, and its actions."""
        now = self.network.now
        if isinstance(event, ReceivedFrom) and event.peer in self._last_heard:
            self._last_heard[event.peer] = now
        elif isinstance(event, DiskFull):
            self._is_full = bool(event.reason)
        left = []
        for action in actions:
            if isinstance(action, Append):
                entry = action.entry
                self._note(entry, now)
                if isinstance(entry, Accepted):
                    message = self.message_of(entry)
                    self.check_owners(message)
                    self.check_revoked(message, now)
                    self._note_owner(message)
                    if message.kind == "left":
                        left.append(message)
            elif isinstance(action, SendTo) and isinstance(action.frame, Welcome):
                self._last_heard[action.peer] = now
        for message in left:
            self.check_presence(message, now)
        if isinstance(event, TimerFired) and not self._is_full:
            self.check_timers_fire(now)

    def _note(self, entry, now):
        """Keep the timers that have not fired."""
        if isinstance(entry, Accepted):
            message = self.message_of(entry)
            if message.to == TIMER:
                longest = message.body["after_s"] / (1.0 - self._drift)
                self._pending_timers[entry.seq] = now + longest + TIMER_SLACK_S
            elif self._pending_timers:
                for seq in entry.consumes:
                    self._pending_timers.pop(seq, None)
        elif isinstance(entry, Ended):
            self._pending_timers.clear()

    # ---- keys

    @property
    def _access(self):
        return self.broker.core._admissions.access

    def _note_owner(self, message):
        if message.kind == "joined" and message.sender == BROKER:
            self._owners[message.body["node"]] = message.body["owner"]

    def check_owners(self, message):
        """Rights: a node's name stays its first owner's, or that of a key that replaces it."""
        if message.kind != "joined":
            return
        name, owner = message.body["node"], message.body["owner"]
        known = self._owners.get(name, owner)
        rights = self._access.keys.get(owner)
        replaced = rights.replaces if rights is not None else ()
        assert known in (owner, *replaced), f"{name} was {known}'s, now it is {owner}'s"

    def check_revoked(self, message, now):
        """Rights: a key that was revoked does nothing any more, once the broker has looked."""
        owner = self._owners.get(message.sender)
        revoked_at = getattr(self.simulation, "revoked_at", {}).get(owner, math.inf)
        latest = revoked_at + ACCESS_EACH_S / (1.0 - self._drift) + TIMER_SLACK_S
        assert now <= latest, f"{message.id} is from a key that was revoked: {owner}"

    def check_timers_fire(self, now):
        """Liveness: a timer fires within its time, counted from its request or a later restart."""
        for seq, latest in self._pending_timers.items():
            assert now <= latest, f"timer {seq} is {now - latest:.2f} s late"

    def check_presence(self, message, now):
        """Liveness: a node does not count as gone while it is there and its connection is up."""
        if message.sender != BROKER:
            return
        body = message.body
        newest = {each.node.port.name: each.node for each in self.sessions}.get(body["node"])
        if newest is None or self._access.rights_of(newest.port.origin.key) is None:
            return  # a stranger, or its key was revoked
        port = newest.port
        heard = self._last_heard.get(port.peer)
        if newest.hello.session != body["session"] or not port.up or heard is None:
            return  # replaced, dead, or not admitted over this connection
        longest = MAX_SILENT_LEASES * self._lease_s / (1.0 + self._drift)
        there = self.network.is_up(port.peer) and now < heard + longest
        assert not there, f"{port.name} counts as gone: {body['reason']}, but its connection is up"

    # ---- the nodes

    def _watch_node(self, node):
        session = Session(node)
        self.sessions.append(session)

        def handled(actions, *_):
            for action in actions:
                if isinstance(action, Delivery):
                    session.deliveries.append((action, self.broker.ledger.next_seq))

        _watch(node.link.core, handled)
        self._watch_reads(node.link.blobs)

    def _watch_reads(self, blobs):
        read, chunks = blobs.read, blobs.chunks

        def note(delivery, index, found):
            if Blob.of(found) != delivery.message.blobs[index]:
                self.wrong_reads.append((delivery.seq, index))

        def noted_read(delivery, index):
            found = read(delivery, index)
            note(delivery, index, found)
            return found

        def noted_chunks(delivery, index):
            found = []
            for chunk in chunks(delivery, index):
                found.append(bytes(chunk))
                yield chunk
            note(delivery, index, b"".join(found))

        blobs.read, blobs.chunks = noted_read, noted_chunks

    def deliveries_by_node(self):
        """Return the sessions of each node, by name."""
        found = defaultdict(list)
        for session in self.sessions:
            found[session.node.port.name].append(session)
        return found


def _is_rejected_post(entry):
    return isinstance(entry, Refusal) and entry.of is None


def _watch(core, see):
    """Call ``see(actions, event, now)`` after each event of a core."""
    handle = core.handle

    def seen(*event):
        actions = handle(*event)
        see(actions, *event)
        return actions

    core.handle = seen
