"""Admit nodes, and track their sessions and leases: join, leave, take-over, silence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import UNSET

from fedmq.broker.core import delivery
from fedmq.broker.core.admission import MAX_EARLY, find_run, wait_for_run, why_not, wrong_name
from fedmq.broker.core.events import Action, Append, Log, Probe, SendTo, Unpin
from fedmq.broker.core.lifecycles import WITHOUT_CONNECTION, SessionEvent, SessionState, word
from fedmq.broker.core.mailboxes import Mailboxes
from fedmq.broker.core.state import Node, RunState
from fedmq.broker.ledger.entries import Opened
from fedmq.broker.rejections import Code
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.wire.addresses import AGGREGATOR, BROKER, RECORD, addresses
from fedmq.broker.wire.schema import Deliver, Done, Hello, Reject, RunEnded, Welcome

MAX_SILENT_LEASES = 10
"""Leases after which a silent node has left, even if its connection is up."""


class Sessions:
    """The nodes of all runs, and their connections.

    Args:
        settings: leases and the delivery limit.
        mailboxes: the runs and their messages.
        draw_identity: see `Broker`.
        on_admit: called with each node that is admitted, new or reconnected.

    Attributes:
        peers: nodes by connection.
        early: the last Hello of each connection that waits for its run to start, and its time.
        due: earliest time at which a lease or a pause of a node may end; infinite without nodes.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        mailboxes: Mailboxes,
        draw_identity: Callable[[], str],
        on_admit: Callable[[Node, float, list[Action]], None],
    ) -> None:
        self._settings, self._mailboxes = settings, mailboxes
        self._draw_identity, self._on_admit = draw_identity, on_admit
        self.peers: dict[bytes, Node] = {}
        self.early: dict[bytes, tuple[Hello, float]] = {}
        self._has_opened = False
        """Whether a run has been opened, for which nodes in `early` may wait."""
        self.due = self._next_due()

    def hello(self, peer: bytes, hello: Hello, now: float, out: list[Action]) -> None:
        """Handle a Hello: admit the node, let it wait, or reject it."""
        if fault := wrong_name(hello):
            self._reject(peer, hello, *fault, out)
            return
        run = find_run(self._mailboxes.runs, hello)
        if isinstance(run, str):
            self._reject(peer, hello, "run", run, out)
            return
        self.early.pop(peer, None)
        if run is None:
            if len(self.early) >= MAX_EARLY:
                del self.early[next(iter(self.early))]
            self.early[peer] = hello, now
            out.append(SendTo(peer, wait_for_run(self._mailboxes.runs)))
            return
        known = run.nodes.get(hello.node)
        if run.over:
            if known is not None and known.alive and known.hello.session == hello.session:
                # It has reconnected: its goodbye comes over the new connection.
                self._forget_connection(known)
                known.peer, self.peers[peer] = peer, known
                known.move(SessionEvent.HELLO)
            out.append(SendTo(peer, RunEnded(reason=run.over)))
            return
        reason = why_not(run, hello, known)
        if reason:
            self._reject(peer, hello, *reason, out, config=run.config)
            return
        if run.id not in self._mailboxes.runs:
            self._mailboxes.runs[run.id] = run
            run.identity = self._draw_identity()
            opened = Opened(
                seq=self._mailboxes.number(),
                at=now,
                run=run.id,
                config=run.config,
                total_clients=run.total_clients,
                identity=run.identity,
            )
            out.append(Append(opened))
            # A connection that is gone must not take names and clients from another one.
            out.extend(Probe(other) for other in self.early)
            self._has_opened = True
        before = self.peers.get(peer)
        if before is not None and before is not known and before.alive:
            self.leave(
                before, f"node {hello.node} has taken over its connection", now, out, clean=True
            )
        self._admit(peer, hello, run, known, now, out)

    def admit_early(self, now: float, out: list[Action]) -> None:
        """Admit the nodes whose run has been opened in this turn, and whose connections are up.

        Nodes repeat their Hello while they wait, so a node that did not within a lease is gone.
        """
        if not self._has_opened:
            return
        self._has_opened = False
        # The newest of several waiting sessions with one name is the node.
        early = {hello.node: (peer, hello, at) for peer, (hello, at) in self.early.items()}
        self.early = {}
        for peer, hello, at in early.values():
            if now < at + self._settings.lease_s:
                self.hello(peer, hello, now, out)
            if peer in self.early:
                self.early[peer] = hello, at

    def _admit(
        self,
        peer: bytes,
        hello: Hello,
        run: RunState,
        known: Node | None,
        now: float,
        out: list[Action],
    ) -> None:
        """Welcome a new or reconnected node, and deliver what it has not received."""
        returning = known is not None and known.hello.session == hello.session
        if known is not None and returning:
            self._forget_connection(known)
            node = known
            node.peer = peer
            # After a restart of the broker, its Hello is from the ledger, without a version.
            node.hello = msgspec.structs.replace(node.hello, v=hello.v)
            node.fetcher.restart()
        else:
            node = Node(hello, run, peer, 0.0)
            if known is not None:
                if known.alive:
                    reason = "a newer session has taken over"
                    out.append(SendTo(known.peer, Reject(code="replaced", reason=reason)))
                    self.leave(known, reason, now, out)
                known.move(SessionEvent.REPLACE)
                self._forget_connection(known)
                node.sessions = known.sessions
                node.received_bytes = known.received_bytes
                node.sent_bytes = known.sent_bytes + known.read_bytes
            run.nodes[hello.node] = node
        node.next_n = max(node.next_n, hello.first)
        node.last_seen = now
        node.lease_until = now + self._settings.lease_s
        self.peers[peer] = node
        checkpoint = None if hello.got else self._checkpoint_for(node)
        leads = hello.role == AGGREGATOR
        welcome = Welcome(
            run=run.id,
            beat_s=self._settings.beat_s,
            lease_s=self._settings.lease_s,
            config="" if checkpoint else run.config,
            checkpoint=checkpoint,
            identity=run.identity,
            continued=UNSET if run.continued is None or not leads else run.continued,
        )
        out.append(SendTo(peer, welcome))
        was_there = node.alive
        node.move(SessionEvent.HELLO)
        if not was_there:
            node.sessions += not returning
            self._announce("joined", node, {}, now, out)
            found: dict[int, str] = {}
            for address in addresses(hello):
                run.hosts[address] = hello.node
                found |= dict.fromkeys(run.waiting.pop(address, ()), address)
            delivery.enqueue_waiting(node, found)
            attempts = run.interrupted.get(next(iter(node.pending), -1), 0)
            node.resume_at = now + pause if (pause := delivery.retry_pause(attempts)) else 0.0
        self.due = min(self.due, _due(node))
        delivery.start_over(node, hello.got)
        out.extend(delivery.deliver(node, self._mailboxes.read, now))
        self._on_admit(node, now, out)

    def _checkpoint_for(self, node: Node) -> Deliver | None:
        seq = node.run.checkpoint
        if seq is None or node.hello.role != AGGREGATOR:
            return None
        accepted = self._mailboxes.read(seq)
        return Deliver(seq=seq, at=accepted.at, message=accepted.message)

    def _reject(
        self,
        peer: bytes,
        hello: Hello,
        code: str,
        reason: str,
        out: list[Action],
        config: str = "",
    ) -> None:
        """Reject a node; ``config``: the run's configuration, sent if the node has another one."""
        reject = Reject(code=code, reason=reason[:2000])
        if code == "config" and hello.run in self._mailboxes.runs:
            reject = msgspec.structs.replace(reject, config=config)
        out.append(SendTo(peer, reject))
        out.append(Log("warning", "rejected", {"peer_node": hello.node[:100], "reason": reason}))

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
        for address in addresses(node.hello):
            if run.hosts.get(address) == node.name:
                del run.hosts[address]
        for seq, address in node.pending.items():
            run.waiting.setdefault(address, []).append(seq)
        for address in set(node.pending.values()):
            run.waiting[address].sort()
        node.pending.clear()
        node.queue.clear()
        self._announce("left", node, details, now, out)

    def _announce(
        self, kind: str, node: Node, details: dict[str, Any], now: float, out: list[Action]
    ) -> None:
        hello = node.hello
        body = {
            "node": hello.node,
            "role": hello.role,
            "session": hello.session,
            "clients": [list(each) for each in hello.clients],
            **({"key": hello.key} if hello.key and kind == "joined" else {}),
            **details,
        }
        to = RECORD if hello.role == AGGREGATOR else AGGREGATOR
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
            if node.peer != peer or peer in self.early:
                raise AssertionError(f"connection {peer!r} is not that of {node.name}")
            if node.run.nodes.get(node.name) is not node:
                raise AssertionError(f"connection {peer!r} is of an earlier session of {node.name}")
        due = math.inf
        for run in self._mailboxes.runs.values():
            for node in run.nodes.values():
                if not node.alive:
                    continue
                due = min(due, _due(node))
                if node.peer and self.peers.get(node.peer) is not node:
                    raise AssertionError(f"{node.name} is connected, but its connection is unknown")
                if not (node.peer or node.state in WITHOUT_CONNECTION):
                    raise AssertionError(f"{node.name} is {word(node.state)} without a connection")
                if (node.state is SessionState.FINISHING) != bool(run.over):
                    ended = f"run {run.id} has {'' if run.over else 'not '}ended"
                    raise AssertionError(f"{node.name} is {word(node.state)}, but {ended}")
        if self.due > due:
            raise AssertionError(f"a lease ends at {due}, before anything is due")

    def _forget_connection(self, node: Node) -> None:
        if self.peers.get(node.peer) is node:  # another node may have taken it over
            del self.peers[node.peer]


def _due(node: Node) -> float:
    return min(node.lease_until, node.resume_at or math.inf)
