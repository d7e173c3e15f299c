"""What one reading of a whole trace tells about each message, and who hosts whom meanwhile."""

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
"""Kinds, or names, that are kept: a flood of them must not fill the memory."""


class MessageOutcomes:
    """What became of the messages of a run; of most, nothing is kept in memory.

    Args:
        trace: is read once, up to its end or its damage.

    Attributes:
        refused: refusals of accepted messages, by the message's number.
        versions: how many versions were committed.
        places: who was there at the end.
        numbers: of the refused messages, by their ids.
        widths: the longest kind, path and id.
        entries: how many there are.
        kinds, senders: of all messages; of very many, the first.
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
        """Where the run ended and went further: (position of the last version, continuation)."""
        self._finished = False
        self.placement = places = ClientPlacement()
        for entry in before_damage(trace):
            self.entries += 1
            match entry:
                case Accepted():
                    message = entry.read()
                    places.feed(message)
                    if self.has_all_names:
                        self.kinds.add(message.kind)
                        self.senders.add(message.sender)
                    self.widths.feed(message, places.host_of(message.to) or "")
                    if message.sender == places.aggregator:
                        self._from_aggregator(message)
                    elif message.sender == BROKER and message.kind == CONTINUED:
                        self._continued(entry.seq, message)
                case Refusal(of=int(of)):
                    self.refused[of] = entry
                    self.numbers[entry.id] = of

    @property
    def has_all_names(self) -> bool:
        """Tell whether `kinds` and `senders` are complete."""
        return len(self.kinds) < _MOST and len(self.senders) < _MOST

    @property
    def versions(self) -> int:
        """Return the newest version."""
        return self._numbers[-1] if self._numbers else 0

    def version_at(self, seq: int) -> int:
        """Return the version that was current when a message of the inbox was folded."""
        found = bisect.bisect_left(self._positions, seq)
        return self._numbers[found - 1] if found else 0

    def staleness(self, seq: int, message: Message) -> int | None:
        """Return how many versions old the model of a result was; None if no version holds it."""
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
    """How wide the columns must be for all messages of a run."""

    kind: int = 0
    path: int = 0
    id: int = 0

    def feed(self, message: Message, host: str) -> None:
        """Take one more message, and the node that hosts its address."""
        self.kind = max(self.kind, len(message.kind))
        self.id = max(self.id, len(message.id))
        # The client's part of a result's path is about as long as that of its task.
        self.path = max(self.path, len(message.sender) + len(message.to) + len(host) + 5)


class ClientPlacement:
    """Who is there, as the broker has told it so far.

    Attributes:
        aggregator: name of the aggregator's node.
        roles: of every node that was ever there.
    """

    def __init__(self) -> None:
        self.aggregator = AGGREGATOR
        self.roles: dict[str, str] = {}
        self._here: set[str] = set()
        self._hosts: dict[str, str] = {}

    def feed(self, message: Message) -> None:
        """Take one more message; of most, there is nothing to learn."""
        if message.sender != BROKER or message.kind not in ("joined", "left", CONTINUED):
            return
        if message.kind == CONTINUED:  # all nodes have gone, too
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
        """Return the node that hosts an address now, or None."""
        node = self._hosts.get(address)
        return node if node in self._here else None


class TracedTask(NamedTuple):
    """A task or an evaluation that was asked for."""

    seq: int
    at: float
    to: str
    host: str | None
    """Who hosted its address then."""
    version: int | None

    @property
    def client(self) -> int | None:
        """Return the client that it is for."""
        return client_of(self.to)


class TracedTasks:
    """The tasks that are out, by id; an answer takes its task away."""

    def __init__(self) -> None:
        self.out: dict[str, TracedTask] = {}

    def feed(self, entry: Accepted, message: Message, places: ClientPlacement) -> TracedTask | None:
        """Take one more message; return the task that it is, or that it answers."""
        if message.sender == places.aggregator and message.kind in ("task", "evaluate"):
            version = natural(message.body.get("model_version"))
            host = places.host_of(message.to)
            task = TracedTask(entry.seq, entry.at, message.to, host, version)
            self.out[message.id] = task
            return task
        if message.kind in ("result", "failed", "score") and message.re is not None:
            return self.out.pop(message.re, None)
        return None


def before_damage(trace: Trace) -> Iterator[AnyEntry]:
    """Yield the entries of a run up to its end, or up to damage, which `Trace.damage` tells."""
    try:
        yield from trace.entries()
    except LedgerError as error:
        # It may have come, or been found, since the trace was opened.
        trace.damage = trace.damage or error


def client_of(address: str) -> int | None:
    """Return the client that an address names, or None."""
    kind, _, number = address.partition("/")
    return int(number) if kind == "client" and number.isascii() and number.isdecimal() else None
