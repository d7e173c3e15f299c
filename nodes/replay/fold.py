"""The aggregator's core, run again over its recorded inbox, and held against its record.

No network and no clock: a message's time is the one that was written down. Everything the
core says must stand in the ledger, in the same order and to the same digests; the first
that does not is where the code, or the machine, has parted from the run.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeGuard

import msgspec
import torch

from fedmq.broker.entries import Accepted, AnyEntry, Ended, Refusal
from fedmq.broker.errors import LedgerError
from fedmq.broker.state import AGGREGATOR, BROKER, CHECKPOINT, node_address
from fedmq.broker.trace import Trace
from fedmq.broker.wire import Message
from fedmq.nodes.aggregator import Action, Aggregator, Start
from fedmq.nodes.config import Config, parse
from fedmq.nodes.errors import NodeError
from fedmq.nodes.inbox import Done, Finish, Inbound, Post
from fedmq.nodes.setup import Setup, set_up
from fedmq.nodes.trace.differ import Side, differences

INBOX = (AGGREGATOR, node_address(AGGREGATOR))
MAX_REASON = 2000
"""Of a refusal, as the ledger keeps it."""


class Diverged(NodeError):
    """What the core says is not what was recorded; the message shows both, and where."""


@dataclass(frozen=True)
class Step:
    """One event that the core has taken, and what it said to that."""

    event: Start | Inbound
    actions: list[Action]


@dataclass
class _Expected:
    """What the core has said and the record has not shown yet."""

    posts: deque[tuple[Post, int]] = field(default_factory=deque)
    """With the number of the message upon which it was said."""
    refusals: dict[int, str] = field(default_factory=dict)
    finish: str | None = None


class Replay:
    """An aggregator of a recorded run, from its start or from a checkpoint.

    Args:
        trace: of the run.
        checkpoint: number of the checkpoint to start from; None starts from the beginning.
        check: whether to hold what the core says against the record.

    Attributes:
        setup: what is learned, how, and when; from the record.
        core: the aggregator; `steps` moves it.
        messages: how many it has taken.
        compared: how many of its actions were found in the record.
        at: time of the last message.

    Raises:
        LedgerError: the checkpoint cannot be read, or is none.
        ConfigError: the run's configuration cannot be used here.
    """

    def __init__(
        self,
        trace: Trace,
        checkpoint: int | None = None,
        *,
        check: bool = True,
        setup: Setup | None = None,
    ) -> None:
        self.trace = trace
        self.setup = setup or recorded_setup(trace)
        self.core = Aggregator(self.setup, trace.run, AGGREGATOR)
        self.messages = self.compared = 0
        self.at = trace.opened.at
        self._check = check
        self._checkpoint = checkpoint
        self._rest = trace.entries()
        self._begun = False
        self._expected = _Expected()
        self._from = -1
        """Number of the last message that the checkpoint holds."""
        self._next_recorded = 0
        self._over = False

    def steps(self, until: int | None = None) -> Iterator[Step]:
        """Give the core its inbox, message by message; called again, it goes on from there.

        Args:
            until: number of the last message to take. If it is one of the aggregator's own,
                the core is stopped right after it has said it.

        Raises:
            Diverged: the core says something else than was recorded.
            LedgerError: the trace is damaged, or there is no message ``until``.
        """
        said = self._own_id(until) if until is not None else None
        if not self._begun:
            self._begun = True
            step = self._begin()
            yield step
            if said is not None and _says(step, said):
                return
        for entry in self._rest:
            if until is not None and said is None and entry.seq > until:
                self._rest = itertools.chain([entry], self._rest)
                return
            if self._is_next(entry):
                step = self._take(inbound(self.trace, entry))
                yield step
                if said is not None and _says(step, said):
                    return
            elif self._check:
                self._compare(entry)
        if self._check:
            self._compare_end()

    @property
    def unfound(self) -> int:
        """Return how many actions the record ends before."""
        return len(self._expected.posts)

    def _is_next(self, entry: AnyEntry) -> TypeGuard[Accepted]:
        """Tell whether this is a message that the core is to take."""
        if not isinstance(entry, Accepted) or entry.seq <= self._from or self._over:
            return False
        return entry.read().to in INBOX

    def _begin(self) -> Step:
        if self._checkpoint is None:
            return self._take(Start())
        accepted = accepted_entry(self.trace, self._checkpoint)
        message = accepted.read()
        if message.to != CHECKPOINT:
            raise LedgerError(f"expected a checkpoint, message {self._checkpoint} is none")
        self._next_recorded = _counter(message) + 1
        step = self._take(Start(inbound(self.trace, accepted)))
        self._from = self.core.parts()["position"]
        return step

    def _own_id(self, seq: int) -> str | None:
        """Return the id of a message, if it is the aggregator's."""
        entry = self.trace.entry(seq)
        message = entry.read() if isinstance(entry, Accepted) else None
        return message.id if message is not None and message.sender == AGGREGATOR else None

    def _take(self, event: Start | Inbound) -> Step:
        actions = self.core.handle(event)
        upon = event.seq if isinstance(event, Inbound) else -1
        if isinstance(event, Inbound):
            self.messages += 1
            self.at = event.at
        for action in actions:
            match action:
                case Post() if self._check:
                    self._expected.posts.append((action, upon))
                case Done(seq, refused) if refused and self._check:
                    self._expected.refusals[seq] = refused[:MAX_REASON]
                case Finish(reason):
                    self._expected.finish = reason
                    self._over = True
        return Step(event, actions)

    # ---- the record

    def _compare(self, entry: AnyEntry) -> None:
        """Hold one entry of the ledger against what the core has said."""
        expected = self._expected
        match entry:
            case Accepted():
                message = entry.read()
                if message.sender == AGGREGATOR and _counter(message) >= self._next_recorded:
                    self._compare_post(entry, message)
            case Refusal(of=None, id=name, node=node):
                if expected.posts and expected.posts[0][0].message.id == name and node == BROKER:
                    expected.posts.popleft()  # said, and not accepted
                    self.compared += 1
            case Refusal(of=int(of), node=node, reason=reason) if node == AGGREGATOR:
                if of > self._from:
                    self._compare_refusal(entry.seq, of, reason)
            case Ended(reason=reason):
                if self._over and expected.finish != reason:
                    raise Diverged(
                        f"entry {entry.seq} ends the run: {reason}\n  replayed: {expected.finish}"
                    )
                self.compared += 1

    def _compare_post(self, entry: Accepted, message: Message) -> None:
        if not self._expected.posts:
            raise Diverged(
                f"message {entry.seq}, {describe(message)}\n"
                f"  recorded; the replay has said nothing more, having taken {self.messages} "
                "messages"
            )
        post, upon = self._expected.posts.popleft()
        replayed = _as_far_as_recorded(post.message, message)
        if message != replayed:
            found = differences(
                Side(message, functools.partial(self.trace.blob, message)),
                Side(replayed, post.data.__getitem__),
                names=("the record", "the replay"),
                ignore=frozenset(),
            )
            cause = f"message {upon}" if upon >= 0 else "its start"
            lines = [
                f"message {entry.seq} differs; it was said upon {cause}",
                f"recorded: {describe(message)}",
                f"replayed: {describe(replayed)}",
                *found,
            ]
            raise Diverged("\n  ".join(lines))
        self.compared += 1

    def _compare_refusal(self, seq: int, of: int, reason: str) -> None:
        said = self._expected.refusals.get(of)
        if said != reason:
            replayed = "not refused" if said is None else f"refused: {said}"
            raise Diverged(
                f"entry {seq} differs: what became of message {of}\n"
                f"  recorded: refused: {reason}\n  replayed: {replayed}"
            )
        self.compared += 1

    def _compare_end(self) -> None:
        """At the end of the ledger, everything said must have been found, if the run was over."""
        if not self._over:
            return  # the aggregator was ended before it could say all of this
        if self._expected.posts:
            post, upon = self._expected.posts[0]
            raise Diverged(
                f"upon message {upon} the replay says {describe(post.message)}\n"
                "  the record ends without it"
            )


def recorded_setup(trace: Trace, config: Config | None = None) -> Setup:
    """Return the objects of a recorded run, as its aggregator made them.

    Raises:
        ConfigError: its configuration cannot be used here.
    """
    setup = set_up(config or parse(trace.opened.config))
    torch.set_num_threads(setup.config.worker.threads)
    return setup


def last_checkpoint(trace: Trace, before: int | None = None) -> int:
    """Return the number of the newest checkpoint that a replay can go on from.

    Args:
        trace: of the run.
        before: number of an entry; only what was checkpointed before it counts.

    Raises:
        LedgerError: there is none.
    """
    found = None
    for entry in trace.entries():
        if before is not None and entry.seq >= before:
            break
        if isinstance(entry, Accepted):
            message = entry.read()
            if message.to == CHECKPOINT and message.kind != "finished":
                found = entry.seq
    if found is None:
        raise LedgerError(f"there is no checkpoint before entry {before}: replay from the start")
    return found


def accepted_entry(trace: Trace, seq: int) -> Accepted:
    """Return a message's entry.

    Raises:
        LedgerError: the entry is no message, or not there.
    """
    entry = trace.entry(seq)
    if not isinstance(entry, Accepted):
        raise LedgerError(f"expected a message, entry {seq} is a {type(entry).__name__.lower()}")
    return entry


def inbound(trace: Trace, entry: Accepted) -> Inbound:
    """Return a recorded message as a core takes it."""
    message = entry.read()
    return Inbound(entry.seq, entry.at, message, functools.partial(trace.blob, message))


def describe(message: Message) -> str:
    """Return a message in a few words."""
    size = sum(blob.size for blob in message.blobs)
    facts = [f"{key} {message.body[key]!r:.40}" for key in _FACTS if key in message.body]
    return f"{message.kind} {message.id} to {message.to}" + "".join(
        f", {each}" for each in (*facts, *([f"{size} bytes"] if size else []))
    )


_FACTS = ("client", "model_version", "version", "results", "reason", "token", "model_digest")


def _as_far_as_recorded(replayed: Message, recorded: Message) -> Message:
    """Return what is said now, without what a later release says more.

    A release may add fields to a message, and settings to a configuration; a trace of the
    release before it does not have them.
    """
    body = {key: replayed.body[key] for key in replayed.body if key in recorded.body}
    if replayed.kind == recorded.kind == "run":
        config = recorded.body.get("config")
        if isinstance(config, str) and parse(config) == parse(str(body.get("config"))):
            body["config"] = config
    return msgspec.structs.replace(replayed, body=body)


def _counter(message: Message) -> int:
    """Return which of its sender's messages this is: ids are ``name/number``."""
    return int(message.id.rpartition("/")[2])


def _says(step: Step, name: str) -> bool:
    return any(isinstance(each, Post) and each.message.id == name for each in step.actions)
