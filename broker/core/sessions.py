"""Track the sessions of nodes and their leases: take-over, silence, leave."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from fedmq.broker.access.owners import key_of
from fedmq.broker.access.quotas import Quotas, source_of
from fedmq.broker.access.rights import Origin
from fedmq.broker.core import delivery
from fedmq.broker.core.events import Action, Forget, Log, Probe, Unpin
from fedmq.broker.core.lifecycles import WITHOUT_CONNECTION, SessionEvent, SessionState, word
from fedmq.broker.core.mailboxes import Mailboxes
from fedmq.broker.core.state import Node
from fedmq.broker.rejections import Code
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.wire.addresses import AGGREGATOR, BROKER, OBSERVER, RECORD
from fedmq.broker.wire.schema import Done, RunEnded

MAX_SILENT_LEASES = 10
"""Leases after which a silent node has left, even if its connection is up."""


class Sessions:
    """The nodes of all runs, and their connections. A session belongs to a connection and a key.

    Args:
        settings: leases, limits and the delivery limit.
        mailboxes: the runs and their messages.

    Attributes:
        peers: nodes by connection.
        quotas: counts the live sessions by source.
        due: earliest time at which a lease or a pause of a node may end; infinite without nodes.
    """

    def __init__(self, settings: BrokerSettings, mailboxes: Mailboxes) -> None:
        self._settings, self._mailboxes = settings, mailboxes
        self.peers: dict[bytes, Node] = {}
        self.quotas = Quotas(settings.limits)
        for node in self.alive():
            self.quotas.begin(node.origin)
        self.due = self._next_due()

    def session_of(self, peer: bytes, origin: Origin, out: list[Action]) -> Node | None:
        """Return the node of a connection, if its session belongs to the key, too."""
        node = self.peers.get(peer)
        if node is None or node.origin.key == origin.key:
            return node
        # Its connection is closed, and another peer has taken its routing id.
        out.append(Forget(peer))
        self.forget_connection(node)
        node.peer = b""
        if node.alive and node.state is not SessionState.AWAITED:
            node.move(SessionEvent.DISCONNECT)
        return None

    def note_due(self, node: Node) -> None:
        """Look after a node when its lease or pause ends."""
        self.due = min(self.due, _due(node))

    def look_after(self, now: float, out: list[Action]) -> None:
        """End the leases and pauses that have expired; returns at once before `due`.

        A lease can only become longer meanwhile, so the nodes need not be checked at each turn:
        with 1,000 nodes, that took ten times as long as the turn itself.
        """
        if now < self.due:
            return
        for node in [node for node in self.alive() if node.lease_until <= now]:
            self._lapse(node, now, out)
        for node in self.alive():
            if node.resume_at and node.resume_at <= now:
                node.resume_at = 0.0
                out.extend(delivery.deliver(node, self._mailboxes.read, now))
        self.due = self._next_due()

    def _next_due(self) -> float:
        return min(map(_due, self.alive()), default=math.inf)

    def _lapse(self, node: Node, now: float, out: list[Action]) -> None:
        """Handle the end of a lease: the node has left if its connection is gone, too.

        An I/O thread keeps the connection of a busy node up: it is slow, not gone. After the
        end of its run, a node that does not say goodbye gets no further lease.
        """
        silent = now - node.last_seen
        may_be_slow = node.state in (SessionState.CONNECTED, SessionState.SILENT)
        if not may_be_slow or silent >= MAX_SILENT_LEASES * self._settings.lease_s:
            self.leave(node, f"silent for {silent:.1f} s", now, out)
        else:
            node.move(SessionEvent.LEASE_END)
            node.lease_until = now + self._settings.beat_s
            out.append(Probe(node.peer))

    def leave(
        self, node: Node, reason: str, now: float, out: list[Action], *, clean: bool = False
    ) -> None:
        """Record that a node has left; ``clean``: not because of the message that it handled."""
        node.move(SessionEvent.LEAVE)
        self.quotas.end(node.origin)
        run = node.run
        if run.over:
            return
        posts = [each for each in node.pending_frames if not isinstance(each, Done | RunEnded)]
        out.extend(Unpin(post.names) for post in posts if post.names)
        node.drop_frames()
        details: dict[str, Any] = {"reason": reason}
        first = next((seq for seq in node.pending if seq not in run.refused), None)
        if first is not None and first < node.sent and not clean and node.hello.role != AGGREGATOR:
            details["interrupted"] = first
            attempts = run.interrupted[first] = run.interrupted.get(first, 0) + 1
            if attempts >= self._settings.deliveries:
                text = f"dead-lettered: {attempts} sessions ended while they handled it"
                code = Code.DEAD_LETTER
                self._mailboxes.refuse(
                    run, first, BROKER, text, now, out, code=code, dead_lettered=True
                )
                del node.pending[first], run.interrupted[first]
        run.hosts.remove(node.hello)
        for seq, address in node.pending.items():
            run.waiting.setdefault(address, []).append(seq)
        for address in set(node.pending.values()):
            run.waiting[address].sort()
        for messages in (node.pending, node.requests, node.queue):
            messages.clear()
        self.announce("left", node, details, now, out)
        node.shrink()

    def announce(
        self, kind: str, node: Node, details: dict[str, Any], now: float, out: list[Action]
    ) -> None:
        """Record that a node has joined or left; the aggregator gets to know it."""
        hello, joins = node.hello, kind == "joined"
        reports = joins and hello.reports_availability is True
        body = {
            "node": hello.node,
            "role": hello.role,
            "session": hello.session,
            "clients": [list(each) for each in hello.clients],
            **({"owner": node.owner} if joins else {}),
            **({"reports_availability": True} if reports else {}),
            **details,
        }
        to = RECORD if hello.role in (AGGREGATOR, OBSERVER) else AGGREGATOR
        self._mailboxes.publish(node.run, kind, to, body, now, out)
        out.append(Log("info", kind, {"peer_node": hello.node, "role": hello.role, **details}))

    def alive(self) -> Iterator[Node]:
        """Yield the nodes that have not left."""
        for run in self._mailboxes.runs.values():
            for node in run.nodes.values():
                if node.alive:
                    yield node

    def validate_state(self) -> None:
        """Raise AssertionError, with what is wrong, if connections and nodes do not agree."""
        for peer, node in self.peers.items():
            if node.peer != peer:
                raise AssertionError(f"connection {peer!r} is not that of {node.name}")
            if node.run.nodes.get(node.name) is not node:
                raise AssertionError(f"connection {peer!r} is of an earlier session of {node.name}")
        due, counts = math.inf, Counter[str]()
        for run in self._mailboxes.runs.values():
            for node in run.nodes.values():
                if not node.owner or (key_of(node.owner) or node.origin.key) != node.origin.key:
                    raise AssertionError(
                        f"{node.name} has key {node.origin.key!r}, not its owner's"
                    )
                if not node.alive:
                    continue
                if node.hello.role == AGGREGATOR and node.owner != run.owner:
                    raise AssertionError(f"{node.name} is the aggregator of a run of {run.owner!r}")
                due = min(due, _due(node))
                if source := source_of(node.origin):
                    counts[source] += 1
                if node.peer and self.peers.get(node.peer) is not node:
                    raise AssertionError(f"{node.name} is connected, but its connection is unknown")
                if not (node.peer or node.state in WITHOUT_CONNECTION):
                    raise AssertionError(f"{node.name} is {word(node.state)} without a connection")
                if (node.state is SessionState.FINISHING) != bool(run.over):
                    ended = f"run {run.id} has {'' if run.over else 'not '}ended"
                    raise AssertionError(f"{node.name} is {word(node.state)}, but {ended}")
        if counts != self.quotas.sessions:
            raise AssertionError(f"{counts} sessions are live, but {self.quotas.sessions} count")
        if self.due > due:
            raise AssertionError(f"a lease ends at {due}, before anything is due")

    def forget_connection(self, node: Node) -> None:
        """Forget which connection a node has."""
        if self.peers.get(node.peer) is node:  # another node may have taken it over
            del self.peers[node.peer]


def _due(node: Node) -> float:
    return min(node.lease_until, node.resume_at or math.inf)
