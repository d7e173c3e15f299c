"""The life of a message: accepted, delivered, consumed or rejected; each step is an entry.

The part of the Broker core that moves messages between its state and the ledger. It knows no
connections, no leases, and no frames other than deliveries.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from typing import Any

from msgspec import UNSET

from fedmq.broker.core import delivery
from fedmq.broker.core.deduplication import REJECTED_WINDOW, DedupWindow, Known, PostFingerprint
from fedmq.broker.core.events import Action, Append, Charge, Store
from fedmq.broker.core.state import Node, RejectedPost, RunState
from fedmq.broker.errors import WireError
from fedmq.broker.ledger.entries import Accepted, Consumed, Refusal, blob_name
from fedmq.broker.rejections import Code
from fedmq.broker.wire.addresses import (
    AGGREGATOR,
    BROKER,
    CHECKPOINT,
    RECORD,
    TIMER,
    node_address,
)
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Deliver, Message

_CONSUMED_BATCH = 1000
MAX_TIMER_S = 1e9
MAX_TIMERS = 1 << 17
"""Timers of all runs, 40 MB, beyond which only runs with few may set another."""
_FEW_TIMERS = 1 << 13


class Mailboxes:
    """The runs of a broker, and their messages.

    Attributes:
        store: reads the ledger; set by the Broker core.
        next_seq: number of the next ledger entry.
        runs: by id.
        leader_window, dedup_window, rejected_window: ids of messages that were accepted from
            aggregators and from other nodes, and of rejected ones; none is accepted again. Apart,
            so that very many of one sort do not push out the others.
        timers: a heap of (due, number of the request, run, token).
    """

    store: Store

    def __init__(self) -> None:
        self.next_seq = 0
        self.runs: dict[str, RunState] = {}
        self.leader_window = DedupWindow(has_ended=self._has_ended)
        self.dedup_window = DedupWindow(has_ended=self._has_ended)
        self.rejected_window = DedupWindow(REJECTED_WINDOW, self._has_ended)
        self.timers: list[tuple[float, int, str, str]] = []
        self.fresh: dict[int, Accepted] = {}
        """Messages accepted in this event, by number; the ledger does not have them yet."""

    def request_id(self, node: Node, seq: int) -> str:
        """Return the id of an unfinished message of a node."""
        return node.requests.get(seq) or self.read(seq).read().id

    def read(self, seq: int) -> Accepted:
        """Return an accepted message by its number."""
        return self.fresh.get(seq) or self.store.read(seq)

    def checkpoint(self, run: RunState) -> Deliver | None:
        """Return a run's newest checkpoint, for a new session of its aggregator."""
        if run.checkpoint is None:
            return None
        accepted = self.read(run.checkpoint)
        return Deliver(seq=run.checkpoint, at=accepted.at, message=accepted.message)

    def seen(self, node: Node, fingerprint: PostFingerprint) -> Known:
        """Return whether the id is new, or belongs to the same or to another message of a node."""
        run, name = node.run.id, node.name
        leads = node.hello.role == AGGREGATOR
        known = (self.leader_window if leads else self.dedup_window).seen(run, name, fingerprint)
        if known == "new" and self.rejected_window.size:
            known = self.rejected_window.seen(run, name, fingerprint)
            if known == "new":  # a ledger of 0.1.0 has no senders
                known = self.rejected_window.seen(run, "", fingerprint)
        return known

    def note_accepted(
        self, run: RunState, sender: str, fingerprint: PostFingerprint, *, leads: bool
    ) -> None:
        """Note the id of an accepted message; ``leads``: its sender is the aggregator."""
        window = self.leader_window if leads else self.dedup_window
        window.add(run.id, sender, fingerprint)

    def _has_ended(self, run: str) -> bool:
        return run not in self.runs or bool(self.runs[run].over)

    def may_set_timer(self, run: RunState) -> bool:
        """Return whether a run may set another timer."""
        if len(self.timers) < MAX_TIMERS:
            return True
        return sum(name == run.id for _, _, name, _ in self.timers) < _FEW_TIMERS

    def number(self) -> int:
        """Assign the number of the next entry, and return it."""
        self.next_seq += 1
        return self.next_seq - 1

    def accept(
        self,
        run: RunState,
        message: Message,
        data: bytes,
        consumes: tuple[int, ...],
        now: float,
        out: list[Action],
    ) -> None:
        """Accept a message, and deliver it to the node that hosts its address.

        Args:
            run: the message's run.
            message: decoded from ``data``.
            data: the bytes that its sender wrote.
            consumes: numbers of the messages that its sender has handled.
            now: in seconds since 1970.
            out: list to which the actions are appended.
        """
        seq = self.number()
        if consumes:
            self._discard(run, consumes)
        run.count_message(message.sender, len(data))
        if message.to == CHECKPOINT:
            consumes += () if run.checkpoint is None else (run.checkpoint,)
            run.checkpoint = seq
        elif message.to == TIMER:
            token, after_s = timer_of(message)
            heapq.heappush(self.timers, (now + after_s, seq, run.id, token))
        uses = [blob_name(message, blob) for blob in message.blobs] if message.blobs else ()
        traffic = run.traffic() if message.to == CHECKPOINT else UNSET
        entry = Accepted(seq=seq, at=now, message=data, consumes=consumes, traffic=traffic)
        self.fresh[seq] = entry
        out.append(Append(entry, uses, kept=message.to != RECORD))
        if message.to in (RECORD, CHECKPOINT, TIMER):
            return
        host = run.host_of(message.to)
        if host is None:
            run.waiting.setdefault(message.to, []).append(seq)
        elif delivery.is_open(host, now):
            host.pending[seq] = message.to
            out.append(delivery.delivery(host, seq, now, data, message))
        else:
            delivery.enqueue(host, seq, message.to)

    def consume(self, node: Node, seqs: Sequence[int], now: float, out: list[Action]) -> None:
        """Record that a node has handled messages; numbers that are not pending are ignored."""
        finished = [seq for seq in seqs if node.finish(seq)]
        self._discard(node.run, finished)
        for start in range(0, len(finished), _CONSUMED_BATCH):
            of = tuple(finished[start : start + _CONSUMED_BATCH])
            entry = Consumed(seq=self.number(), at=now, node=node.name, of=of)
            out.append(Append(entry))

    def _discard(self, run: RunState, seqs: Sequence[int]) -> None:
        if run.refused:
            run.refused.difference_update(seqs)
        if run.interrupted:
            for seq in seqs:
                run.interrupted.pop(seq, None)

    def refuse_post(self, node: Node, post: RejectedPost, now: float, out: list[Action]) -> None:
        """Record that a post was rejected, and notify its sender."""
        out.append(Charge(node.peer))
        rejection = post.rejection
        reason = rejection.reason[:2000]
        body = {"id": post.id, "reason": reason, "by": BROKER, "code": rejection.code}
        self._notify_sender(node.run, node.name, body, now, out)
        refusal = Refusal(
            seq=self.number(),
            at=now,
            run=node.run.id,
            node=BROKER,
            id=post.id,
            reason=reason,
            mark=post.fingerprint.to_bytes(),
            code=rejection.code,
            sender=node.name,
        )
        out.append(Append(refusal))

    def refuse(
        self,
        run: RunState,
        seq: int,
        by: str,
        reason: str,
        now: float,
        out: list[Action],
        *,
        code: str = "",
        dead_lettered: bool = False,
    ) -> None:
        """Record once that an accepted message was rejected, and notify its sender."""
        if seq in run.refused:
            return
        run.refused.add(seq)
        message = self.read(seq).read()
        if message.sender != BROKER:
            body = {"id": message.id, "reason": reason, "by": by, "code": code}
            self._notify_sender(run, message.sender, body, now, out)
        refusal = Refusal(
            seq=self.number(),
            at=now,
            run=run.id,
            node=by,
            id=message.id,
            reason=reason,
            of=seq,
            dead_lettered=dead_lettered,
            code=code,
        )
        out.append(Append(refusal))

    def _notify_sender(
        self, run: RunState, sender: str, body: dict[str, Any], now: float, out: list[Action]
    ) -> None:
        """Notify before recording: after a crash in between, the sender is notified again."""
        self.publish(run, "refused", node_address(sender), body, now, out, re=body["id"])

    def publish(
        self,
        run: RunState,
        kind: str,
        to: str,
        body: dict[str, Any],
        now: float,
        out: list[Action],
        re: str | None = None,
        consumes: tuple[int, ...] = (),
    ) -> None:
        """Accept a message that the broker itself sends."""
        message = Message(
            kind=kind,
            id=f"{BROKER}/{self.next_seq}",
            run=run.id,
            sender=BROKER,
            to=to,
            body=body,
            re=re,
        )
        self.accept(run, message, encode_message(message), consumes, now, out)

    def validate_state(self) -> None:
        """Raise AssertionError, with what is wrong, if a message is lost or in two places."""
        places = []
        for run in self.runs.values():
            places += run.validate_state()
        timers = self.timers
        for index, (due, seq, name, token) in enumerate(timers):
            places.append(seq)
            if due < timers[(index - 1) // 2 if index else 0][0]:
                raise AssertionError(f"timer {token} of run {name} is not at its place in the heap")
            if name not in self.runs or self.runs[name].over:
                raise AssertionError(f"timer {token} is of run {name}, which has ended")
        if len(set(places)) != len(places):
            twice = [seq for seq, count in Counter(places).items() if count > 1]
            raise AssertionError(f"messages {twice[:5]} are in several places")
        if places and max(places) >= self.next_seq:
            raise AssertionError(f"message {max(places)} is not in the ledger: {self.next_seq} are")
        self.leader_window.validate_state()
        self.dedup_window.validate_state()
        self.rejected_window.validate_state()


def timer_of(message: Message) -> tuple[str, float]:
    """Return the token of a requested timer, and its delay in seconds.

    Raises:
        WireError: the message is not a valid timer request.
    """
    match message.body:
        case {"token": str(token), "after_s": float() | int() as after_s}:
            if token and 0 <= after_s <= MAX_TIMER_S:
                return token, float(after_s)
    text = f"expected a body with a token and after_s from 0 to {MAX_TIMER_S:g}"
    raise WireError(text, Code.MALFORMED)
