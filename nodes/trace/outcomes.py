"""Outcomes of messages, and which node hosts which client, from one pass over a trace."""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fedmq.broker.errors import LedgerError
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted, AnyEntry, Refusal
from fedmq.broker.wire.addresses import AGGREGATOR, BROKER, CONTINUED, EVALUATOR, WORKER
from fedmq.broker.wire.schema import Message
from fedmq.nodes.run_folder.outcomes import natural

_MOST = 10_000
"""Kinds, or names, that are kept at most, so that memory stays bounded."""


class MessageOutcomes:
    """Outcomes of the messages of a run; memory is needed only for rejections and versions.

    Args:
        trace: read once, up to its end or to damage.

    Attributes:
        refused: rejections of accepted messages, by the message's number.
        placement: of clients and nodes at the end.
        numbers: numbers of the rejected messages, by id.
        widths: the longest kind, path and id.
        entries: number of entries.
        kinds, senders: of all messages; at most the first 10,000.
    """

    def __init__(self, trace: Trace) -> None:
        self.refused: dict[int, Refusal] = {}
        self.numbers: dict[str, int] = {}
        self.entries = 0
        self.widths = Widths()
        self.kinds: set[str] = set()
        self.senders: set[str] = set()
        self._positions = array("q")
        self._numbers = array("q")
        self._ends: list[tuple[int, int]] = []
        """Where the run ended and was extended: (position of the last version, continuation)."""
        self._finished = False
        self.placement = placement = ClientPlacement()
        for entry in before_damage(trace):
            self.entries += 1
            match entry:
                case Accepted():
                    message = entry.read()
                    placement.feed(message)
                    if self.has_all_names:
                        self.kinds.add(message.kind)
                        self.senders.add(message.sender)
                    self.widths.feed(message, placement.host_of(message.to) or "")
                    if message.sender == placement.aggregator:
                        self._from_aggregator(message)
                    elif message.sender == BROKER and message.kind == CONTINUED:
                        self._continued(entry.seq, message)
                case Refusal(of=int(of)):
                    self.refused[of] = entry
                    self.numbers[entry.id] = of

    @property
    def has_all_names(self) -> bool:
        """Return whether `kinds` and `senders` are complete."""
        return len(self.kinds) < _MOST and len(self.senders) < _MOST

    @property
    def versions(self) -> int:
        """Return the newest version."""
        return self._numbers[-1] if self._numbers else 0

    def version_at(self, seq: int) -> int:
        """Return the version that was current when the aggregator processed a message."""
        found = bisect.bisect_left(self._positions, seq)
        return self._numbers[found - 1] if found else 0

    def staleness(self, seq: int, message: Message) -> int | None:
        """Return the staleness of a result in versions; None if no version contains it."""
        base = natural(message.body.get("model_version"))
        if message.kind != "result" or seq in self.refused or base is None:
            return None
        if not self._positions or seq > self._positions[-1]:
            return None
        if any(last < seq < continued for last, continued in self._ends):
            return None
        return self.version_at(seq) - base

    def _continued(self, seq: int, message: Message) -> None:
        if self._finished and message.body.get("further"):
            self._finished = False
            self._ends.append((self._positions[-1] if self._positions else -1, seq))

    def _from_aggregator(self, message: Message) -> None:
        self._finished |= message.kind == "finished"
        if message.kind == "version":
            number = natural(message.body.get("version"))
            position = natural(message.body.get("position"))
            if number is not None and position is not None:
                self._numbers.append(number)
                self._positions.append(position)


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


class ClientPlacement:
    """Which nodes are connected and which clients they host, from the broker's messages.

    Attributes:
        aggregator: name of the aggregator's node.
        roles: of all nodes that have ever joined.
    """

    def __init__(self) -> None:
        self.aggregator = AGGREGATOR
        self.roles: dict[str, str] = {}
        self._here: set[str] = set()
        self._hosts: dict[str, str] = {}

    def feed(self, message: Message) -> None:
        """Process the next message."""
        if message.sender != BROKER or message.kind not in ("joined", "left", CONTINUED):
            return
        if message.kind == CONTINUED:  # all nodes have left
            self._here.clear()
            return
        match message.body:
            case {"node": str(node), "role": str(role), "clients": list(ranges)}:
                self._here.add(node)
                self.roles[node] = role
                self._hosts[f"node/{node}"] = node
                if role == AGGREGATOR:
                    self.aggregator = node
                if role in (AGGREGATOR, EVALUATOR):
                    self._hosts[role] = node
                elif role == WORKER:
                    for low, high in ranges:
                        hosted = [f"client/{client}" for client in range(low, high + 1)]
                        self._hosts |= dict.fromkeys(hosted, node)
            case {"node": str(node)}:
                self._here.discard(node)

    def host_of(self, address: str) -> str | None:
        """Return the connected node that hosts an address, or None."""
        node = self._hosts.get(address)
        return node if node in self._here else None


class TracedTask(NamedTuple):
    """A task or an evaluation."""

    seq: int
    at: float
    to: str
    host: str | None
    """The node that hosted its address when it was sent."""
    version: int | None

    @property
    def client(self) -> int | None:
        """Return its client."""
        return client_of(self.to)


class TracedTasks:
    """The tasks in flight, by id; an answer removes its task."""

    def __init__(self) -> None:
        self.in_flight: dict[str, TracedTask] = {}

    def feed(
        self, entry: Accepted, message: Message, placement: ClientPlacement
    ) -> TracedTask | None:
        """Process the next message; return the task that it is, or that it answers."""
        if message.sender == placement.aggregator and message.kind in ("task", "evaluate"):
            version = natural(message.body.get("model_version"))
            host = placement.host_of(message.to)
            task = TracedTask(entry.seq, entry.at, message.to, host, version)
            self.in_flight[message.id] = task
            return task
        if message.kind in ("result", "failed", "score") and message.re is not None:
            return self.in_flight.pop(message.re, None)
        return None


def before_damage(trace: Trace) -> Iterator[AnyEntry]:
    """Yield the entries of a run up to its end or to damage, which is then in `Trace.damage`."""
    try:
        yield from trace.entries()
    except LedgerError as error:
        # The damage may be newer than the opened trace.
        trace.damage = trace.damage or error


def client_of(address: str) -> int | None:
    """Return the client that an address names, or None."""
    kind, _, number = address.partition("/")
    return int(number) if kind == "client" and number.isascii() and number.isdecimal() else None
