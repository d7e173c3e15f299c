"""Compare the actions of a replayed aggregator with the record.

A release may add fields to messages and checkpoints, and settings to the configuration. Traces of
earlier releases lack them, so additional fields are not compared. Everything in the trace must be
repeated in the same order.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted, AnyEntry, Ended, Refusal
from fedmq.broker.link.events import PostMessage
from fedmq.broker.wire.addresses import AGGREGATOR, BROKER, CHECKPOINT
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Buffer, Message
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.errors import NodeError
from fedmq.nodes.messages.actions import Commit
from fedmq.nodes.process.terminal import literal, plain
from fedmq.nodes.replay.tolerance import NAMES, counted_as_in, near_differences
from fedmq.nodes.trace.differ import Operand, differences
from fedmq.nodes.trace.differences import Difference

MAX_REASON = 2000
"""Characters of a rejection's reason in the ledger, at most."""
_FACTS = ("client", "model_version", "version", "results", "reason", "token", "model_digest")
_ALWAYS = frozenset({"client", "groups", "model_digest", "model_version", "numbers", "version"})
"""Fields that every release records: if one is missing, the record was changed."""


class Diverged(NodeError):
    """An action differs from the record; the message shows where, and both values."""


class RecordedOutput:
    """The recorded output of an aggregator, compared entry by entry; an `AggregatorPort`.

    Args:
        trace: of the run.
        exact: whether numbers must be equal to the bit; if not, they must be within the
            tolerance (`nodes.replay.tolerance`), and model digests are not compared.
        same_release: whether this release of fedmq recorded the run; if not, rejections are
            compared by their codes.

    Attributes:
        compared: number of actions that match the record.
        max_distance: largest distance between recorded and replayed tensors, as a multiple of
            the tolerance; 0 if all are equal.
        first: number of the aggregator's first message to compare; ids are ``name/number``.
        after: number of the last inbox message before the replay.
        trigger: number of the message that the core has handled last; -1 at the start.
    """

    def __init__(self, trace: Trace, *, exact: bool = True, same_release: bool = True) -> None:
        self.exact = exact
        self._same_release = same_release
        self.compared = 0
        self.max_distance = 0.0
        self.first = 0
        self.after = self.trigger = -1
        self._trace = trace
        self._posts: deque[tuple[PostMessage, int]] = deque()
        self._commits: dict[str, tuple[PostMessage, int]] = {}
        """Messages of background commits: their position among the others is not fixed."""
        self._refusals: dict[int, tuple[str, str]] = {}
        """(code, reason) by the message's number."""
        self._refused: set[int] = set()
        self._finish: str | None = None

    @property
    def unmatched(self) -> int:
        """Return the number of replayed messages that are not in the record yet."""
        return len(self._posts)

    def post(
        self, message: Message, data: Sequence[Buffer] = (), consumes: tuple[int, ...] = ()
    ) -> None:
        """Expect a message in the record."""
        self._posts.append((PostMessage(message, tuple(data), consumes), self.trigger))

    def begin_commit(self, commit: Commit) -> None:
        """Expect the message that a commit posts when it is done."""
        self._commits[commit.message.id] = (PostMessage(commit.message), self.trigger)

    def done(
        self,
        seqs: Sequence[int],  # noqa: ARG002 - acknowledgments are not in the record
        refused: Mapping[int, str] | None = None,
        codes: Mapping[int, str] | None = None,
    ) -> None:
        """Expect rejections in the record."""
        for seq, reason in (refused or {}).items():
            self._refusals[seq] = (codes or {}).get(seq, ""), reason[:MAX_REASON]

    def over(self, reason: str) -> None:
        """Expect the end of the run."""
        self._finish = reason

    def log_failure(self, reason: str, error: Exception | None) -> None:
        """Do nothing: `over` has the reason."""

    def save_model(self, core: Aggregator) -> None:
        """Do nothing: the record has the model."""

    @property
    def ended(self) -> bool:
        """Return whether the replayed run has ended."""
        return self._finish is not None

    def expect_new_end(self) -> None:
        """Forget the end of the run: the run was extended."""
        self._finish = None

    def compare(self, entry: AnyEntry) -> None:
        """Compare one entry of the ledger with the actions of the core.

        Raises:
            Diverged: they differ.
        """
        match entry:
            case Accepted():
                message = entry.read()
                if message.sender == AGGREGATOR and self._number(entry.seq, message) >= self.first:
                    self._compare_post(entry.seq, message)
            case Refusal(of=None, id=name, node=node, sender=sender):
                own = node == BROKER and sender in ("", AGGREGATOR)  # others may forge an id
                if own and self._posts and self._posts[0][0].message.id == name:
                    self._posts.popleft()  # sent, but not accepted
                    self.compared += 1
            case Refusal(of=int(of), node=node) if node == AGGREGATOR:
                if of > self.after or of in self._refusals:
                    self._compare_refusal(entry, of)
            case Ended(seq=seq, reason=reason) if seq > self.after:
                self._compare_end(seq, reason)

    def _number(self, seq: int, message: Message) -> int:
        number = message.id.rpartition("/")[2]
        if not (number.isascii() and number.isdigit()):
            raise Diverged(
                f"message {seq} differs: its id is {literal(message.id)}\n"
                "  expected an id that ends in / and a number"
            )
        return int(number)

    def _compare_post(self, seq: int, message: Message) -> None:
        if message.id not in self._commits and not self._posts:
            raise Diverged(
                f"message {seq} differs\n  recorded: {describe(message)}\n  replayed: nothing more"
            )
        if message.id in self._commits:
            post, trigger = self._commits.pop(message.id)
        else:
            post, trigger = self._posts.popleft()
        replayed = self._as_far_as_recorded(post, message)
        if encode_message(message) != encode_message(replayed):
            recorded = Operand(message, functools.partial(self._trace.blob, message))
            found = self._differences(recorded, Operand(replayed, post.data.__getitem__))
            if found:
                lines = [
                    f"message {seq} differs; it was sent {_cause(trigger)}",
                    f"recorded: {describe(message)}",
                    f"replayed: {describe(replayed)}",
                    *map(str, found),
                ]
                raise Diverged("\n  ".join(lines))
        self.compared += 1

    def _differences(self, recorded: Operand, replayed: Operand) -> list[Difference]:
        if self.exact:
            return differences(recorded, replayed, names=NAMES, ignore=frozenset())
        found, distance = near_differences(recorded, replayed)
        self.max_distance = max(self.max_distance, distance)
        return found

    def _compare_refusal(self, recorded: Refusal, of: int) -> None:
        code, reason = self._refusals.get(of, ("", None))
        if not self._is_same(recorded, code, reason):
            replayed = "not rejected" if reason is None else f"rejected: {_coded(reason, code)}"
            raise Diverged(
                f"entry {recorded.seq} differs: the rejection of message {of}\n"
                f"  recorded: rejected: {_coded(recorded.reason, recorded.code)}\n"
                f"  replayed: {replayed}"
            )
        self._refused.add(of)
        self.compared += 1

    def _is_same(self, recorded: Refusal, code: str, reason: str | None) -> bool:
        if reason is None or (recorded.code and recorded.code != code):
            return False
        # Sentences differ between releases, and may contain numbers that differ within the
        # tolerance: then the codes decide. The sentences of 0.1.0, which has none, give them.
        by_code = not self.exact or not self._same_release
        return reason == recorded.reason or (by_code and code == recorded.known_code != "")

    def _compare_end(self, seq: int, recorded: str) -> None:
        """Compare the end of the run; by then the record must contain all actions."""
        if self._finish != recorded:
            replayed = "the run continues" if self._finish is None else plain(self._finish)
            raise Diverged(
                f"entry {seq} differs: the end of the run\n"
                f"  recorded: {plain(recorded)}\n  replayed: {replayed}"
            )
        if self._posts:
            post, trigger = self._posts[0]
            raise Diverged(
                f"entry {seq} ends the run, but an action is not in the record\n"
                f"  replayed: {describe(post.message)}, {_cause(trigger)}"
            )
        for of, (_, reason) in self._refusals.items():
            if of not in self._refused:
                raise Diverged(
                    f"entry {seq} ends the run, but an action is not in the record\n"
                    f"  replayed: message {of} rejected: {plain(reason)}"
                )
        self.compared += 1

    def _as_far_as_recorded(self, post: PostMessage, recorded: Message) -> Message:
        """Return the replayed message without the fields that the record lacks."""
        replayed = post.message
        full = replayed.body if self.exact else counted_as_in(recorded.body, replayed.body)
        body = _within(dict(full), recorded.body)
        opened = self._trace.opened.config
        if replayed.kind == recorded.kind == "run" and recorded.body.get("config") == opened:
            # The core's configuration is this one, with all defaults filled in.
            body["config"] = opened
        blobs = replayed.blobs
        if (
            replayed.to == recorded.to == CHECKPOINT
            and len(blobs) == len(recorded.blobs)
            and blobs[:-1] == recorded.blobs[:-1]
            and blobs[-1] != recorded.blobs[-1]
        ):
            before = msgspec.msgpack.decode(self._trace.blob(recorded, len(blobs) - 1))
            now = msgspec.msgpack.decode(post.data[-1])
            if isinstance(before, dict) and _within(now, before) == before:
                blobs = recorded.blobs
        return msgspec.structs.replace(replayed, body=body, blobs=blobs)


def _cause(trigger: int) -> str:
    return f"in response to message {trigger}" if trigger >= 0 else "at the start"


def _coded(reason: str, code: str) -> str:
    return f"{plain(reason)} ({plain(code)})" if code else plain(reason)


def describe(message: Message) -> str:
    """Return a short description of a message, without control characters."""
    size = sum(blob.size for blob in message.blobs)
    facts = [f"{key} {literal(message.body[key], 60)}" for key in _FACTS if key in message.body]
    facts += [f"{size:,} bytes"] if size else []
    return ", ".join([f"{plain(message.kind)} {plain(message.id)} to {plain(message.to)}", *facts])


def _within(now: dict[Any, Any], recorded: dict[Any, Any]) -> dict[Any, Any]:
    """Return a map without the keys that the recorded one lacks, at any depth."""
    found = {}
    for key, value in now.items():
        if key in recorded:
            then = recorded[key]
            both = isinstance(value, dict) and isinstance(then, dict)
            found[key] = _within(value, then) if both else value
        elif key in _ALWAYS:
            found[key] = value
    return found
