"""Recover a broker's state from its ledger: the nodes and the unfinished messages."""

from __future__ import annotations

import contextlib
import heapq
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeGuard

from msgspec import UNSET

from fedmq.broker.access.owners import key_of, owner_of
from fedmq.broker.access.rights import Origin
from fedmq.broker.core.broker import Broker
from fedmq.broker.core.deduplication import PostFingerprint
from fedmq.broker.core.events import Append
from fedmq.broker.core.lifecycles import (
    UNFINISHED,
    ImpossibleTransition,
    MessageEvent,
    MessageLives,
    SessionEvent,
    SessionState,
)
from fedmq.broker.core.mailboxes import Mailboxes, timer_of
from fedmq.broker.core.state import Node, RunState
from fedmq.broker.errors import LedgerDamage, LedgerError, check_advice
from fedmq.broker.ledger.blob_store import read_payload
from fedmq.broker.ledger.disk import LOCAL_DISK, Disk
from fedmq.broker.ledger.entries import (
    Accepted,
    AnyEntry,
    Consumed,
    Ended,
    Opened,
    Refusal,
    blob_name,
)
from fedmq.broker.ledger.manifest import check_entries
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.settings import EVERYTHING, BrokerSettings, Continuation, Durability, Retained
from fedmq.broker.wire.addresses import (
    AGGREGATOR,
    BROKER,
    CHECKPOINT,
    CONTINUED,
    RECORD,
    TIMER,
)
from fedmq.broker.wire.clock import Clock
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Hello, Message

_LOST = "its bytes are no longer in the ledger"


class Restorer:
    """Folds a ledger's entries, one by one, into a `Mailboxes`.

    Attributes:
        mailboxes: the runs, and what is unfinished in them.
        last_at: time of the last entry, in seconds since 1970; 0 without entries.
        lost: (run, number) of the unfinished messages whose blobs are not in the ledger.
    """

    def __init__(self, mailboxes: Mailboxes) -> None:
        self.mailboxes = mailboxes
        self._lives = MessageLives()
        self._kept: dict[int, Message] = {}
        """Unfinished and dead-lettered messages, including checkpoints and timers, by number."""
        self._at: dict[int, float] = {}
        self._last: dict[str, tuple[int, Message]] = {}
        """(number, message) of the last checkpoint of each ended run."""
        self.last_at = 0.0
        self.lost: list[tuple[str, int]] = []

    def feed(self, entry: AnyEntry) -> None:
        """Apply the next entry.

        Raises:
            LedgerDamage: it refers to a run that no earlier entry has, or it does what cannot
                happen to a message or session in its state.
        """
        try:
            self._feed(entry)
        except KeyError as error:
            unknown = f"entry {entry.seq} refers to {error}, which no earlier entry has"
            raise LedgerDamage(unknown) from None
        except ImpossibleTransition as error:
            raise LedgerDamage(f"entry {entry.seq} is impossible: {error}") from None

    def _feed(self, entry: AnyEntry) -> None:
        self.mailboxes.next_seq = entry.seq + 1
        self.last_at = max(self.last_at, entry.at)
        match entry:
            case Opened(run=name, config=text, total_clients=total, identity=identity, owner=owner):
                run = RunState(name, text, total, identity=identity, owner=owner, recovered=True)
                self.mailboxes.runs[name] = run
            case Accepted():
                self._accepted(entry, entry.read())
            case Consumed(of=of):
                self._finished(of)
            case Refusal():
                self._refused(entry)
            case Ended(run=name, reason=reason):
                run = self.mailboxes.runs[name]
                run.over = reason
                if self._is_unfinished(run.checkpoint):
                    self._last[name] = run.checkpoint, self._kept[run.checkpoint]
                run.checkpoint, run.carried = None, (0, 0)
                run.refused.clear()
                run.interrupted.clear()
                for seq in [s for s, each in self._kept.items() if each.run == name]:
                    self._lives.move(seq, MessageEvent.END_RUN)
                    del self._kept[seq]
                for node in run.nodes.values():
                    if node.alive:
                        node.move(SessionEvent.RUN_END)

    def _accepted(self, entry: Accepted, message: Message) -> None:
        run = self.mailboxes.runs[message.run]
        self._finished(entry.consumes)
        run.count_message(message.sender, len(entry.message))
        if message.sender == BROKER and message.kind in ("joined", "left"):
            self._member(run, message)
        elif message.sender == BROKER and message.kind == CONTINUED:
            self._continued(run, entry.seq, message)
        elif message.sender != BROKER:
            fingerprint = PostFingerprint.of(run.id, message.sender, message.id, entry.message)
            node = run.nodes.get(message.sender)
            leads = node is not None and node.hello.role == AGGREGATOR
            self.mailboxes.note_accepted(run, message.sender, fingerprint, leads=leads)
        if message.to == CHECKPOINT:
            run.checkpoint = entry.seq
            run.carried = run.carried if entry.traffic is UNSET else entry.traffic
        if message.to == RECORD:
            self._lives.move(entry.seq, MessageEvent.RECORD)
        else:
            self._lives.move(entry.seq, MessageEvent.ACCEPT)
            self._kept[entry.seq] = message
            self._at[entry.seq] = entry.at

    def _member(self, run: RunState, message: Message) -> None:
        """Apply that a node joined or left."""
        body = message.body
        name = body["node"]
        known = run.nodes.get(name)
        if message.kind == "left":
            if known is not None:
                known.move(SessionEvent.LEAVE)
                known.shrink()
            seq = body.get("interrupted")
            if self._is_unfinished(seq):
                run.interrupted[seq] = run.interrupted.get(seq, 0) + 1
            return
        hello = Hello(
            node=name,
            role=body["role"],
            session=body["session"],
            run=run.id,
            clients=tuple((low, high) for low, high in body["clients"]),
            config=run.config if body["role"] == AGGREGATOR else "",
            total_clients=run.total_clients,
        )
        # A ledger of 0.1.0 has the secret itself.
        owner = body.get("owner") or owner_of("", body.get("key", ""), hello.session)
        if hello.role == AGGREGATOR:
            run.owner = owner
        sessions = known.sessions if known is not None else 0
        again = known is not None and known.hello.session == hello.session
        sessions += not again
        run.nodes[name] = Node(
            hello,
            run,
            b"",
            0.0,
            SessionState.CONNECTED,
            sessions=sessions,
            origin=Origin(key_of(owner)),
            owner=owner,
        )

    def _continued(self, run: RunState, seq: int, message: Message) -> None:
        """Apply that a run was continued: its nodes are gone, and its end may be lifted."""
        run.config = message.body["config"]
        for node in run.nodes.values():
            if node.alive:
                node.move(SessionEvent.LEAVE)
        for at, each in self._kept.items():
            if each.run == run.id and each.to == TIMER:
                self._at[at] += message.body["stopped_s"]
        if not message.body["further"]:
            return
        run.continued = seq
        if run.over:
            run.over = ""
            if run.id in self._last:
                run.checkpoint, last = self._last.pop(run.id)
                self._lives.move(run.checkpoint, MessageEvent.REOPEN_RUN)
                self._kept[run.checkpoint] = last

    def continue_run(self, continuation: Continuation, ledger: Ledger, now: float) -> None:
        """Record that a run continues; does nothing if the ledger has no such run.

        Raises:
            LedgerError: a blob of the run's last checkpoint is not in the ledger.
        """
        if continuation.run not in self.mailboxes.runs:
            return
        stopped_s = max(0.0, now - self.last_at)
        message = Message(
            kind=CONTINUED,
            id=f"{BROKER}/{ledger.next_seq}",
            run=continuation.run,
            sender=BROKER,
            to=AGGREGATOR,
            body={
                "config": continuation.config,
                "further": continuation.further,
                "stopped_s": stopped_s,
            },
        )
        entry = Accepted(seq=ledger.next_seq, at=now, message=encode_message(message))
        self.feed(entry)
        self._check_last(self.mailboxes.runs[continuation.run], ledger)
        ledger.append(entry)

    def _check_last(self, run: RunState, ledger: Ledger) -> None:
        """Raise LedgerError if a blob of a run's last checkpoint is not in the ledger."""
        if self._is_unfinished(run.checkpoint) and any(
            ledger.size_of(blob_name(last, blob)) is None
            for last in [self._kept[run.checkpoint]]
            for blob in last.blobs
        ):
            raise LedgerError(
                f"cannot continue run {run.id}: the bytes of its last checkpoint, entry "
                f"{run.checkpoint}, are not in the ledger; they were lost in a power failure (see "
                "broker.durability) or deleted by retention (see broker.retain)"
            )

    def _is_unfinished(self, seq: int | None) -> TypeGuard[int]:
        return seq is not None and self._lives.state_of(seq) in UNFINISHED

    def _finished(self, seqs: Iterable[int]) -> None:
        for seq in seqs:
            self._lives.move(seq, MessageEvent.CONSUME)
            run = self.mailboxes.runs[self._kept.pop(seq).run]
            run.refused.discard(seq)
            run.interrupted.pop(seq, None)

    def _refused(self, refusal: Refusal) -> None:
        run = self.mailboxes.runs[refusal.run]
        if refusal.of is None:
            fingerprint = PostFingerprint.from_bytes(refusal.mark)
            self.mailboxes.rejected_window.add(run.id, refusal.sender, fingerprint)
            return
        dead = refusal.dead_lettered
        self._lives.move(refusal.of, MessageEvent.DEAD_LETTER if dead else MessageEvent.REJECT)
        run.refused.add(refusal.of)
        if dead:
            run.interrupted.pop(refusal.of, None)

    def finish(self, ledger: Ledger, now: float, lease_s: float) -> None:
        """Assign unfinished messages to the nodes that host their addresses.

        A node that was connected gets a new lease in which to reconnect.
        """
        for run in self.mailboxes.runs.values():
            for node in run.nodes.values():
                node.move(SessionEvent.RESTART)
                node.last_seen, node.lease_until = now, now + lease_s
                if node.alive:
                    run.hosts.add(node.hello)
        for seq, message in sorted(self._kept.items()):
            ledger.use(seq, [blob_name(message, blob) for blob in message.blobs])
        for seq, message in self.unfinished.items():
            run = self.mailboxes.runs[message.run]
            if any(ledger.size_of(blob_name(message, blob)) is None for blob in message.blobs):
                self.lost.append((run.id, seq))
                continue
            host = run.host_of(message.to)
            if message.to == TIMER:
                token, after_s = timer_of(message)
                heapq.heappush(self.mailboxes.timers, (self._at[seq] + after_s, seq, run.id, token))
            elif message.to == CHECKPOINT:
                pass
            elif host is not None:
                host.pending[seq] = message.to
            else:
                run.waiting.setdefault(message.to, []).append(seq)

    @property
    def unfinished(self) -> dict[int, Message]:
        """Return the unfinished messages by number, without the dead-lettered ones."""
        state_of = self._lives.state_of
        return {seq: each for seq, each in self._kept.items() if state_of(seq) in UNFINISHED}

    @property
    def dead_letters(self) -> tuple[int, ...]:
        """Return the numbers of the dead-lettered messages, in order."""
        return tuple(sorted(self._kept.keys() - self.unfinished.keys()))


def random_identity() -> str:
    """Return a unique identity for a run."""
    return secrets.token_hex(16)


def open_broker(
    folder: Path,
    settings: BrokerSettings,
    clock: Clock,
    *,
    durability: Durability = "process",
    disk: Disk = LOCAL_DISK,
    retain_bytes: Retained = EVERYTHING,
    redeliver_dead_letters: bool = False,
    continuation: Continuation | None = None,
    draw_identity: Callable[[], str] = random_identity,
) -> tuple[Ledger, Broker]:
    """Open or create a ledger, and return it with a core that continues from it.

    Args:
        folder: the ledger's folder.
        settings: of the broker.
        clock: set forward to the time of the last entry if it is behind, because the machine's
            clock was set back: deadlines count from the times of the entries.
        durability: see `LedgerSettings`.
        disk: holds the folder.
        retain_bytes: see `Ledger`.
        redeliver_dead_letters: deliver dead-lettered messages again, under new numbers.
        continuation: a run that continues with new sessions of all nodes.
        draw_identity: see `Broker`.

    Raises:
        LedgerDamage: damage that affects unfinished messages; the message names the command that
            reports it.
        LedgerError: the ledger cannot be read or written.
    """
    restorer = Restorer(Mailboxes())
    try:
        check_entries(folder, disk)
        ledger = Ledger(
            folder, restorer.feed, retain_bytes=retain_bytes, durability=durability, disk=disk
        )
    except LedgerDamage as error:
        raise error.advise(check_advice(folder)) from None
    with contextlib.ExitStack() as opened:
        opened.callback(ledger.abandon)
        clock.not_before(restorer.last_at)
        now = clock()
        for seq in restorer.dead_letters if redeliver_dead_letters else ():
            # Under a new number: a session that is still alive skips lower numbers.
            data = ledger.read(seq).message
            entry = Accepted(seq=ledger.next_seq, at=now, message=data, consumes=(seq,))
            ledger.append(entry)
            restorer.feed(entry)
        if continuation is not None:
            restorer.continue_run(continuation, ledger, now)
        restorer.finish(ledger, now, settings.lease_s)
        _check_lost(restorer, ledger, disk)
        core = Broker(settings, ledger, draw_identity, restorer.mailboxes)
        for run, seq in restorer.lost:
            for action in core.give_up(run, [seq], _LOST, now):
                if isinstance(action, Append):
                    ledger.append(action.entry)
        ledger.commit()
        opened.pop_all()
    return ledger, core


def _check_lost(restorer: Restorer, ledger: Ledger, disk: Disk) -> None:
    """Check that no unfinished message lacks bytes because of damage.

    Without damage, a power failure or a repair has truncated the payload: then the messages are
    dead-lettered and their senders notified. The payload is read a second time, and verified,
    before any message is given up.

    Raises:
        LedgerDamage: the first damaged range.
        LedgerError: the payload cannot be read, or its bytes differ when they are read again.
    """
    if not restorer.lost:
        return
    index, unfinished = read_payload(ledger.folder, disk), restorer.unfinished
    for _, seq in restorer.lost:
        message = unfinished[seq]
        if all(index.size_of(blob_name(message, blob)) is not None for blob in message.blobs):
            raise LedgerError(
                f"the payload in {ledger.folder} was read twice with different results; the blobs "
                f"of message {seq} were incomplete only once"
            )
    if damage := next(iter([*ledger.damage, *index.damage]), None):
        run, seq = restorer.lost[0]
        rest = f" and {len(restorer.lost) - 1} more need" if len(restorer.lost) > 1 else " needs"
        needed = f"; message {seq} of run {run}{rest} bytes that are damaged or lost"
        raise damage.advise(needed + check_advice(ledger.folder))
