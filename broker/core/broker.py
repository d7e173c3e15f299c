"""The Broker core: sessions, routing and the ledger's content; no sockets, no clock.

``handle(event, now) -> [action]``. The driver carries actions out in order, with one rule that
the guarantees depend on: **before a SendTo goes out, every Append and Put that precedes it is in
the ledger.** So the driver may handle a batch of events, write once, and send afterwards.
`fedmq.broker.recovery` makes a core from a ledger.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

from fedmq.broker.access.rights import ENDS_RUN
from fedmq.broker.core import delivery
from fedmq.broker.core.acceptance import Acceptance
from fedmq.broker.core.admission import served_runs
from fedmq.broker.core.events import (
    AccessChanged,
    Action,
    Append,
    DiskFull,
    Event,
    Gone,
    Log,
    ReceivedFrom,
    SendTo,
    Store,
    TimerFired,
    Unreadable,
)
from fedmq.broker.core.joining import Admissions
from fedmq.broker.core.lifecycles import SessionEvent, SessionState
from fedmq.broker.core.mailboxes import Mailboxes
from fedmq.broker.core.sessions import Sessions
from fedmq.broker.core.state import Node, PendingFrame, PendingPost, RejectedPost
from fedmq.broker.core.uploads import Uploads
from fedmq.broker.errors import VersionError
from fedmq.broker.ledger.entries import BlobName, Ended
from fedmq.broker.rejections import Code, RejectCode
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.wire import schema
from fedmq.broker.wire.addresses import AGGREGATOR, BROKER
from fedmq.broker.wire.chunked_transfer import Owned
from fedmq.broker.wire.schema import (
    Buffer,
    Chunk,
    ChunkRequest,
    Done,
    Enroll,
    Goodbye,
    Heartbeat,
    Hello,
    NumberedFrame,
    Post,
    PostAll,
    Reject,
    RunEnded,
    UnknownSession,
    kind_of,
)


class Broker:
    """Routes messages, keeps leases and timers, and decides what the ledger records.

    Args:
        settings: leases, heartbeats, the delivery limit.
        store: reads the ledger.
        draw_identity: returns a new unique identity; called once for each new run.
        mailboxes: the runs and messages recovered from a ledger; by default none.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        store: Store,
        draw_identity: Callable[[], str],
        mailboxes: Mailboxes | None = None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._mailboxes = mailboxes or Mailboxes()
        self._mailboxes.store = store
        self._uploads = Uploads(store, settings.limits)
        self._sessions = Sessions(settings, self._mailboxes)
        self._admissions = Admissions(
            settings, self._mailboxes, self._sessions, draw_identity, self._uploads.ask
        )
        self._acceptance = Acceptance(self._mailboxes)
        self._acks = delivery.PendingAcks()
        self._full = ""
        self._next_wake = math.inf

    @property
    def deadline(self) -> float | None:
        """Time at which the core needs a TimerFired even if nothing arrives; None for never."""
        if self._full:
            return None
        timer = self._mailboxes.timers[0][0] if self._mailboxes.timers else math.inf
        due = min(self._sessions.due, self._acks.due, timer)
        return due if due < math.inf else None

    @property
    def next_seq(self) -> int:
        """Number of the next ledger entry."""
        return self._mailboxes.next_seq

    @property
    def idle(self) -> bool:
        """Return whether the runs that it serves have ended, at least one, without nodes left."""
        runs = self._mailboxes.runs
        served = [runs[name] for name in served_runs(runs, self._settings) or runs if name in runs]
        if not all(run.over for run in served):
            return False
        return bool(served) and not any(node.alive for run in served for node in run.nodes.values())

    def sent(self, peer: bytes, nbytes: int) -> None:
        """Count bytes that the driver has sent to a connection."""
        node = self._sessions.peers.get(peer)
        if node is not None:
            node.sent_bytes += nbytes

    def handle(self, event: Event, now: float) -> list[Action]:
        """Handle one event; return the actions to carry out, in order."""
        self._mailboxes.fresh.clear()
        out: list[Action] = []
        match event:
            case ReceivedFrom():
                self._received(event, now, out)
            case Unreadable(peer, error, origin):
                fault = self._admissions.key_fault(origin)
                is_version = isinstance(error, VersionError)
                code = RejectCode.VERSION if is_version else RejectCode.UNREADABLE
                code, reason = fault or (code, str(error))
                out.append(SendTo(peer, Reject(code=code, reason=reason[:2000])))
                out.append(Log("warning", "unreadable frame", {"reason": str(error)}))
            case AccessChanged():
                self._admissions.access_changed(event, now, out)
            case Gone(peer):
                self._admissions.early.discard(peer)
                node = self._sessions.peers.get(peer)
                if node is not None and node.alive:
                    silent = f"silent for {now - node.last_seen:.1f} s, its connection is gone"
                    self._sessions.leave(node, silent, now, out)
            case DiskFull(reason):
                self._disk_full(reason, now, out)
            case TimerFired():
                self._wake(now, out)
        return out

    def validate_state(self) -> None:
        """Raise AssertionError, with what is wrong, if parts of the state contradict each other.

        For tests and simulations, after each event.
        """
        self._sessions.validate_state()
        self._admissions.validate_state()
        self._mailboxes.validate_state()
        self._acks.validate_state()
        if self._mailboxes.timers and not self._full and self.deadline is None:
            raise AssertionError("there are timers, but nothing is due")

    def give_up(self, run: str, seqs: Sequence[int], reason: str, now: float) -> list[Action]:
        """Dead-letter messages that cannot be delivered, and notify their senders."""
        out: list[Action] = []
        for seq in seqs:
            where = self._mailboxes.runs[run]
            self._mailboxes.refuse(
                where, seq, BROKER, reason, now, out, code=Code.LOST, dead_lettered=True
            )
        self._mailboxes.fresh.clear()
        return out

    # ---- frames

    def _received(self, event: ReceivedFrom, now: float, out: list[Action]) -> None:
        frame, peer, origin = event.frame, event.peer, event.origin
        node = self._sessions.session_of(peer, origin, out)
        is_alive = node is not None and node.alive
        if not is_alive or isinstance(frame, Hello):
            # A live session's key has rights: it ends when they do.
            if not self._admissions.has_rights(peer, frame, origin, now, out):
                return
            if self._full and isinstance(frame, Hello | NumberedFrame):
                out.append(SendTo(peer, schema.StorageFull(reason=self._full)))
            elif isinstance(frame, Hello):
                self._admissions.hello(peer, frame, origin, now, out)
                return
        elif self._full and isinstance(frame, NumberedFrame):
            out.append(SendTo(peer, schema.StorageFull(reason=self._full)))
        if node is None or not is_alive:
            if isinstance(frame, Goodbye):
                self._admissions.early.discard(peer)
            elif isinstance(frame, Enroll):
                out.append(SendTo(peer, _unexpected("only the holder of an invite enrolls a key")))
            elif peer not in self._admissions.early and not isinstance(frame, Hello):
                out.append(SendTo(peer, UnknownSession()))
            return
        if node.run.over and not isinstance(frame, Goodbye):
            # It must say goodbye within the lease that it had when its run ended.
            if not self._full:  # else the end may not be in the ledger yet
                out.append(SendTo(peer, RunEnded(reason=node.run.over)))
            return
        node.last_seen = now
        node.lease_until = now + self._settings.lease_s
        if node.state is SessionState.SILENT:
            node.move(SessionEvent.FRAME)
        node.received_bytes += event.nbytes
        match frame:
            case NumberedFrame() if not self._full:
                self._take_credit(node, frame.taken, now, out)
                self._numbered(node, frame, event.buffers, now, out)
            case ChunkRequest():
                self._serve_chunk(node, frame, out)
            case Heartbeat(taken=taken, ack=ack):
                self._take_credit(node, taken, now, out)
                if ack is True and not self._full:  # else they may not be in the ledger yet
                    out.extend(self._acks.take_of(node))
                out.append(SendTo(peer, Heartbeat(sent=node.sent)))
            case _ if self._full:
                pass  # a frame that cannot be recorded is ignored; its sender sends it again
            case Chunk():
                if self._uploads.take(node, frame, event.buffers, out):
                    self._settle(node, now, out)
                self._uploads.completed = None
            case Goodbye(reason=reason, failed=failed):
                self._sessions.leave(node, reason or "said goodbye", now, out, clean=not failed)
            case _:
                reason = f"a node does not send {kind_of(frame)} frames"
                out.append(SendTo(peer, _unexpected(reason)))

    def _take_credit(self, node: Node, taken: int, now: float, out: list[Action]) -> None:
        if node.in_flight:
            delivery.note_taken(node, taken)
        if node.queue and not self._full:
            out.extend(delivery.deliver(node, self._mailboxes.read, now))

    def _numbered(
        self,
        node: Node,
        frame: NumberedFrame,
        buffers: Sequence[Buffer],
        now: float,
        out: list[Action],
    ) -> None:
        if frame.n < node.next_n:
            # A duplicate, sent again after a reconnect.
            self._acks.add(node, now)
        elif node.pending_frames and self._uploads.holds_too_much(node):
            node.has_dropped = True  # `_settle` asks for them again
        elif frame.n > node.next_n:
            # Frames were dropped: UnknownSession makes the link resend from its oldest one.
            out.append(SendTo(node.peer, UnknownSession(dropped=True)))
        else:
            node.next_n += 1
            node.read_bytes = min(frame.read, node.pointed_bytes)
            match frame:
                case Post():
                    self._begin(node, frame, buffers, now, out)
                case PostAll():
                    for post in frame.each():
                        self._begin(node, post, buffers, now, out)
                case Done() | RunEnded() if node.pending_frames:
                    self._uploads.hold(node, frame)
                case Done() | RunEnded():
                    self._apply(node, frame, now, out)
            if buffers:
                self._acks.add(node, now, sum(memoryview(each).nbytes for each in buffers))
            if node.pending_frames or node.fetcher.missing_bytes:
                self._settle(node, now, out)

    def _begin(
        self, node: Node, frame: Post, buffers: Sequence[Buffer], now: float, out: list[Action]
    ) -> None:
        """Parse a post, store the blobs that came with it, and apply it, or let it wait."""
        post = self._acceptance.parse(node, frame, buffers)
        if isinstance(post, PendingPost):
            self._uploads.note_message(node, post.message, now)
            if post.answers:
                post = self._acceptance.unasked(node, post) or post
        if isinstance(post, PendingPost):
            post = self._uploads.begin_post(node, post, buffers, out)
        if node.pending_frames or (isinstance(post, PendingPost) and post.apart):
            self._uploads.hold(node, post)
        elif isinstance(post, PendingPost):
            self._acceptance.accept(node, post, now, out)
            self._acks.add(node, now)
        else:
            self._apply(node, post, now, out)

    def _settle(self, node: Node, now: float, out: list[Action]) -> None:
        """Apply, in order, the pending frames whose blobs have arrived; request missing blobs."""
        while node.pending_frames:
            frame: PendingFrame | None = node.pending_frames[0]
            if isinstance(frame, PendingPost) and frame.apart:
                frame = self._uploads.resolve(node, frame)
            if frame is None:
                break
            node.pop_frame()
            self._apply(node, frame, now, out)
        if not node.run.over:
            self._uploads.ask(node, now, out)
        if node.has_dropped and not self._uploads.holds_too_much(node, part=2):
            node.has_dropped = False
            out.append(SendTo(node.peer, UnknownSession(dropped=True)))

    def _apply(self, node: Node, frame: PendingFrame, now: float, out: list[Action]) -> None:
        """Apply a frame whose blobs are stored, after all frames before it."""
        match frame:
            case PendingPost():
                self._acceptance.apply(node, frame.complete(), now, out)
            case RejectedPost():
                self._acceptance.apply(node, frame, now, out)
            case Done():
                self._done(node, frame, now, out)
            case RunEnded(reason=reason):
                self._end_run(node, reason, now, out)
                return
        self._acks.add(node, now)

    def _done(self, node: Node, done: Done, now: float, out: list[Action]) -> None:
        for seq, reason in done.refused.items():
            if seq in node.pending:
                code = done.code_of(seq)
                self._mailboxes.refuse(node.run, seq, node.name, reason, now, out, code=code)
        self._mailboxes.consume(node, done.seqs, now, out)

    def _serve_chunk(self, node: Node, request: ChunkRequest, out: list[Action]) -> None:
        name = BlobName(node.run.id, request.owner, request.digest)
        reply = Chunk(owner=request.owner, digest=request.digest, start=request.start)
        may = node.may_read(Owned(request.owner, request.digest))
        here = may and (self._store.size_of(name) or 0) >= request.start + request.size
        out.append(SendTo(node.peer, reply, ((name, request.start, request.size),) if here else ()))

    def _end_run(self, node: Node, reason: str, now: float, out: list[Action]) -> None:
        if node.hello.role not in ENDS_RUN:
            out.append(SendTo(node.peer, _unexpected("only the aggregator may end a run")))
            return
        run = node.run
        run.over = reason or "over"
        seq, counts = self._mailboxes.number(), run.node_counts()
        entry = Ended(seq=seq, at=now, run=run.id, reason=run.over, nodes=counts)
        out.append(Append(entry))
        self._acks.add(node, now)
        out.extend(self._acks.take())
        # A node stays until it says goodbye; any other frame is answered with RunEnded.
        connected = [each for each in run.nodes.values() if each.alive and each.peer]
        out.extend(SendTo(each.peer, RunEnded(reason=run.over)) for each in connected)
        run.refused.clear()
        run.interrupted.clear()
        for member in run.nodes.values():
            if member.alive:
                member.move(SessionEvent.RUN_END)
            member.lease_until = now + self._settings.lease_s
            for messages in (member.pending, member.requests, member.queue):
                messages.clear()
            member.pending_frames.clear()
            member.held_bytes, member.has_dropped = 0, False
        run.waiting.clear()
        self._mailboxes.timers = [timer for timer in self._mailboxes.timers if timer[2] != run.id]
        heapq.heapify(self._mailboxes.timers)

    # ---- time

    def _wake(self, now: float, out: list[Action]) -> None:
        if self._full:
            return
        late_s = now - self._next_wake
        if late_s > self._settings.beat_s:
            # The broker was suspended, not the nodes: each gets a new lease.
            for node in self._sessions.alive():
                node.last_seen += late_s
                node.lease_until = now + self._settings.lease_s
        self._admissions.admit_early(now, out)
        self._sessions.look_after(now, out)
        while self._mailboxes.timers and self._mailboxes.timers[0][0] <= now:
            _, seq, name, token = heapq.heappop(self._mailboxes.timers)
            run = self._mailboxes.runs[name]
            self._mailboxes.publish(
                run, "tick", AGGREGATOR, {"token": token}, now, out, consumes=(seq,)
            )
        if now >= self._acks.due:
            out.extend(self._acks.take())
        self._next_wake = self.deadline or math.inf

    def _disk_full(self, reason: str, now: float, out: list[Action]) -> None:
        if reason and not self._full:
            out.append(Log("error", "cannot write the ledger", {"reason": reason}))
        if self._full and not reason:
            out.append(Log("info", "the ledger is writable again", {}))
            for node in self._sessions.alive():
                node.lease_until = now + self._settings.lease_s
            self._next_wake = math.inf
        self._full = reason


def _unexpected(reason: str) -> Reject:
    return Reject(code=RejectCode.UNEXPECTED, reason=reason)
