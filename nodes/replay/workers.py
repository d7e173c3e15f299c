"""A worker's tasks, trained again from their recorded inputs and held against its results.

All that a task's result depends on is in the ledger and the configuration: the task, the
client's data, seeds derived from their names. What a client keeps from task to task follows
from its tasks in their order. On the same kind of device the result has the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmq.algorithms.base import Payload
from fedmq.broker.entries import Accepted
from fedmq.broker.errors import LedgerError
from fedmq.broker.state import BROKER
from fedmq.broker.trace import Trace
from fedmq.broker.wire import Buffer, Message
from fedmq.codecs.errors import CodecError
from fedmq.nodes.inbox import Post
from fedmq.nodes.local import Locals
from fedmq.nodes.payload import unpack
from fedmq.nodes.replay.fold import accepted_entry, inbound
from fedmq.nodes.setup import Setup, choose_device, kind_of
from fedmq.nodes.trace.differ import Side, differences
from fedmq.nodes.trace.text import plain
from fedmq.nodes.worker import Evaluate, Evaluated, Keep, Saved, Train, Trained, Worker

TOLERANCE = 1e-3
"""How far results may lie apart between kinds of devices: |a - b| / |a|, over all weights;
and metrics, each."""
_COMPUTED = ("weights ", "body.metrics.")
"""Beginnings of what the differ says of numbers that depend on the device."""
_HONEST = frozenset({"body.elapsed_s", "body.device"})
"""What differs between two trainings of one task."""


@dataclass(frozen=True)
class Retrained:
    """One task, trained or evaluated again.

    task, result: numbers of both messages.
    differences: what is not as it was recorded; empty if nothing. On another kind of device,
        numbers within the tolerance are not among them.
    apart: on another kind of device, how far those lie apart, relatively; else None.
    """

    task: int
    result: int
    message: Message
    seconds: float
    differences: list[str]
    apart: float | None = None

    @property
    def same(self) -> bool:
        """Tell whether the result is what was recorded, as far as the device allows."""
        return not self.differences


@dataclass
class _Recorded:
    """What a trace tells of one worker."""

    clients: list[tuple[int, int]] = field(default_factory=list)
    tasks: dict[str, int] = field(default_factory=dict)
    answers: list[tuple[str, int]] = field(default_factory=list)
    """(id of the task, number of its result), in order."""


class Retraining:
    """A worker (or the evaluator) of a recorded run.

    Args:
        trace: of the run.
        setup: what is learned, and how.
        node: its name.

    Raises:
        LedgerError: no such node has answered a task in this run.
    """

    def __init__(self, trace: Trace, setup: Setup, node: str) -> None:
        self._trace, self._setup, self._node = trace, setup, node
        self._device = choose_device(setup.config.worker.device)
        self._recorded = _read(trace, node)
        self._locals = Locals()
        self._core = Worker(setup, trace.run, node, self._recorded.clients, self._locals)

    def all(self) -> Iterator[Retrained]:
        """Train every task that has a result, in order."""
        for task, result in self._recorded.answers:
            yield self._again(task, result)

    def one(self, name: str) -> Retrained:
        """Train one task; those before it as well, if the client keeps something from them.

        Raises:
            LedgerError: the worker has no result of this task.
        """
        answers = dict(self._recorded.answers)
        if name not in answers:
            some = ", ".join(list(answers)[:5])
            raise LedgerError(
                f"--task: expected a task that {self._node} has a result of ({some}, ...), "
                f"got {name!r}"
            )
        client = self._client(name)
        before = [each for each in answers if self._client(each) == client]
        for each in before[: before.index(name)]:
            self._again(each, answers[each])
            if client is None or self._locals.get(client) is None:
                break  # nothing is kept: what was trained before does not matter
        return self._again(name, answers[name])

    def _client(self, task: str) -> int | None:
        message = accepted_entry(self._trace, self._recorded.tasks[task]).read()
        client = message.body.get("client")
        return client if isinstance(client, int) else None

    def _again(self, name: str, seq: int) -> Retrained:
        """Give the core a task, carry out what it asks for, and look at its answer."""
        task = self._recorded.tasks[name]
        began = time.perf_counter()
        actions = list(self._core.handle(inbound(self._trace, accepted_entry(self._trace, task))))
        answer: Post | None = None
        while actions:
            match actions.pop(0):
                case Train(task=work) as train:
                    place = train.at(self._setup.problem, self._device)
                    payload, kept = self._setup.algorithm.train(work, place)
                    actions += self._core.handle(Trained(payload, kept, 0.0, kind_of(self._device)))
                case Evaluate() as evaluate:
                    metrics = evaluate.metrics(self._setup, self._device)
                    actions += self._core.handle(Evaluated(metrics, kind_of(self._device)))
                case Keep(client, state):
                    actions += self._core.handle(Saved(self._locals.put(client, state)))
                case Post() as post:
                    answer = post
        seconds = time.perf_counter() - began
        if answer is None:
            raise LedgerError(f"task {name} cannot be read by a worker")
        return self._compare(task, seq, answer, seconds)

    def _compare(self, task: int, seq: int, answer: Post, seconds: float) -> Retrained:
        message = accepted_entry(self._trace, seq).read()
        read = functools.partial(self._trace.blob, message)
        found = differences(
            Side(message, read),
            Side(answer.message, answer.data.__getitem__),
            names=("the record", "the replay"),
            ignore=_HONEST,
        )
        apart = None
        device = message.body.get("device")
        if found and device and device != answer.message.body["device"]:
            apart = _distance(message, read, answer)
            if apart <= TOLERANCE:
                found = [each for each in found if not each.startswith(_COMPUTED)]
        return Retrained(task, seq, message, seconds, found, apart)


def _read(trace: Trace, node: str) -> _Recorded:
    """Collect what a node hosted, was asked and has answered, up to damage if there is some."""
    found = _Recorded()
    tasks: dict[str, int] = {}
    answered: dict[str, None] = {}
    with contextlib.suppress(LedgerError):
        for entry in trace.entries():
            if not isinstance(entry, Accepted):
                continue
            message = entry.read()
            if message.kind in ("task", "evaluate"):
                tasks[message.id] = entry.seq
            elif message.kind == "joined" and message.sender == BROKER:
                if message.body.get("node") == node:
                    found.clients += [(low, high) for low, high in message.body["clients"]]
            elif message.kind in ("result", "score") and message.re in tasks:
                answered[message.sender] = None
                if message.sender == node:
                    found.tasks[message.re] = tasks[message.re]
                    found.answers.append((message.re, entry.seq))
    if not found.answers:
        names = ", ".join(map(plain, answered))
        raise LedgerError(f"--worker: expected a node with results ({names}), got {node!r}")
    return found


def _distance(message: Message, read: Callable[[int], Buffer], answer: Post) -> float:
    """Return how far the computed numbers of two answers lie apart; infinity: not comparable."""
    if message.kind == "score":
        ours, theirs = message.body.get("metrics"), answer.message.body["metrics"]
        if not isinstance(ours, dict) or ours.keys() != theirs.keys():
            return math.inf
        return max((_apart(ours[name], theirs[name]) for name in theirs), default=0.0)
    try:
        a = _flat(unpack(message, read))
    except CodecError:
        return math.inf
    b = _flat(unpack(answer.message, answer.data.__getitem__))
    if a.shape != b.shape:
        return math.inf
    return float((a - b).norm() / a.norm().clamp_min(torch.finfo(a.dtype).tiny))


def _apart(a: object, b: float) -> float:
    if not isinstance(a, int | float):
        return math.inf
    return 0.0 if a == b else abs(a - b) / max(abs(a), sys.float_info.min)


def _flat(payload: Payload) -> Tensor:
    groups = (payload.weights, payload.exact, payload.features, payload.logits)
    tensors = [each for group in groups for each in group.values() if each.is_floating_point()]
    vectors = [each.double().reshape(-1) for each in tensors]
    return torch.cat(vectors) if vectors else torch.zeros(0, dtype=torch.float64)
