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
from fedmq.broker.core.acceptance import Taking
from fedmq.broker.core.acknowledgments import Receipts
from fedmq.broker.core.mailboxes import Postbox
from fedmq.broker.core.sessions import Members
from fedmq.broker.core.state import (
    Action,
    Append,
    Event,
    Full,
    Gone,
    Held,
    Log,
    Node,
    Received,
    Send,
    Store,
    Unreadable,
    Wake,
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
    Beat,
    Buffer,
    Bye,
    Chunk,
    Done,
    Hello,
    Numbered,
    Over,
    Post,
    PostAll,
    Reject,
    Stranger,
    Want,
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
        box: Postbox | None = None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._box = box or Postbox()
        self._box.store = store
        self._uploads = Uploads(store)
        self._members = Members(settings, self._box, draw_identity, self._uploads.ask)
        self._taking = Taking(self._box)
        self._receipts = Receipts()
        self._full = ""
        self._promised = math.inf

    @property
    def next_seq(self) -> int:
        """Return the number of the next ledger entry."""
        return self._box.next_seq

    @property
    def deadline(self) -> float | None:
        """When the core next wants a Wake, whatever arrives; None for never."""
        if self._full:
            return None
        timer = self._box.timers[0][0] if self._box.timers else math.inf
        due = min(self._members.due, self._receipts.due, timer)
        return due if due < math.inf else None

    @property
    def idle(self) -> bool:
        """Tell whether every run that this broker has seen is over, and every node knows."""
        for run in self._box.runs.values():
            if not run.over:
                return False
        return bool(self._box.runs) and not any(self._members.alive())

    def sent(self, peer: bytes, nbytes: int) -> None:
        """Count bytes that the driver has put on the wire."""
        node = self._members.peers.get(peer)
        if node is not None:
            node.sent_bytes += nbytes

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; return what is to be done, in order."""
        self._box.fresh.clear()
        self._uploads.begin()
        out: list[Action] = []
        match event:
            case Received():
                self._received(event, now, out)
            case Unreadable(peer, error):
                code = "version" if isinstance(error, VersionError) else "unreadable"
                out.append(Send(peer, Reject(code=code, reason=str(error)[:2000])))
                out.append(Log("warning", "unreadable frame", {"reason": str(error)}))
            case Gone(peer):
                node = self._members.peers.get(peer)
                if node is not None and node.alive:
                    silent = f"silent for {now - node.heard:.1f} s, its connection is gone"
                    self._members.leave(node, silent, now, out)
            case Full(reason):
                self._filled(reason, now, out)
            case Wake():
                self._wake(now, out)
        return out

    def give_up(self, run: str, seqs: Sequence[int], reason: str, now: float) -> list[Action]:
        """Park messages that cannot be delivered, and tell their senders."""
        out: list[Action] = []
        for seq in seqs:
            where = self._box.runs[run]
            self._box.refuse(where, seq, BROKER, reason, now, out, code=Code.LOST, parked=True)
        self._box.fresh.clear()
        return out

    # ---- frames

    def _received(self, event: Received, now: float, out: list[Action]) -> None:
        frame, peer = event.frame, event.peer
        node = self._members.peers.get(peer)
        if self._full and isinstance(frame, Hello | Numbered):
            out.append(Send(peer, schema.Full(reason=self._full)))
        elif isinstance(frame, Hello):
            self._members.hello(peer, frame, now, out)
            return
        if node is None or not node.alive:
            if isinstance(frame, Bye):
                self._members.early.pop(peer, None)
            elif peer not in self._members.early and not isinstance(frame, Hello):
                out.append(Send(peer, Stranger()))
            return
        if node.run.over and not isinstance(frame, Bye):
            # It says goodbye within the lease that it had when its run ended.
            out.append(Send(peer, Over(reason=node.run.over)))
            return
        node.heard = now
        node.lease_until = now + self._settings.lease_s
        node.received_bytes += event.nbytes
        match frame:
            case Numbered() if not self._full:
                self._taken(node, frame.taken, now, out)
                self._numbered(node, frame, event.buffers, now, out)
            case Want():
                self._want(node, frame, out)
            case Beat(taken=taken):
                self._taken(node, taken, now, out)
                out.append(Send(peer, Beat(sent=node.sent)))
            case _ if self._full:
                pass  # what cannot be kept is not taken; its sender says it again
            case Chunk():
                if self._uploads.take(node, frame, event.buffers, out):
                    self._settle(node, now, out)
            case Bye(reason=reason, failed=failed):
                self._members.leave(node, reason or "said goodbye", now, out, clean=not failed)
            case _:
                reason = f"a node does not send {type(frame).__name__.lower()} frames"
                out.append(Send(peer, Reject(code="unexpected", reason=reason)))

    def _taken(self, node: Node, taken: int, now: float, out: list[Action]) -> None:
        delivery.take(node, taken)
        if node.queue and not self._full:
            out.extend(delivery.offer(node, self._box.read, now))

    def _numbered(
        self, node: Node, frame: Numbered, buffers: Sequence[Buffer], now: float, out: list[Action]
    ) -> None:
        if frame.n < node.next_n:
            # Sent again after a reconnect, and here already.
            self._receipts.owe(node, now)
        elif frame.n > node.next_n:
            # Some were lost on the way: Stranger makes the link start over from its oldest.
            out.append(Send(node.peer, Stranger()))
        elif len(node.held) < HELD_FRAMES:
            node.next_n += 1
            node.read_bytes = min(frame.read, node.pointed_bytes)
            if isinstance(frame, Post):
                held = self._taking.check(node, frame, buffers)
                self._begin(node, frame, buffers, held, now, out)
            else:
                held = Held(frame)
            node.held.append(held)
            self._settle(node, now, out)

    def _begin(
        self,
        node: Node,
        post: Post,
        buffers: Sequence[Buffer],
        held: Held,
        now: float,
        out: list[Action],
    ) -> None:
        """Keep the blobs beside a post, and find out which others are missing."""
        message, mark = held.message, held.mark
        if message is None or mark is None:
            return
        self._uploads.heard(node, message, now)
        if self._box.remembered.look(mark) != "new":
            return  # its blobs are not needed
        beside = {
            message.blobs[index]: data for index, data in zip(post.inline, buffers, strict=True)
        }
        self._uploads.begin_post(node, held, message, beside, out)

    def _settle(self, node: Node, now: float, out: list[Action]) -> None:
        """Take, in order, the held frames whose blobs are here; ask for what is missing."""
        while node.held and not self._uploads.lacks(node, node.held[0]):
            held = node.held.popleft()
            messages = 1
            match held.frame:
                case Post() as post:
                    self._taking.take(node, post, held, now, out)
                case PostAll() as post:
                    messages = len(post.messages)
                    for message in self._taking.take_all(node, post, now, out)[:1]:
                        self._uploads.heard(node, message, now)
                case Done(seqs=seqs, refused=refused) as done:
                    for seq, reason in refused.items():
                        if seq in node.pending:
                            code = done.code_of(seq)
                            self._box.refuse(node.run, seq, node.name, reason, now, out, code=code)
                    self._box.consume(node, seqs, now, out)
                case Over(reason=reason):
                    self._over(node, reason, now, out)
                    return
            self._receipts.owe(node, now, messages)
        self._uploads.ask(node, now, out)

    def _want(self, node: Node, want: Want, out: list[Action]) -> None:
        name = BlobName(node.run.id, want.owner, want.digest)
        reply = Chunk(owner=want.owner, digest=want.digest, start=want.start)
        held = (self._store.size_of(name) or 0) >= want.start + want.size
        out.append(Send(node.peer, reply, ((name, want.start, want.size),) if held else ()))

    def _over(self, node: Node, reason: str, now: float, out: list[Action]) -> None:
        if node.hello.role != AGGREGATOR:
            text = "only the aggregator ends a run"
            out.append(Send(node.peer, Reject(code="unexpected", reason=text)))
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
        entry = Ended(seq=self._box.number(), at=now, run=run.id, reason=run.over, nodes=counts)
        out.append(Append(entry))
        self._receipts.owe(node, now)
        out.extend(self._receipts.take())
        # A node stays until it says goodbye; whatever else it says is answered by Over.
        out.extend(
            Send(each.peer, Over(reason=run.over)) for each in run.nodes.values() if each.alive
        )
        for member in run.nodes.values():
            member.lease_until = now + self._settings.lease_s
            member.pending.clear()
            member.queue.clear()
            member.held.clear()
        run.waiting.clear()
        self._box.timers = [timer for timer in self._box.timers if timer[2] != run.id]
        heapq.heapify(self._box.timers)

    # ---- time

    def _wake(self, now: float, out: list[Action]) -> None:
        if self._full:
            return
        late = now - self._promised
        if late > self._settings.beat_s:
            # It is the broker that was stopped, not the nodes: they get a lease to be heard.
            for node in self._members.alive():
                node.heard += late
                node.lease_until = now + self._settings.lease_s
        self._members.look_after(now, out)
        while self._box.timers and self._box.timers[0][0] <= now:
            _, seq, name, token = heapq.heappop(self._box.timers)
            run = self._box.runs[name]
            self._box.say(run, "tick", AGGREGATOR, {"token": token}, now, out, consumes=(seq,))
        if now >= self._receipts.due:
            out.extend(self._receipts.take())
        self._promised = self.deadline or math.inf

    def _filled(self, reason: str, now: float, out: list[Action]) -> None:
        if reason and not self._full:
            out.append(Log("error", "nothing can be kept", {"reason": reason}))
        if self._full and not reason:
            out.append(Log("info", "there is room again", {}))
            for node in self._members.alive():
                node.lease_until = now + self._settings.lease_s
            self._promised = math.inf
        self._full = reason
