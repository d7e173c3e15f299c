"""``fedmq trace export --perfetto``: a timeline in the Chrome trace event format.

Perfetto (https://ui.perfetto.dev) opens it. Each node is a process with one lane of spans.
Times are those at which the broker recorded a message, in microseconds since the run's start;
the length of a training is what its worker measured. Spans of a lane do not overlap: the later
one starts when the earlier one ends. Each is at least 1 us long, so that an arrow can end in it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import AnyEntry, Refusal
from fedmq.broker.wire.addresses import BROKER, CONTINUED
from fedmq.broker.wire.schema import Message
from fedmq.nodes.history.facts import SentTask, natural
from fedmq.nodes.history.tracker import TaskTracker
from fedmq.nodes.process.terminal import word
from fedmq.nodes.trace.bodies import shown_body
from fedmq.nodes.trace.export import to_json
from fedmq.nodes.trace.listing import rejection_verb
from fedmq.nodes.trace.overview import Overview, before_damage

Event = dict[str, Any]

_SPANS = {"result": "train", "failed": "failed", "score": "evaluate"}


def timeline(trace: Trace, overview: Overview) -> Iterator[str]:
    """Yield the text of a JSON file in parts, up to the trace's end or to damage."""
    yield '{"displayTimeUnit": "ms", "traceEvents": [\n'
    separator = ""
    for event in events(trace, overview):
        yield separator + to_json(event)
        separator = ",\n"
    yield "\n]}\n"


def events(trace: Trace, overview: Overview) -> Iterator[Event]:
    """Yield the events of a run's timeline, in order within each lane."""
    drawing = _Drawing(trace.opened.at, overview)
    for entry in before_damage(trace):
        yield from drawing.feed(entry)
    yield from drawing.finish()


class _Versions:
    """The aggregator's lane: spans without gaps, from the run's start to its end.

    A span ends when its version is committed, and after every arrow in it.

    Attributes:
        start: of the open span, in us.
        name: of the open span.
        waiting: whether no task has been sent yet.
    """

    def __init__(self) -> None:
        self.start = 0
        self.name = "waiting for clients"
        self.waiting = True
        self._last = 0

    def bind(self, at: int) -> int:
        """Return a time in the open span at which an arrow can start or end."""
        self._last = max(self._last, at, self.start)
        return max(at, self.start)

    def close(self, at: int, name: str) -> tuple[str, int, int]:
        """End the open span and start another; return name, start and end of the ended one."""
        ended = (self.name, self.start, max(at, self.start + 1, self._last + 1))
        self.name, self.start = name, ended[2]
        self._last = self.start
        self.waiting = False
        return ended


class _Drawing:
    def __init__(self, start: float, overview: Overview) -> None:
        self._start, self._overview = start, overview
        self._tracker = TaskTracker()
        self._versions = _Versions()
        self._ends: dict[str, int] = {}
        """End of the last span of each lane, in us."""
        self._sent: dict[int, int] = {}
        """Times of tasks in flight on the aggregator's lane, in us, by the task's number."""
        nodes, first = overview.history.nodes, overview.history.tracker.placement.aggregator
        others = sorted(name for name in nodes if nodes[name].sessions and name != first)
        self._order = {node: index for index, node in enumerate([first, *others])}
        self._processes: dict[str, int] = {}
        self._now = 0

    def feed(self, entry: AnyEntry) -> Iterator[Event]:
        """Process the next entry."""
        self._now = max(self._now, round(1e6 * (entry.at - self._start)))
        facts = self._tracker.feed(entry)
        message, task = facts.message, facts.task
        if message is not None:
            if message.sender == self._aggregator:
                yield from self._from_aggregator(entry, message, task)
            elif message.sender == BROKER:
                yield from self._from_broker(message)
            elif task is not None:
                yield from self._answer(entry, message, task)
        elif isinstance(entry, Refusal):
            args = {"by": entry.node, "message": entry.id, "reason": entry.reason}
            yield from self._instant(rejection_verb(entry), args)

    def finish(self) -> Iterator[Event]:
        """End the last span and the unanswered tasks."""
        without_answer = self._tracker.unanswered | self._tracker.withdrawn
        for name, task in sorted(without_answer.items(), key=lambda item: item[1].seq):
            # If no node hosts its client, it waits on the aggregator's lane.
            node = task.host or self._aggregator
            times = (self._sent[task.seq], self._now)
            args = {"task": name, "entry": task.seq}
            yield from self._wait(node, task, times, "unanswered", args)
        yield from self._close(self._now, "", {})

    @property
    def _aggregator(self) -> str:
        return self._tracker.placement.aggregator

    # ---- entries

    def _from_aggregator(
        self, entry: AnyEntry, message: Message, task: SentTask | None
    ) -> Iterator[Event]:
        if task is not None:
            if self._versions.waiting:
                yield from self._close(self._now, "version 1", {})
            self._sent[entry.seq] = self._versions.bind(self._now)
        elif message.kind == "version":
            number = natural(message.body.get("version"))
            keys = ("results", "late", "cohort", "mean_staleness", "max_staleness", "model_digest")
            args = {"entry": entry.seq} | {key: message.body.get(key) for key in keys}
            more = number is not None and number < self._overview.history.version
            following = f"version {(number or 0) + 1}" if more else f"after version {number}"
            yield from self._close(self._now, following, args)
        elif message.kind in ("timer", "finished"):
            args = {key: each for key, each in message.body.items() if key != "groups"}
            yield from self._instant(message.kind, args)

    def _from_broker(self, message: Message) -> Iterator[Event]:
        if message.kind in ("joined", "left"):
            args = dict(shown_body(message))
            yield from self._instant(f"{message.body.get('node')} {message.kind}", args)
        elif message.kind == CONTINUED:
            yield from self._instant("resumed", {})
        elif message.kind == "tick":
            yield from self._instant(f"tick {message.body.get('token')}", {})

    def _answer(self, entry: AnyEntry, message: Message, task: SentTask) -> Iterator[Event]:
        """Yield a span on the lane of the answering node, and the arrows to and from it."""
        node, name = message.sender, message.re or ""
        sent = self._sent.pop(task.seq)
        free = max(sent, self._ends.get(node, 0))
        start, end = free, max(self._now, free + 1)
        elapsed = message.body.get("elapsed_s")
        if isinstance(elapsed, int | float) and 0 <= elapsed < 1e9:
            start = max(free, min(end - round(1e6 * elapsed), end - 1))
        self._ends[node] = end
        args = {"task": name, "entry": entry.seq, "answers": task.seq, "version": task.version}
        args |= self._about(entry, message, task)
        what = _SPANS[message.kind]
        subject = f"client {task.client}" if task.client is not None else f"version {task.version}"
        pid = yield from self._lane(node)
        span = {"ph": "X", "cat": what, "name": f"{what} {subject}", "pid": pid, "tid": 1}
        yield {**span, "ts": start, "dur": end - start, "args": args}
        waits = {"task": name, "entry": task.seq}
        yield from self._wait(node, task, (sent, start), "waiting", waits)
        arrived = self._versions.bind(max(self._now, end - 1))
        yield from self._arrow("task", task.seq, (self._aggregator, sent), (node, start))
        there = (self._aggregator, arrived)
        yield from self._arrow(message.kind, entry.seq, (node, end - 1), there)
        if message.kind == "score":
            yield from self._counters(message.body.get("metrics"), arrived)

    def _about(self, entry: AnyEntry, message: Message, task: SentTask) -> Event:
        body = message.body
        if message.kind != "result":
            return {key: body[key] for key in ("metrics", "reason") if key in body}
        outcomes = self._overview.history.outcomes
        refusal = self._overview.rejections.get(entry.seq)
        found: Event = {
            "client": task.client,
            "staleness": outcomes.staleness_at(entry.seq, task.version or 0),
            "elapsed_s": body.get("elapsed_s"),
            "numbers": body.get("numbers"),
        }
        return found if refusal is None else {**found, "refused": refusal.reason}

    # ---- events

    def _lane(self, node: str) -> Generator[Event, None, int]:
        """Return the process of a node; yield its name the first time."""
        pid = self._processes.get(node)
        if pid is None:
            pid = self._processes[node] = len(self._processes) + 1
            for what, args in (
                ("process_name", {"name": word(node)}),
                ("process_sort_index", {"sort_index": self._order.get(node, len(self._order))}),
                ("thread_name", {"name": word(node)}),
            ):
                yield {"ph": "M", "name": what, "pid": pid, "tid": 1, "args": args}
        return pid

    def _close(self, at: int, following: str, args: Mapping[str, Any]) -> Iterator[Event]:
        name, start, end = self._versions.close(at, following)
        pid = yield from self._lane(self._aggregator)
        span = {"ph": "X", "cat": "version", "name": name, "pid": pid, "tid": 1}
        yield {**span, "ts": start, "dur": end - start, "args": args}

    def _instant(self, name: str, args: Mapping[str, Any]) -> Iterator[Event]:
        pid = yield from self._lane(self._aggregator)
        at = self._versions.bind(self._now)
        yield {"ph": "i", "s": "t", "name": name, "pid": pid, "tid": 1, "ts": at, "args": args}

    def _wait(
        self, node: str, task: SentTask, times: tuple[int, int], name: str, args: Event
    ) -> Iterator[Event]:
        """Yield the time of a task between acceptance and start, in transit or in a queue.

        Many tasks wait at once, so these are asynchronous spans beside the node's lane.
        """
        pid = yield from self._lane(node)
        both = {"cat": "task", "name": name, "pid": pid, "tid": 1, "id": task.seq}
        yield {**both, "ph": "b", "ts": times[0], "args": args}
        yield {**both, "ph": "e", "ts": max(times)}

    def _arrow(
        self, name: str, number: int, start: tuple[str, int], end: tuple[str, int]
    ) -> Iterator[Event]:
        """Yield an arrow from one span to another; each end lies within a span."""
        for phase, (node, at) in (("s", start), ("f", end)):
            pid = yield from self._lane(node)
            event: Event = {"ph": phase, "cat": "message", "name": name, "id": number}
            event |= {"pid": pid, "tid": 1, "ts": at}
            yield {**event, "bp": "e"} if phase == "f" else event

    def _counters(self, metrics: Any, at: int) -> Iterator[Event]:
        for name in ("accuracy", "loss"):
            value = metrics.get(name) if isinstance(metrics, dict) else None
            if isinstance(value, float) and value == value and abs(value) < 1e300:
                pid = yield from self._lane(self._aggregator)
                args = {name: value}
                yield {"ph": "C", "name": name, "pid": pid, "tid": 1, "ts": at, "args": args}
