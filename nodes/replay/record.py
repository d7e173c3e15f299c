"""What a recorded aggregator said, to hold against what its core says now.

A release may add fields to a message, to a checkpoint, and settings to a configuration: a
trace of the release before it does not have them, and what is said *more* now is not
compared. All that the trace does have must be said again, in the same order.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted, AnyEntry, Ended, Refusal
from fedmq.broker.wire.addresses import AGGREGATOR, BROKER, CHECKPOINT
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Message
from fedmq.nodes.errors import NodeError
from fedmq.nodes.messages.actions import AggregatorAction, Commit, EndRun, Handled, PostMessage
from fedmq.nodes.process.terminal import literal, plain
from fedmq.nodes.replay.tolerance import NAMES, counted_as_in, near_differences
from fedmq.nodes.trace.differ import Operand, differences
from fedmq.nodes.trace.differences import Difference

MAX_REASON = 2000
"""Of a refusal, as the ledger keeps it."""
_FACTS = ("client", "model_version", "version", "results", "reason", "token", "model_digest")
_ALWAYS = frozenset({"client", "groups", "model_digest", "model_version", "numbers", "version"})
"""Fields that no release does without: one that is missing was taken out."""


class Diverged(NodeError):
    """What the core says is not what was recorded; the message shows both, and where."""


class RecordedOutput:
    """The aggregator's part of a trace, met entry by entry.

    Args:
        trace: of the run.
        exact: whether numbers must be equal to the bit; if not, they may lie within the
            tolerance (`nodes.replay.tolerance`), and digests of models are not compared.

    Attributes:
        compared: how many actions were found as they were said.
        farthest: the largest distance between recorded and replayed tensors, in units of what
            is tolerated; 0 if all are equal.
        first: the first of the aggregator's own messages to expect; ids are ``name/number``.
        after: number of the last inbox message that the replay does not take.
    """

    def __init__(self, trace: Trace, *, exact: bool = True) -> None:
        self.exact = exact
        self.compared = 0
        self.farthest = 0.0
        self.first = 0
        self.after = -1
        self._trace = trace
        self._posts: deque[tuple[PostMessage, int]] = deque()
        self._commits: dict[str, tuple[PostMessage, int]] = {}
        """What is said at the end of work beside the inbox, between whatever else is said."""
        self._refusals: dict[int, tuple[str, str]] = {}
        """(code, reason) by the message's number."""
        self._refused: set[int] = set()
        self._finish: str | None = None

    @property
    def unfound(self) -> int:
        """Return how many messages were said and have not been met."""
        return len(self._posts)

    def expect(self, actions: Sequence[AggregatorAction], upon: int) -> None:
        """Note what the core says to message ``upon``; -1 is its start."""
        for action in actions:
            match action:
                case PostMessage():
                    self._posts.append((action, upon))
                case Commit(message=message):
                    self._commits[message.id] = (PostMessage(message), upon)
                case Handled(seq, refused, code) if refused:
                    self._refusals[seq] = code, refused[:MAX_REASON]
                case EndRun(reason):
                    self._finish = reason

    def expect_another_end(self) -> None:
        """Note that the core goes further than the end that it has come to."""
        self._finish = None

    def compare(self, entry: AnyEntry) -> None:
        """Hold one entry of the ledger against what the core has said.

        Raises:
            Diverged: it has not said that.
        """
        match entry:
            case Accepted():
                message = entry.read()
                if message.sender == AGGREGATOR and self._number(entry.seq, message) >= self.first:
                    self._compare_post(entry.seq, message)
            case Refusal(of=None, id=name, node=node):
                if self._posts and self._posts[0][0].message.id == name and node == BROKER:
                    self._posts.popleft()  # said, and not accepted
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
                "  an aggregator numbers its messages"
            )
        return int(number)

    def _compare_post(self, seq: int, message: Message) -> None:
        if message.id not in self._commits and not self._posts:
            raise Diverged(
                f"message {seq} differs\n  recorded: {describe(message)}\n"
                "  replayed: nothing more upon the messages before it"
            )
        if message.id in self._commits:
            post, upon = self._commits.pop(message.id)
        else:
            post, upon = self._posts.popleft()
        replayed = self._as_far_as_recorded(post, message)
        if encode_message(message) != encode_message(replayed):
            recorded = Operand(message, functools.partial(self._trace.blob, message))
            found = self._differences(recorded, Operand(replayed, post.data.__getitem__))
            if found:
                cause = f"message {upon}" if upon >= 0 else "its start"
                lines = [
                    f"message {seq} differs; it was said upon {cause}",
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
        self.farthest = max(self.farthest, distance)
        return found

    def _compare_refusal(self, recorded: Refusal, of: int) -> None:
        code, reason = self._refusals.get(of, ("", None))
        # Version 0.1.0 recorded no codes.
        # Sentences with numbers in them may differ where numbers do; codes decide then.
        exact = self.exact or not recorded.code
        if (recorded.code and recorded.code != code) or (exact and reason != recorded.reason):
            replayed = "not refused" if reason is None else f"refused: {_coded(reason, code)}"
            raise Diverged(
                f"entry {recorded.seq} differs: what became of message {of}\n"
                f"  recorded: refused: {_coded(recorded.reason, recorded.code)}\n"
                f"  replayed: {replayed}"
            )
        self._refused.add(of)
        self.compared += 1

    def _compare_end(self, seq: int, reason: str) -> None:
        """Check that a run which is over was over to the core, with everything said and met."""
        if self._finish != reason:
            replayed = "it goes on" if self._finish is None else plain(self._finish)
            raise Diverged(
                f"entry {seq} differs: the end of the run\n"
                f"  recorded: {plain(reason)}\n  replayed: {replayed}"
            )
        if self._posts:
            post, upon = self._posts[0]
            raise Diverged(
                f"entry {seq} ends the run, and something was not recorded\n"
                f"  replayed: {describe(post.message)}, upon message {upon}"
            )
        for of, (_, said) in self._refusals.items():
            if of not in self._refused:
                raise Diverged(
                    f"entry {seq} ends the run, and something was not recorded\n"
                    f"  replayed: message {of} refused: {plain(said)}"
                )
        self.compared += 1

    def _as_far_as_recorded(self, post: PostMessage, recorded: Message) -> Message:
        """Return what is said now, without what is said more than was recorded."""
        replayed = post.message
        full = replayed.body if self.exact else counted_as_in(recorded.body, replayed.body)
        body = _within(dict(full), recorded.body)
        opened = self._trace.opened.config
        if replayed.kind == recorded.kind == "run" and recorded.body.get("config") == opened:
            # The core's own configuration was made from this one, with every default.
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


def _coded(reason: str, code: str) -> str:
    return f"{plain(reason)} ({plain(code)})" if code else plain(reason)


def describe(message: Message) -> str:
    """Return a message in a few words, in which nothing can drive a terminal."""
    size = sum(blob.size for blob in message.blobs)
    facts = [f"{key} {literal(message.body[key], 60)}" for key in _FACTS if key in message.body]
    facts += [f"{size:,} bytes"] if size else []
    return ", ".join([f"{plain(message.kind)} {plain(message.id)} to {plain(message.to)}", *facts])


def _within(now: dict[Any, Any], recorded: dict[Any, Any]) -> dict[Any, Any]:
    """Return a map without the keys that a recorded one does not have, at any depth."""
    found = {}
    for key, value in now.items():
        if key in recorded:
            then = recorded[key]
            both = isinstance(value, dict) and isinstance(then, dict)
            found[key] = _within(value, then) if both else value
        elif key in _ALWAYS:
            found[key] = value
    return found
