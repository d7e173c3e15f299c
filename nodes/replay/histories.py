"""Who answered which task of a recorded run, and from which state of its client each started.

A client may move from host to host. A result says after which task its client's state had been
kept (``after``; empty: it had none). So a new host that found the state, in a folder that both
shared, is told from one that started afresh. Traces of older releases do not say: there, a
client's results follow each other in the order of the ledger.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fedmq.broker.errors import LedgerError
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.wire.addresses import BROKER
from fedmq.broker.wire.schema import Message
from fedmq.nodes.process.terminal import plain


@dataclass(frozen=True)
class Answer:
    """A task and what a node made of it.

    task, seq: id of the task, and its number.
    result: number of the result or score; None if the trace has none, though a later result
        started from the state that was kept with it.
    client: whose task it is; None for an evaluation on the problem's test data.
    start: which answer left the state that this one started from; None if it had none.
    says: whether the trace says so; if not, it is taken to be the client's last result.
    """

    node: str
    task: str
    seq: int
    result: int | None
    client: int | None
    start: int | None
    says: bool


@dataclass
class Histories:
    """The answers of all nodes, in the order of the ledger; ``start`` counts in them.

    clients: ranges of clients by the node that hosted them.
    """

    answers: list[Answer] = field(default_factory=list)
    clients: defaultdict[str, list[tuple[int, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    _tasks: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    """Number and client of each task."""
    _last: dict[int, int] = field(default_factory=dict)
    """The newest answer with a result of each client;"""
    _of_task: defaultdict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    """and of each task, by node."""

    def of(self, node: str) -> list[int]:
        """Return which answers are a node's, in order.

        Raises:
            LedgerError: it has none.
        """
        found = [
            index
            for index, each in enumerate(self.answers)
            if each.node == node and each.result is not None
        ]
        if not found:
            nodes = ", ".join(map(plain, dict.fromkeys(each.node for each in self.answers)))
            raise LedgerError(f"--worker: expected a node with results ({nodes}), got {node!r}")
        return found

    def behind(self, wanted: Iterable[int]) -> list[int]:
        """Return these answers and all that their states follow from, in order."""
        found: set[int] = set()
        for index in wanted:
            each: int | None = index
            while each is not None and each not in found:
                found.add(each)
                each = self.answers[each].start
        return sorted(found)

    def add(self, seq: int, message: Message) -> None:
        """Take the next message of the trace."""
        if message.kind in ("task", "evaluate"):
            client = message.body.get("client")
            self._tasks[message.id] = seq, client if isinstance(client, int) else None
        elif message.kind == "joined" and message.sender == BROKER:
            body = message.body
            self.clients[body["node"]] += [(low, high) for low, high in body["clients"]]
        elif message.kind in ("result", "score") and message.re in self._tasks:
            self._answered(seq, message, message.re)

    def _answered(self, seq: int, message: Message, task: str) -> None:
        number, client = self._tasks[task]
        after, start = message.body.get("after"), None
        says = isinstance(after, str)
        if client is not None and isinstance(after, str):
            start = self._state(message.sender, client, after)
        elif client is not None:
            start = self._last.get(client)
        answer = Answer(message.sender, task, number, seq, client, start, says)
        self.answers.append(answer)
        if message.kind == "result":
            self._kept(answer)

    def _kept(self, answer: Answer) -> None:
        index = len(self.answers) - 1
        self._of_task[answer.task][answer.node] = index
        if answer.client is not None:
            self._last[answer.client] = index

    def _state(self, node: str, client: int, after: str) -> int | None:
        """Return which answer left the state that a node had of a client after a task."""
        number, whose = self._tasks.get(after, (0, None))
        if whose != client:
            return None
        by_node = self._of_task[after]
        if node in by_node:
            return by_node[node]
        if by_node:
            return max(by_node.values())  # it came with the client, from its last host
        # It was kept, and its node ended before the result was in the ledger.
        last = self._last.get(client)
        self.answers.append(Answer(node, after, number, None, client, last, says=False))
        self._kept(self.answers[-1])
        return len(self.answers) - 1


def read_histories(trace: Trace) -> Histories:
    """Collect what the nodes of a run hosted and answered, up to damage if there is some."""
    found = Histories()
    with contextlib.suppress(LedgerError):
        for entry in trace.entries():
            if isinstance(entry, Accepted):
                found.add(entry.seq, entry.read())
    return found


def last_uses(answers: Sequence[Answer], needed: Iterable[int]) -> dict[int, int]:
    """Return, for each answer whose state is needed, which answer needs it last."""
    found: dict[int, int] = {}
    for index in needed:
        start = answers[index].start
        if start is not None:
            found[start] = index
    return found
