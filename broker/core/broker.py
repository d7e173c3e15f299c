"""The Broker core: who is there, what goes where, what is kept; no sockets, no clock.

``handle(event, now) -> [action]``. The driver carries actions out in order, with one
rule that the guarantees stand on: **no Send goes out before every Append and Put that
precedes it is in the ledger.** So it may run a whole batch of events, write once, and
send then. `fedmq.broker.core.recovery` makes a core from a ledger.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

from fedmq.broker.core import delivery
from fedmq.broker.core.acceptance import Acceptance
from fedmq.broker.core.acknowledgments import PendingAcks
from fedmq.broker.core.mailboxes import Mailboxes
from fedmq.broker.core.sessions import Sessions
from fedmq.broker.core.state import (
    Action,
    Append,
    DiskFull,
    Event,
    Gone,
    Log,
    Node,
    PendingPost,
    ReceivedFrom,
    SendTo,
    Store,
    TimerFired,
    Unreadable,
)
from fedmq.broker.core.uploads import Uploads
from fedmq.broker.errors import VersionError
from fedmq.broker.ledger.entries import (
    BlobName,
    Ended,
)
from fedmq.broker.rejections import Code
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.wire import schema
from fedmq.broker.wire.addresses import AGGREGATOR, BROKER
from fedmq.broker.wire.schema import (
    Buffer,
    Chunk,
    ChunkRequest,
    Done,
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

ENDED_NODES = 400
"""Nodes of a run that its end tells of one by one."""
HELD_FRAMES = 8192
"""Frames of a node that may wait behind a post whose blobs are on their way."""


class Broker:
    """Routes messages, keeps leases and timers, and says what the ledger must hold.

    Args:
        settings: leases, beats, the delivery limit.
        store: what the ledger holds.
        draw_identity: returns an identity that no run has had; asked once for each new run.
        box: the runs and messages that a ledger held; by default none.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        store: Store,
        draw_identity: Callable[[], str],
        box: Mailboxes | None = None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._mailboxes = box or Mailboxes()
        self._mailboxes.store = store
        self._uploads = Uploads(store)
        self._sessions = Sessions(settings, self._mailboxes, draw_identity, self._uploads.ask)
        self._acceptance = Acceptance(self._mailboxes)
        self._acks = PendingAcks()
        self._full = ""
        self._promised = math.inf

    @property
    def next_seq(self) -> int:
        """Return the number of the next ledger entry."""
        return self._mailboxes.next_seq

    @property
    def deadline(self) -> float | None:
        """When the core next wants a Wake, whatever arrives; None for never."""
        if self._full:
            return None
        timer = self._mailboxes.timers[0][0] if self._mailboxes.timers else math.inf
        due = min(self._sessions.due, self._acks.due, timer)
        return due if due < math.inf else None

    @property
    def idle(self) -> bool:
        """Tell whether every run that this broker has seen is over, and every node knows."""
        for run in self._mailboxes.runs.values():
            if not run.over:
                return False
        return bool(self._mailboxes.runs) and not any(self._sessions.alive())

    def sent(self, peer: bytes, nbytes: int) -> None:
        """Count bytes that the driver has put on the wire."""
        node = self._sessions.peers.get(peer)
        if node is not None:
            node.sent_bytes += nbytes

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; return what is to be done, in order."""
        self._mailboxes.fresh.clear()
        self._uploads.begin()
        out: list[Action] = []
        match event:
            case ReceivedFrom():
                self._received(event, now, out)
            case Unreadable(peer, error):
                code = "version" if isinstance(error, VersionError) else "unreadable"
                out.append(SendTo(peer, Reject(code=code, reason=str(error)[:2000])))
                out.append(Log("warning", "unreadable frame", {"reason": str(error)}))
            case Gone(peer):
                node = self._sessions.peers.get(peer)
                if node is not None and node.alive:
                    silent = f"silent for {now - node.last_seen:.1f} s, its connection is gone"
                    self._sessions.leave(node, silent, now, out)
            case DiskFull(reason):
                self._filled(reason, now, out)
            case TimerFired():
                self._wake(now, out)
        return out

    def give_up(self, run: str, seqs: Sequence[int], reason: str, now: float) -> list[Action]:
        """Park messages that cannot be delivered, and tell their senders."""
        out: list[Action] = []
        for seq in seqs:
            where = self._mailboxes.runs[run]
            self._mailboxes.refuse(
                where, seq, BROKER, reason, now, out, code=Code.LOST, parked=True
            )
        self._mailboxes.fresh.clear()
        return out

    # ---- frames

    def _received(self, event: ReceivedFrom, now: float, out: list[Action]) -> None:
        frame, peer = event.frame, event.peer
        node = self._sessions.peers.get(peer)
        if self._full and isinstance(frame, Hello | NumberedFrame):
            out.append(SendTo(peer, schema.StorageFull(reason=self._full)))
        elif isinstance(frame, Hello):
            self._sessions.hello(peer, frame, now, out)
            return
        if node is None or not node.alive:
            if isinstance(frame, Goodbye):
                self._sessions.early.pop(peer, None)
            elif peer not in self._sessions.early and not isinstance(frame, Hello):
                out.append(SendTo(peer, UnknownSession()))
            return
        if node.run.over and not isinstance(frame, Goodbye):
            # It says goodbye within the lease that it had when its run ended.
            out.append(SendTo(peer, RunEnded(reason=node.run.over)))
            return
        node.last_seen = now
        node.lease_until = now + self._settings.lease_s
        node.received_bytes += event.nbytes
        match frame:
            case NumberedFrame() if not self._full:
                self._taken(node, frame.taken, now, out)
                self._numbered(node, frame, event.buffers, now, out)
            case ChunkRequest():
                self._serve_chunk(node, frame, out)
            case Heartbeat(taken=taken):
                self._taken(node, taken, now, out)
                out.append(SendTo(peer, Heartbeat(sent=node.sent)))
            case _ if self._full:
                pass  # what cannot be kept is not taken; its sender says it again
            case Chunk():
                if self._uploads.take(node, frame, event.buffers, out):
                    self._settle(node, now, out)
            case Goodbye(reason=reason, failed=failed):
                self._sessions.leave(node, reason or "said goodbye", now, out, clean=not failed)
            case _:
                reason = f"a node does not send {kind_of(frame)} frames"
                out.append(SendTo(peer, Reject(code="unexpected", reason=reason)))

    def _taken(self, node: Node, taken: int, now: float, out: list[Action]) -> None:
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
            # Sent again after a reconnect, and here already.
            self._acks.add(node, now)
        elif frame.n > node.next_n:
            # Some were lost on the way: Stranger makes the link start over from its oldest.
            out.append(SendTo(node.peer, UnknownSession()))
        elif len(node.pending_posts) < HELD_FRAMES:
            node.next_n += 1
            node.read_bytes = min(frame.read, node.pointed_bytes)
            for each in frame.each() if isinstance(frame, PostAll) else [frame]:
                if isinstance(each, Post):
                    held = self._acceptance.check(node, each, buffers)
                    self._begin(node, each, buffers, held, now, out)
                else:
                    held = PendingPost(each)
                node.pending_posts.append(held)
            self._settle(node, now, out)

    def _begin(
        self,
        node: Node,
        post: Post,
        buffers: Sequence[Buffer],
        held: PendingPost,
        now: float,
        out: list[Action],
    ) -> None:
        """Keep the blobs beside a post, and find out which others are missing."""
        message, mark = held.message, held.fingerprint
        if message is None or mark is None:
            return
        self._uploads.note_message(node, message, now)
        if self._mailboxes.dedup_window.seen(mark) != "new":
            return  # its blobs are not needed
        beside = {
            message.blobs[index]: data for index, data in zip(post.inline, buffers, strict=True)
        }
        self._uploads.begin_post(node, held, message, beside, out)

    def _settle(self, node: Node, now: float, out: list[Action]) -> None:
        """Take, in order, the held frames whose blobs are here; ask for what is missing."""
        while node.pending_posts and not self._uploads.lacks(node, node.pending_posts[0]):
            held = node.pending_posts.popleft()
            match held.frame:
                case Post() as post:
                    self._acceptance.accept(node, post, held, now, out)
                case Done(seqs=seqs, refused=refused) as done:
                    for seq, reason in refused.items():
                        if seq in node.pending:
                            code = done.code_of(seq)
                            self._mailboxes.refuse(
                                node.run, seq, node.name, reason, now, out, code=code
                            )
                    self._mailboxes.consume(node, seqs, now, out)
                case RunEnded(reason=reason):
                    self._over(node, reason, now, out)
                    return
            self._acks.add(node, now)
        self._uploads.ask(node, now, out)

    def _serve_chunk(self, node: Node, want: ChunkRequest, out: list[Action]) -> None:
        name = BlobName(node.run.id, want.owner, want.digest)
        reply = Chunk(owner=want.owner, digest=want.digest, start=want.start)
        held = (self._store.size_of(name) or 0) >= want.start + want.size
        out.append(SendTo(node.peer, reply, ((name, want.start, want.size),) if held else ()))

    def _over(self, node: Node, reason: str, now: float, out: list[Action]) -> None:
        if node.hello.role != AGGREGATOR:
            text = "only the aggregator ends a run"
            out.append(SendTo(node.peer, Reject(code="unexpected", reason=text)))
            return
        run = node.run
        run.over = reason or "over"
        counts = {
            name: {
                "sessions": each.sessions,
                "sent_bytes": each.sent_bytes + each.read_bytes,
                "received_bytes": each.received_bytes,
            }
            for name, each in run.nodes.items()
        }
        # An entry has a largest size: of very many nodes, the last are counted together.
        names = list(counts)
        for name in names[ENDED_NODES:]:
            each = counts.pop(name)
            others = counts.setdefault("", dict.fromkeys(each, 0))
            counts[""] = {key: others[key] + each[key] for key in each}
        if any(run.carried):
            before = counts.setdefault("", {"sessions": 0, "sent_bytes": 0, "received_bytes": 0})
            before["sent_bytes"] += run.carried[0]
            before["received_bytes"] += run.carried[1]
        entry = Ended(
            seq=self._mailboxes.number(), at=now, run=run.id, reason=run.over, nodes=counts
        )
        out.append(Append(entry))
        self._acks.add(node, now)
        out.extend(self._acks.take())
        # A node stays until it says goodbye; whatever else it says is answered by Over.
        out.extend(
            SendTo(each.peer, RunEnded(reason=run.over))
            for each in run.nodes.values()
            if each.alive
        )
        for member in run.nodes.values():
            member.lease_until = now + self._settings.lease_s
            member.pending.clear()
            member.queue.clear()
            member.pending_posts.clear()
        run.waiting.clear()
        self._mailboxes.timers = [timer for timer in self._mailboxes.timers if timer[2] != run.id]
        heapq.heapify(self._mailboxes.timers)

    # ---- time

    def _wake(self, now: float, out: list[Action]) -> None:
        if self._full:
            return
        late = now - self._promised
        if late > self._settings.beat_s:
            # It is the broker that was stopped, not the nodes: they get a lease to be heard.
            for node in self._sessions.alive():
                node.last_seen += late
                node.lease_until = now + self._settings.lease_s
        self._sessions.look_after(now, out)
        while self._mailboxes.timers and self._mailboxes.timers[0][0] <= now:
            _, seq, name, token = heapq.heappop(self._mailboxes.timers)
            run = self._mailboxes.runs[name]
            self._mailboxes.publish(
                run, "tick", AGGREGATOR, {"token": token}, now, out, consumes=(seq,)
            )
        if now >= self._acks.due:
            out.extend(self._acks.take())
        self._promised = self.deadline or math.inf

    def _filled(self, reason: str, now: float, out: list[Action]) -> None:
        if reason and not self._full:
            out.append(Log("error", "nothing can be kept", {"reason": reason}))
        if self._full and not reason:
            out.append(Log("info", "there is room again", {}))
            for node in self._sessions.alive():
                node.lease_until = now + self._settings.lease_s
            self._promised = math.inf
        self._full = reason
