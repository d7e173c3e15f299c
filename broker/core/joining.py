"""Admit nodes by their keys: Hello, take-over, waiting; keys that are enrolled or revoked."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from msgspec import UNSET

from fedmq.broker.access.early import EarlyHellos
from fedmq.broker.access.enrolment import enrolment_fault
from fedmq.broker.access.owners import owner_of
from fedmq.broker.access.quotas import JOINS_AT_ONCE, Bucket, source_of
from fedmq.broker.access.rights import OPEN, Origin, Rights
from fedmq.broker.core import delivery
from fedmq.broker.core.admission import (
    TWO_NAMES,
    Fault,
    find_run,
    join_limit_fault,
    key_fault,
    malformed,
    new_name_fault,
    owner_fault,
    rejection,
    rights_fault,
    run_limit_fault,
    served_runs,
    too_many_wait,
    wait_for_run,
    why_not,
)
from fedmq.broker.core.events import (
    AccessChanged,
    Action,
    Append,
    Disconnect,
    Enlist,
    Log,
    Probe,
    SendTo,
)
from fedmq.broker.core.lifecycles import SessionEvent
from fedmq.broker.core.mailboxes import Mailboxes
from fedmq.broker.core.sessions import Sessions
from fedmq.broker.core.state import Node, RunState
from fedmq.broker.ledger.entries import Opened
from fedmq.broker.rejections import RejectCode
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.wire.addresses import AGGREGATOR
from fedmq.broker.wire.schema import (
    AnyFrame,
    Enroll,
    Enrolled,
    Goodbye,
    Hello,
    RunEnded,
    Welcome,
)


class Admissions:
    """Decides who joins; `fedmq.broker.core.admission` has the rules.

    Args:
        settings: leases and limits.
        mailboxes: the runs and their messages.
        sessions: the nodes that are admitted.
        draw_identity: see `Broker`.
        on_admit: called with each node that is admitted, new or reconnected.

    Attributes:
        access: who may connect.
        early: the connections that wait for their run to start.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        mailboxes: Mailboxes,
        sessions: Sessions,
        draw_identity: Callable[[], str],
        on_admit: Callable[[Node, float, list[Action]], None],
    ) -> None:
        self._settings, self._mailboxes, self._sessions = settings, mailboxes, sessions
        self._draw_identity, self._on_admit = draw_identity, on_admit
        self.access = OPEN
        self.early = EarlyHellos(settings.limits.waiting, settings.lease_s)
        self._revoked: dict[str, str] = {}
        """Names of keys that have been revoked since the start, by key."""
        self._enrolling: tuple[str, bytes] | None = None
        """A key that the driver stores now, and the connection that handed it in."""
        self._has_opened = False
        """Whether a run has been opened, for which nodes in `early` may wait."""

    # ---- keys

    def has_rights(
        self, peer: bytes, frame: AnyFrame, origin: Origin, now: float, out: list[Action]
    ) -> bool:
        """Return whether a key has rights; else answer the frame: an invite may enroll a key."""
        fault = self.key_fault(origin)
        if fault is None:
            return True
        if origin.key in self.access.invites and isinstance(frame, Enroll):
            self._enroll(peer, frame.key, origin.key, now, out)
        elif not isinstance(frame, Goodbye):
            out.append(SendTo(peer, rejection(fault)))
            if origin.key not in self.access.invites:
                out.append(Disconnect(peer))
            out.append(Log("warning", "rejected", {"reason": fault[1]}))
        return False

    def key_fault(self, origin: Origin) -> Fault | None:
        """Return (code, reason) if a key has no rights."""
        if self.access.rights_of(origin.key) is not None:
            return None
        return key_fault(self.access, origin.key, self._revoked.get(origin.key, ""))

    def _enroll(self, peer: bytes, key: str, invite: str, now: float, out: list[Action]) -> None:
        fault = enrolment_fault(self.access, self.access.invites[invite], key, now)
        if fault is not None:
            out.append(SendTo(peer, rejection(fault)))
            out.append(Log("warning", "rejected", {"reason": fault[1]}))
        elif key in self.access.keys:
            out.append(SendTo(peer, Enrolled(key=key)))
        else:
            self._enrolling = key, peer
            out.append(Enlist(key, invite))

    def access_changed(self, event: AccessChanged, now: float, out: list[Action]) -> None:
        """Apply other keys and rights: end the sessions that they do not allow any more."""
        access = event.access
        for key, rights in self.access.keys.items():
            if key not in access.keys:
                self._revoked[key] = rights.name
        self._revoked = {k: name for k, name in self._revoked.items() if k not in access.keys}
        self.access = access
        if self._enrolling is not None:
            key, peer = self._enrolling
            self._enrolling = None
            if key in access.keys:
                name = access.keys[key].name
                out.append(SendTo(peer, Enrolled(key=key)))
                out.append(Log("info", "enrolled", {"key": name}))
            else:
                reason = event.reason or "the key was not stored"
                out.append(SendTo(peer, rejection((RejectCode.INVITE, reason))))
                out.append(Log("warning", "rejected", {"reason": reason}))
        for peer, origin in [*self.early]:
            if fault := self.key_fault(origin):
                self.early.discard(peer)
                out += SendTo(peer, rejection(fault)), Disconnect(peer)
        for node in [*self._sessions.alive()]:
            rights_now = access.rights_of(node.origin.key)
            fault = self.key_fault(node.origin)
            if rights_now is not None:
                asked = msgspec.structs.replace(node.hello, run=node.run.id)
                fault = rights_fault(rights_now, asked)
                node.reads_files = rights_now.may_read_files(node.origin)
            if fault is not None:
                self._revoke(node, fault, now, out)

    def _revoke(self, node: Node, fault: Fault, now: float, out: list[Action]) -> None:
        peer = node.peer
        self._sessions.leave(node, fault[1], now, out, clean=True)
        # Not acknowledged: if its key gets rights again, its link sends them again.
        node.drop_frames()
        self._sessions.forget_connection(node)
        node.peer = b""
        if peer:
            out += SendTo(peer, rejection(fault)), Disconnect(peer)

    # ---- admission

    def hello(
        self, peer: bytes, hello: Hello, origin: Origin, now: float, out: list[Action]
    ) -> None:
        """Handle the Hello of a key that has rights: admit the node, let it wait, or reject it."""
        runs, limits = self._mailboxes.runs, self._settings.limits
        rights = self.access.rights_of(origin.key)
        if rights is None:
            raise AssertionError("has_rights is asked first")
        if fault := malformed(hello, self._settings) or rights_fault(rights, hello):
            self._reject(peer, hello, fault, out)
            return
        if hello.role != AGGREGATOR and hello.config:
            hello = msgspec.structs.replace(hello, config="")  # not read, and would be kept
        owner = owner_of(origin.key, hello.key, hello.session)
        run = find_run(runs, hello, rights, owner, served_runs(runs, self._settings))
        if isinstance(run, tuple):
            self._reject(peer, hello, run, out)
            return
        if run is None:
            self._wait(peer, hello, origin, rights, now, out)
            return
        self.early.discard(peer)
        known = run.nodes.get(hello.node)
        if run.over:
            self._after_the_end(peer, hello, origin, owner, known)
            out.append(SendTo(peer, RunEnded(reason=run.over)))
            return
        joins = Bucket(JOINS_AT_ONCE) if known is None else known.joins
        fault = (
            owner_fault(run, hello, rights, owner, known, release=self._settings.release_names)
            or why_not(run, hello, owner, known)
            or run_limit_fault(runs, run, limits, self._sessions.quotas, origin, now)
            or (known is None and new_name_fault(run, hello, self.access, origin, limits))
            or self._quota_fault(hello, origin, known, joins, now)
        )
        if fault:
            self._reject(peer, hello, fault, out, config=run.config)
            return
        if run.id not in runs:
            self._open(run, now, out)
        before = self._sessions.peers.get(peer)
        if before is not None and before is not known and before.alive:
            text = f"node {hello.node} has taken over its connection"
            self._sessions.leave(before, text, now, out, clean=True)
        self._admit(peer, hello, origin, owner, run, known, now, out)
        run.nodes[hello.node].joins = joins

    def _wait(
        self,
        peer: bytes,
        hello: Hello,
        origin: Origin,
        rights: Rights,
        now: float,
        out: list[Action],
    ) -> None:
        """Let a node wait for its run."""
        runs = self._mailboxes.runs
        if not self.early.add(peer, hello, origin, now):
            wait = too_many_wait(self._settings.limits)
            out.append(SendTo(peer, wait))
            if self.early.may_report(now):
                out.append(Log("warning", "cannot let more nodes wait", {"reason": wait.reason}))
            return
        before = self._sessions.peers.get(peer)
        if before is not None:
            if before.alive:
                text = "its connection is now another node's"
                self._sessions.leave(before, text, now, out, clean=True)
            self._sessions.forget_connection(before)
            before.peer = b""
        out.append(SendTo(peer, wait_for_run(runs, rights, served_runs(runs, self._settings))))

    def _after_the_end(
        self, peer: bytes, hello: Hello, origin: Origin, owner: str, known: Node | None
    ) -> None:
        """Note that a node of a run that has ended has reconnected: its goodbye follows."""
        if (
            known is not None
            and known.alive
            and (known.hello.session, known.owner) == (hello.session, owner)
        ):
            self._sessions.forget_connection(known)
            self._sessions.quotas.end(known.origin)
            self._sessions.quotas.begin(origin)
            known.peer, known.origin, self._sessions.peers[peer] = peer, origin, known
            known.move(SessionEvent.HELLO)

    def _quota_fault(
        self, hello: Hello, origin: Origin, known: Node | None, joins: Bucket, now: float
    ) -> Fault | None:
        """Return (code, reason) if its source has too many sessions, or it joins too often."""
        quotas = self._sessions.quotas
        replaces = known is not None and known.alive
        if known is not None and replaces and known.hello.session == hello.session:
            return None  # it has reconnected
        same_source = known is not None and source_of(known.origin) == source_of(origin)
        room = (replaces and same_source) or quotas.has_room(origin)
        if room and quotas.may_join(origin, joins, now):
            return None
        wait_s = quotas.join_wait_s(origin, joins) if room else None
        return join_limit_fault(origin, self._settings.limits, wait_s)

    def _open(self, run: RunState, now: float, out: list[Action]) -> None:
        """Open a run."""
        self._mailboxes.runs[run.id] = run
        run.identity = self._draw_identity()
        opened = Opened(
            seq=self._mailboxes.number(),
            at=now,
            run=run.id,
            config=run.config,
            total_clients=run.total_clients,
            identity=run.identity,
            owner=run.owner,
        )
        out.append(Append(opened))
        # A connection that is gone must not take names and clients from another one.
        out.extend(Probe(other) for other, _ in self.early)
        self._has_opened = True

    def admit_early(self, now: float, out: list[Action]) -> None:
        """Admit the nodes whose run has been opened in this turn, and whose connections are up."""
        if not self._has_opened:
            return
        self._has_opened = False
        for peer, early in self.early.take(now):
            self.hello(peer, early.hello, early.origin, now, out)
            self.early.put_back(peer, early)

    def _admit(
        self,
        peer: bytes,
        hello: Hello,
        origin: Origin,
        owner: str,
        run: RunState,
        known: Node | None,
        now: float,
        out: list[Action],
    ) -> None:
        """Welcome a new or reconnected node, and deliver what it has not received."""
        same_session = known is not None and known.hello.session == hello.session
        if known is not None and same_session and known.owner == owner:
            returning = True
            self._sessions.forget_connection(known)
            node = known
            if node.alive:
                self._sessions.quotas.end(node.origin)
            node.peer, node.origin = peer, origin
            node.hello = hello
            node.fetcher.restart()
        else:
            returning = False
            node = Node(hello, run, peer, 0.0, origin=origin, owner=owner)
            if known is not None:
                if known.alive:
                    reason = "a newer session has taken over"
                    fault = RejectCode.REPLACED, f"{reason}. {TWO_NAMES}"
                    out.append(SendTo(known.peer, rejection(fault)))
                    self._sessions.leave(known, reason, now, out)
                known.move(SessionEvent.REPLACE)
                self._sessions.forget_connection(known)
                node.sessions = known.sessions
                node.received_bytes = known.received_bytes
                node.sent_bytes = known.sent_bytes + known.read_bytes
            run.nodes[hello.node] = node
        self._sessions.quotas.begin(origin)
        rights = self.access.rights_of(origin.key)
        node.reads_files = rights is not None and rights.may_read_files(origin)
        node.next_n = max(node.next_n, hello.first)
        node.last_seen = now
        node.lease_until = now + self._settings.lease_s
        self._sessions.peers[peer] = node
        if leads := hello.role == AGGREGATOR:
            run.owner = owner
        checkpoint = None if hello.got or not leads else self._mailboxes.checkpoint(run)
        welcome = Welcome(
            run=run.id,
            beat_s=self._settings.beat_s,
            lease_s=self._settings.lease_s,
            config="" if checkpoint else run.config,
            checkpoint=checkpoint,
            identity=run.identity,
            continued=UNSET if run.continued is None or not leads else run.continued,
        )
        out.append(SendTo(peer, welcome, files=node.reads_files))
        was_there = node.alive
        node.move(SessionEvent.HELLO)
        if not was_there:
            node.sessions += not returning
            self._sessions.announce("joined", node, {}, now, out)
            run.hosts.add(hello)
            delivery.enqueue_waiting(node)
            attempts = run.interrupted.get(next(iter(node.pending), -1), 0)
            node.resume_at = now + pause if (pause := delivery.retry_pause(attempts)) else 0.0
        if node.restarts.take(now, 1.0 / self._settings.beat_s):
            delivery.start_over(node, hello.got, self._mailboxes.read)
        else:  # it repeats its Hello: each time, all that it has not handled would be read
            delivery.start_over(node, hello.got, None)
            if node.resume_at <= now:
                node.resume_at = now + self._settings.beat_s
        self._sessions.note_due(node)
        out.extend(delivery.deliver(node, self._mailboxes.read, now))
        self._on_admit(node, now, out)

    def validate_state(self) -> None:
        """Raise AssertionError if a connection waits that has a session."""
        for peer, _ in self.early:
            if peer in self._sessions.peers:
                raise AssertionError(f"connection {peer!r} waits, but it has a session")

    def _reject(
        self, peer: bytes, hello: Hello, fault: Fault, out: list[Action], config: str = ""
    ) -> None:
        """Reject a node; ``config``: the run's configuration, sent if its aggregator differs."""
        reject = rejection(fault)
        if config and fault[0] == RejectCode.CONFIG and hello.run in self._mailboxes.runs:
            reject = msgspec.structs.replace(reject, config=config)
        out.append(SendTo(peer, reject))
        fields = {"peer_node": hello.node[:100], "reason": fault[1]}
        out.append(Log("warning", "rejected", fields))
