"""The Broker core: who is there, what goes where, what is kept; no sockets, no clock.

``handle(event, now) -> [action]``. The driver carries actions out in order, with one
rule that the guarantees stand on: **no Send goes out before every Append and Put that
precedes it is in the ledger.** So it may run a whole batch of events, write once, and
send then.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fedmq.broker.admission import check_message, find_run, why_not
from fedmq.broker.errors import VersionError, WireError
from fedmq.broker.fetch import Owned
from fedmq.broker.ledger import Accepted, BlobName, Consumed, Ended, Refusal, blob_name
from fedmq.broker.receipts import Receipts
from fedmq.broker.state import (
    AGGREGATOR,
    BROKER,
    RECORD,
    Action,
    Append,
    BrokerSettings,
    Drop,
    Event,
    Log,
    Node,
    Parked,
    Pending,
    Put,
    Received,
    Run,
    Send,
    Unreadable,
    Wake,
    addresses,
)
from fedmq.broker.wire import (
    Beat,
    Buffer,
    Bye,
    Chunk,
    Deliver,
    Done,
    Hello,
    Message,
    Numbered,
    Over,
    Post,
    Refused,
    Reject,
    Stranger,
    Tick,
    Wait,
    Want,
    Welcome,
    check_inline,
    decode_message,
    encode_message,
    inline_choice,
)

REFUSED_KEPT = 100
"""Refusals of a session that can be said again, should one be lost with a connection."""


class Broker:
    """Routes messages, keeps leases and timers, and says what the ledger must hold.

    Args:
        settings: leases and beats.
        size_of: the size of a blob, if the ledger has the whole of it.
        next_seq: number of the next ledger entry.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        size_of: Callable[[BlobName], int | None],
        next_seq: int = 0,
    ) -> None:
        self._settings = settings
        self._size_of = size_of
        self._next_seq = next_seq
        self._runs: dict[str, Run] = {}
        self._peers: dict[bytes, Node] = {}
        self._early: dict[bytes, Hello] = {}
        """Connections that said Hello before their run existed."""
        self._ticks: list[tuple[float, int, Node, str]] = []
        self._tick_count = itertools.count()
        self._receipts = Receipts()

    @property
    def deadline(self) -> float | None:
        """When the core next wants a Wake, whatever arrives; None for never."""
        times = [node.lease_until for node in self._live_nodes()]
        if self._ticks:
            times.append(self._ticks[0][0])
        if self._receipts.due < math.inf:
            times.append(self._receipts.due)
        return min(times, default=None)

    @property
    def idle(self) -> bool:
        """Tell whether every run that this broker has seen is over, and every node knows."""
        over = bool(self._runs) and all(run.over for run in self._runs.values())
        return over and not any(self._live_nodes())

    def sent(self, peer: bytes, nbytes: int) -> None:
        """Count bytes that the driver has put on the wire."""
        node = self._peers.get(peer)
        if node is not None:
            node.sent_bytes += nbytes

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; return what is to be done, in order."""
        actions: list[Action] = []
        match event:
            case Received():
                self._received(event, now, actions)
            case Unreadable(peer, error):
                code = "version" if isinstance(error, VersionError) else "unreadable"
                actions.append(Send(peer, Reject(code=code, reason=str(error)[:2000])))
                actions.append(Log("warning", "unreadable frame", {"reason": str(error)}))
            case Wake():
                self._wake(now, actions)
        return actions

    # ---- frames

    def _received(self, event: Received, now: float, out: list[Action]) -> None:
        frame, peer = event.frame, event.peer
        if isinstance(frame, Hello):
            self._hello(peer, frame, now, out)
            return
        node = self._peers.get(peer)
        if node is None or not node.alive:
            if isinstance(frame, Bye):
                self._early.pop(peer, None)
            elif peer not in self._early:
                out.append(Send(peer, Stranger()))
            return
        node.lease_until = now + self._settings.lease_s
        if node.run.over and not isinstance(frame, Bye):
            out.append(Send(peer, Over(reason=node.run.over)))
            return
        node.received_bytes += event.nbytes
        match frame:
            case Numbered():
                self._numbered(node, frame, event.buffers, now, out)
            case Chunk():
                self._chunk(node, frame, event.buffers, now, out)
            case Want():
                self._want(node, frame, out)
            case Beat():
                out.append(Send(peer, Beat()))
            case Bye(reason=reason):
                self._leave(node, reason or "said goodbye", now, out)
            case _:
                reason = f"a node does not send {type(frame).__name__.lower()} frames"
                out.append(Send(peer, Reject(code="unexpected", reason=reason)))

    def _hello(self, peer: bytes, hello: Hello, now: float, out: list[Action]) -> None:
        run = find_run(self._runs, hello)
        if isinstance(run, str):
            self._reject(peer, hello, "run", run, out)
            return
        if run is None:
            self._early[peer] = hello
            out.append(Send(peer, Wait(reason="no run has started yet")))
            return
        self._early.pop(peer, None)
        known = run.nodes.get(hello.node)
        if run.over and known is not None and known.hello.session == hello.session:
            out.append(Send(peer, Over(reason=run.over)))
            return
        reason = why_not(run, hello, known)
        if reason:
            self._reject(peer, hello, *reason, out)
            return
        self._runs.setdefault(run.id, run)
        before = self._peers.get(peer)
        if before is not None and before is not known and before.alive:
            self._leave(before, f"its connection is {hello.node} now", now, out)
        returning = known is not None and known.hello.session == hello.session
        if known is not None and returning:
            self._peers.pop(known.peer, None)
            node = known
            node.peer = peer
            node.fetcher.restart()
        else:
            node = Node(hello, run, peer, 0.0, alive=False, next_n=hello.first)
            if known is not None:
                node.sessions = known.sessions
                node.received_bytes, node.sent_bytes = known.received_bytes, known.sent_bytes
            run.nodes[hello.node] = node
        node.lease_until = now + self._settings.lease_s
        self._peers[peer] = node
        welcome = Welcome(
            run=run.id,
            beat_s=self._settings.beat_s,
            lease_s=self._settings.lease_s,
            config=run.config,
        )
        out.append(Send(peer, welcome))
        if not node.alive:
            node.alive = True
            node.sessions += not returning
            self._announce("joined", node, {}, now, out)
            for address in addresses(hello):
                run.hosts[address] = hello.node
                for pending in run.waiting.pop(address, []):
                    node.unconsumed[pending.seq] = pending
        for _, pending in sorted(node.unconsumed.items()):
            out.append(self._delivery(node, pending))
        out.extend(Send(peer, want) for want in node.fetcher.wants())
        if hello.role == AGGREGATOR:
            # Of several sessions that waited under one name, the newest is the node.
            early = {each.node: (other, each) for other, each in self._early.items()}
            self._early = {}
            for other, their_hello in early.values():
                self._hello(other, their_hello, now, out)

    def _reject(self, peer: bytes, hello: Hello, code: str, reason: str, out: list[Action]) -> None:
        out.append(Send(peer, Reject(code=code, reason=reason[:2000])))
        out.append(Log("warning", "rejected", {"peer_node": hello.node, "reason": reason}))

    def _numbered(
        self, node: Node, frame: Numbered, buffers: Sequence[Buffer], now: float, out: list[Action]
    ) -> None:
        if frame.n != node.next_n:
            # Behind: sent again after a reconnect, and here already. Ahead: some were lost
            # with a connection; Stranger makes the link start over from its oldest.
            if frame.n < node.next_n:
                self._receipts.owe(node, now)
                if frame.n in node.refused:
                    out.append(Send(node.peer, node.refused[frame.n]))
            else:
                out.append(Send(node.peer, Stranger()))
            return
        node.next_n += 1
        parked = Parked(frame)
        node.parked.append(parked)
        if isinstance(frame, Post):
            self._post(node, frame, buffers, parked, out)
        self._settle(node, now, out)

    def _post(
        self,
        node: Node,
        post: Post,
        buffers: Sequence[Buffer],
        parked: Parked,
        out: list[Action],
    ) -> None:
        """Check a post, keep the blobs beside it, and ask for the others."""
        try:
            message = parked.message = decode_message(post.message)
            check_inline(message.blobs, post.inline, buffers)
            check_message(node, message)
        except WireError as error:
            parked.refusal = str(error)
            return
        beside = {
            message.blobs[index]: data for index, data in zip(post.inline, buffers, strict=True)
        }
        for blob in message.blobs:
            name = blob_name(message, blob)
            if self._size_of(name) is not None:
                continue
            if blob in beside or not blob.size:
                out.append(Put(name, blob.size, 0, beside.get(blob, b"")))
            else:
                parked.missing.add(Owned(message.sender, blob.digest))
                node.fetcher.add(message.sender, blob)

    def _settle(self, node: Node, now: float, out: list[Action]) -> None:
        """Take, in order, the parked frames whose blobs are here; ask for what is missing."""
        while node.parked and not node.parked[0].missing:
            parked = node.parked.popleft()
            message = parked.message
            self._receipts.owe(node, now)
            match parked.frame:
                case Post() as post if message is not None and not parked.refusal:
                    # What is consumed is what the sender has, whatever it claims.
                    mine = {seq: node.unconsumed.pop(seq, None) for seq in post.consumes}
                    consumes = tuple(seq for seq, pending in mine.items() if pending)
                    self._accept(node.run, message, post.message, consumes, now, out)
                case Post() as post:
                    self._refuse_post(node, post, parked, now, out)
                case Done() as done:
                    self._done(node, done, now, out)
                case Tick(token=token, after_s=after_s):
                    tick = (now + after_s, next(self._tick_count), node, token)
                    heapq.heappush(self._ticks, tick)
                case Over(reason=reason):
                    self._over(node, reason, now, out)
                    return
        out.extend(Send(node.peer, want) for want in node.fetcher.wants())

    def _accept(
        self,
        run: Run,
        message: Message,
        data: bytes,
        consumes: tuple[int, ...],
        now: float,
        out: list[Action],
    ) -> None:
        seq = self._number()
        out.append(Append(Accepted(seq=seq, at=now, message=data, consumes=consumes)))
        if message.to == RECORD:
            return
        pending = Pending(seq, now, data, message)
        host = run.nodes.get(run.hosts.get(message.to, ""))
        if host is not None and host.alive:
            host.unconsumed[seq] = pending
            out.append(self._delivery(host, pending))
        else:
            run.waiting.setdefault(message.to, []).append(pending)

    def _delivery(self, node: Node, pending: Pending) -> Send:
        message = pending.message
        inline = inline_choice(message.blobs)
        frame = Deliver(seq=pending.seq, at=pending.at, message=pending.data, inline=inline)
        chosen = [message.blobs[index] for index in inline]
        return Send(
            node.peer, frame, tuple((blob_name(message, blob), 0, blob.size) for blob in chosen)
        )

    def _refuse_post(
        self, node: Node, post: Post, parked: Parked, now: float, out: list[Action]
    ) -> None:
        name = parked.message.id if parked.message else f"{node.name}/post/{post.n}"
        refusal = Refusal(
            seq=self._number(),
            at=now,
            run=node.run.id,
            node=BROKER,
            id=name,
            reason=parked.refusal[:2000],
        )
        out.append(Append(refusal))
        refused = Refused(id=name, reason=refusal.reason)
        node.refused[post.n] = refused
        if len(node.refused) > REFUSED_KEPT:
            del node.refused[min(node.refused)]
        out.append(Send(node.peer, refused))
        # Its sender is done with what it consumes all the same.
        self._consume(node, post.consumes, now, out)

    def _chunk(
        self, node: Node, chunk: Chunk, buffers: Sequence[Buffer], now: float, out: list[Action]
    ) -> None:
        name = Owned(chunk.owner, chunk.digest)
        if not buffers and name in node.fetcher:
            self._blob_failed(node, name, "its sender does not hold the blob that it names")
        elif buffers:
            piece = node.fetcher.receive(chunk, buffers[0])
            if piece is None:
                return
            full = BlobName(node.run.id, chunk.owner, chunk.digest)
            out.append(Put(full, piece.size, piece.start, piece.data))
            good = node.fetcher.finished(name)
            if good is False:
                out.append(Drop(full, piece.size))
                self._blob_failed(node, name, "the bytes of a blob do not match its digest")
            elif good:
                for parked in node.parked:
                    parked.missing.discard(name)
        self._settle(node, now, out)

    def _blob_failed(self, node: Node, name: Owned, reason: str) -> None:
        node.fetcher.drop(name)
        for parked in node.parked:
            if name in parked.missing:
                parked.missing.discard(name)
                parked.refusal = f"{reason} ({name.digest.hex()})"

    def _want(self, node: Node, want: Want, out: list[Action]) -> None:
        name = BlobName(node.run.id, want.owner, want.digest)
        reply = Chunk(owner=want.owner, digest=want.digest, start=want.start)
        held = (self._size_of(name) or 0) >= want.start + want.size
        out.append(Send(node.peer, reply, ((name, want.start, want.size),) if held else ()))

    def _consume(self, node: Node, seqs: tuple[int, ...], now: float, out: list[Action]) -> None:
        finished = tuple(seq for seq in seqs if node.unconsumed.pop(seq, None) is not None)
        if finished:
            entry = Consumed(seq=self._number(), at=now, node=node.name, of=finished)
            out.append(Append(entry))

    def _done(self, node: Node, done: Done, now: float, out: list[Action]) -> None:
        self._consume(node, done.seqs, now, out)
        for seq, reason in done.refused.items():
            pending = node.unconsumed.pop(seq, None)
            if pending is None:
                continue
            message = pending.message
            refusal = Refusal(
                seq=self._number(),
                at=now,
                run=node.run.id,
                node=node.name,
                id=message.id,
                reason=reason,
                of=seq,
            )
            out.append(Append(refusal))
            sender = node.run.nodes.get(message.sender)
            if sender is not None and sender.alive:
                out.append(Send(sender.peer, Refused(id=message.id, reason=reason)))

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
                "sent_bytes": each.sent_bytes,
                "received_bytes": each.received_bytes,
            }
            for name, each in run.nodes.items()
        }
        entry = Ended(seq=self._number(), at=now, run=run.id, reason=reason, nodes=counts)
        out.append(Append(entry))
        self._receipts.owe(node, now)
        out.extend(self._receipts.take())
        # A node stays until it says goodbye; whatever else it says is answered by Over.
        out.extend(
            Send(each.peer, Over(reason=reason)) for each in run.nodes.values() if each.alive
        )
        self._ticks = [tick for tick in self._ticks if tick[2].run is not run]
        heapq.heapify(self._ticks)

    # ---- time

    def _wake(self, now: float, out: list[Action]) -> None:
        for node in [node for node in self._live_nodes() if node.lease_until <= now]:
            reason = f"silent for {self._settings.lease_s:g} s"
            self._leave(node, reason, now, out)
        while self._ticks and self._ticks[0][0] <= now:
            _, _, node, token = heapq.heappop(self._ticks)
            self._say(node.run, "tick", AGGREGATOR, {"token": token}, now, out)
        if now >= self._receipts.due:
            out.extend(self._receipts.take())

    def _leave(self, node: Node, reason: str, now: float, out: list[Action]) -> None:
        node.alive = False
        run = node.run
        if run.over:
            return
        for address in addresses(node.hello):
            if run.hosts.get(address) == node.name:
                del run.hosts[address]
        for seq, pending in sorted(node.unconsumed.items()):
            run.waiting.setdefault(pending.message.to, []).append(pending)
            run.waiting[pending.message.to].sort(key=lambda each: each.seq)
            del node.unconsumed[seq]
        self._announce("left", node, {"reason": reason}, now, out)

    def _announce(
        self, kind: str, node: Node, more: dict[str, Any], now: float, out: list[Action]
    ) -> None:
        hello = node.hello
        body = {
            "node": hello.node,
            "role": hello.role,
            "session": hello.session,
            "clients": [list(each) for each in hello.clients],
            **more,
        }
        to = RECORD if hello.role == AGGREGATOR else AGGREGATOR
        self._say(node.run, kind, to, body, now, out)
        out.append(Log("info", kind, {"peer_node": hello.node, "role": hello.role, **more}))

    def _say(
        self, run: Run, kind: str, to: str, body: dict[str, Any], now: float, out: list[Action]
    ) -> None:
        """Accept a message from the broker itself."""
        message = Message(
            kind=kind, id=f"{BROKER}/{self._next_seq}", run=run.id, sender=BROKER, to=to, body=body
        )
        self._accept(run, message, encode_message(message), (), now, out)

    def _number(self) -> int:
        self._next_seq += 1
        return self._next_seq - 1

    def _live_nodes(self) -> Iterator[Node]:
        return (node for node in self._peers.values() if node.alive)
