"""What one pass over a trace finds: its history, its rejections, and the widths of its columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedmq.broker.errors import LedgerError
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import AnyEntry, Refusal
from fedmq.broker.wire.schema import Message
from fedmq.nodes.history.run import RunHistory

_MOST = 10_000
"""Kinds, or names, that are kept at most, so that memory stays bounded."""


@dataclass
class Widths:
    """The widths that the columns need for all messages of a run."""

    kind: int = 0
    path: int = 0
    id: int = 0

    def feed(self, message: Message, host: str) -> None:
        """Process the next message; ``host`` is the node that hosts its address."""
        self.kind = max(self.kind, len(message.kind))
        self.id = max(self.id, len(message.id))
        # The path of a result is about as long as that of its task.
        self.path = max(self.path, len(message.sender) + len(message.to) + len(host) + 5)


class Overview:
    """A run up to its end or to damage, for a second pass that shows what happened later.

    Args:
        trace: read once.

    Attributes:
        history: of the run, at its end.
        rejections: of accepted messages, by the message's number.
        numbers: numbers of the rejected messages, by id.
        widths: the longest kind, path and id.
        kinds, senders: of all messages; at most the first 10,000.
    """

    def __init__(self, trace: Trace) -> None:
        self.history = RunHistory()
        self.rejections: dict[int, Refusal] = {}
        self.numbers: dict[str, int] = {}
        self.widths = Widths()
        self.kinds: set[str] = set()
        self.senders: set[str] = set()
        for entry in before_damage(trace):
            facts = self.history.feed(entry)
            if facts.message is not None:
                if self.has_all_names:
                    self.kinds.add(facts.message.kind)
                    self.senders.add(facts.message.sender)
                self.widths.feed(facts.message, facts.host or "")
            elif isinstance(entry, Refusal) and entry.of is not None:
                self.rejections[entry.of] = entry
                self.numbers[entry.id] = entry.of

    @property
    def has_all_names(self) -> bool:
        """Return whether `kinds` and `senders` are complete."""
        return len(self.kinds) < _MOST and len(self.senders) < _MOST


def before_damage(trace: Trace) -> Iterator[AnyEntry]:
    """Yield the entries of a run up to its end or to damage, which is then in `Trace.damage`."""
    try:
        yield from trace.entries()
    except LedgerError as error:
        # The damage may be newer than the opened trace.
        trace.damage = trace.damage or error
