"""Which node answered which task of a recorded run, and from which client state each started.

A client may move from host to host. A result names the task after which its client's state was
saved (``after``; empty: no state). This distinguishes a new host that found the state, in a shared
folder, from one that started without. Traces of older releases lack the field: there, each result
of a client starts from its previous one in the ledger.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fedmq.broker.errors import LedgerError
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.wire.addresses import BROKER
from fedmq.broker.wire.schema import Message
from fedmq.nodes.history.facts import Facts, SentTask
from fedmq.nodes.history.tracker import TaskTracker
from fedmq.nodes.process.terminal import plain


@dataclass(frozen=True)
class Answer:
    """A node's answer to a task.

    task, seq: id and number of the task.
    result: number of the result or score; None if the trace lacks it, although a later result
        started from the state saved with it.
    client: of the task; None for an evaluation on the problem's test data.
    start: index of the answer whose saved state this one started from; None if there was none.
    start_recorded: whether the trace contains ``start``; if not, it is the client's last result.
    """

    node: str
    task: str
    seq: int
    result: int | None
    client: int | None
    start: int | None
    start_recorded: bool


@dataclass
class Histories:
    """The answers of all nodes.

    answers: in the order of the ledger; `Answer.start` is an index into them.
    clients: ranges of clients by the node that hosted them.
    """

    answers: list[Answer] = field(default_factory=list)
    clients: defaultdict[str, list[tuple[int, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    _tasks: dict[str, SentTask] = field(default_factory=dict)
    """All tasks and evaluations by id."""
    _last: dict[int, int] = field(default_factory=dict)
    """Index of the newest answer of each client."""
    _of_task: defaultdict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    """Indices of the answers to each task, by node."""

    def of(self, node: str) -> list[int]:
        """Return the indices of a node's answers that have results, in order.

        Raises:
            LedgerError: the node has none.
        """
        found = [
            index
            for index, each in enumerate(self.answers)
            if each.node == node and each.result is not None
        ]
        if not found:
            nodes = ", ".join(map(plain, sorted({each.node for each in self.answers})))
            raise LedgerError(f"--worker: expected a node with results ({nodes}), got {node!r}")
        return found

    def with_predecessors(self, wanted: Iterable[int]) -> list[int]:
        """Return these answers and all whose states they depend on, in order."""
        found: set[int] = set()
        for index in wanted:
            each: int | None = index
            while each is not None and each not in found:
                found.add(each)
                each = self.answers[each].start
        return sorted(found)

    def add(self, facts: Facts) -> None:
        """Process the next entry of the trace."""
        message = facts.message
        if message is None:
            return
        if facts.task is not None and not facts.is_answer:
            self._tasks[message.id] = facts.task
        elif message.kind == "joined" and message.sender == BROKER:
            body = message.body
            self.clients[body["node"]] += [(low, high) for low, high in body["clients"]]
        elif message.kind in ("result", "score") and message.re in self._tasks:
            self._add_answer(facts.entry.seq, message, message.re)

    def _add_answer(self, seq: int, message: Message, name: str) -> None:
        task = self._tasks[name]
        client = task.client
        after, start = message.body.get("after"), None
        if client is not None and isinstance(after, str):
            start = self._state(message.sender, client, after)
        elif client is not None:
            start = self._last.get(client)
        answer = Answer(message.sender, name, task.seq, seq, client, start, isinstance(after, str))
        self.answers.append(answer)
        if message.kind == "result":
            self._note_saved(answer)

    def _note_saved(self, answer: Answer) -> None:
        index = len(self.answers) - 1
        self._of_task[answer.task][answer.node] = index
        if answer.client is not None:
            self._last[answer.client] = index

    def _state(self, node: str, client: int, after: str) -> int | None:
        """Return the index of the answer that saved a node's state of a client after a task."""
        task = self._tasks.get(after)
        if task is None or task.client != client:
            return None
        by_node = self._of_task[after]
        if node in by_node:
            return by_node[node]
        if by_node:
            return max(by_node.values())  # the client brought it from its last host
        # The node saved it, but ended before its result was in the ledger.
        last = self._last.get(client)
        self.answers.append(Answer(node, after, task.seq, None, client, last, start_recorded=False))
        self._note_saved(self.answers[-1])
        return len(self.answers) - 1


def read_histories(trace: Trace) -> Histories:
    """Return what the nodes of a run hosted and answered, up to damage."""
    found, tracker = Histories(), TaskTracker()
    with contextlib.suppress(LedgerError):
        for entry in trace.entries():
            found.add(tracker.feed(entry))
    return found


def last_uses(answers: Sequence[Answer], needed: Iterable[int]) -> dict[int, int]:
    """Return the last answer that needs the state of each answer."""
    found: dict[int, int] = {}
    for index in needed:
        start = answers[index].start
        if start is not None:
            found[start] = index
    return found
