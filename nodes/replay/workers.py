"""A worker's tasks, trained again from their recorded inputs and held against its results.

All that a task's result depends on is in the ledger and the configuration: the task, the
client's data, seeds derived from their names. What a client keeps from task to task follows
from its tasks in their order, whichever nodes had them. On the same kind of device the result
has the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmq.algorithms.base import Payload
from fedmq.broker.errors import LedgerError
from fedmq.broker.trace import Trace
from fedmq.broker.wire import Buffer, Message
from fedmq.codecs.errors import CodecError
from fedmq.nodes.carry_out import carry_out
from fedmq.nodes.inbox import Post
from fedmq.nodes.local import Kept, Locals
from fedmq.nodes.payload import unpack
from fedmq.nodes.replay.fold import accepted_entry, inbound
from fedmq.nodes.replay.histories import Answer, last_uses, read_histories
from fedmq.nodes.setup import Setup, choose_device
from fedmq.nodes.trace.differ import Side, differences
from fedmq.nodes.worker import Evaluate, Keep, Saved, Train, Worker

TOLERANCE = 1e-3
"""How far results may lie apart between kinds of devices: |a - b| / |a|, over all weights;
and metrics, each."""
_COMPUTED = ("weights ", "body.metrics.")
"""Beginnings of what the differ says of numbers that depend on the device."""
_HONEST = frozenset({"body.elapsed_s", "body.device", "body.after", "body.version_0"})
"""What differs between two trainings of one task, and what a node says of where it started."""


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


class Retraining:
    """A worker (or the evaluator) of a recorded run.

    Where a client came to this node from another one, or went to another and came back, the
    tasks that its state follows from are trained too, and not shown.

    Args:
        trace: of the run.
        setup: what is learned, and how.
        node: its name.

    Raises:
        LedgerError: no such node has answered a task in this run.
    """

    def __init__(self, trace: Trace, setup: Setup, node: str) -> None:
        self._trace, self._node = trace, node
        # A result that is in the record was not dropped, whoever posted it in the end.
        undisturbed = {"slowdown": 1.0, "drop": 0.0, "nodes": {}}
        worker = setup.config.worker.model_copy(update=undisturbed)
        config = setup.config.model_copy(update={"worker": worker})
        self._setup = dataclasses.replace(setup, config=config)
        self._device = choose_device(setup.config.worker.device)
        self._histories = read_histories(trace)
        self._mine = self._histories.of(node)

    def all(self) -> Iterator[Retrained]:
        """Train every task that has a result, in order."""
        yield from self._train(self._mine)

    def one(self, name: str) -> Retrained:
        """Train one task; those before it as well, if the client keeps something from them.

        Raises:
            LedgerError: the worker has no result of this task.
        """
        answers = self._histories.answers
        mine = {answers[index].task: index for index in self._mine}
        if name not in mine:
            some = ", ".join(list(mine)[:5])
            raise LedgerError(
                f"--task: expected a task that {self._node} has a result of ({some}, ...), "
                f"got {name!r}"
            )
        [found] = self._train([mine[name]])
        return found

    def _train(self, wanted: Sequence[int]) -> Iterator[Retrained]:
        """Train the tasks of these answers, from the states that they started from."""
        answers, shown = self._histories.answers, set(wanted)
        needed = self._histories.behind(wanted)
        last_use = last_uses(answers, needed)
        states: dict[int, Kept | None] = {}
        keeps_nothing: set[int | None] = set()
        for index in needed:
            answer = answers[index]
            if index not in shown and answer.client in keeps_nothing:
                continue
            began = time.perf_counter()
            before = states.get(answer.start) if answer.start is not None else None
            post, state = self._again(answer, before)
            if state is None and not answer.says and post.message.kind == "result":
                keeps_nothing.add(answer.client)
            if index in last_use:
                states[index] = state
            if answer.start is not None and last_use.get(answer.start) == index:
                states.pop(answer.start, None)
            if index in shown and answer.result is not None:
                seconds = time.perf_counter() - began
                yield self._compare(answer.seq, answer.result, post, seconds)

    def _again(self, answer: Answer, before: Kept | None) -> tuple[Post, Kept | None]:
        """Give a worker's core a task and carry out what it asks for.

        Return its answer, and what the client keeps.
        """
        kept = Locals()
        if before is not None and answer.client is not None:
            kept.put(answer.client, before)
        core = Worker(
            self._setup, self._trace.run, answer.node, self._histories.clients[answer.node], kept
        )
        task = inbound(self._trace, accepted_entry(self._trace, answer.seq))
        actions = list(core.handle(task))
        post: Post | None = None
        after: Kept | None = None
        while actions:
            match actions.pop(0):
                case Train() | Evaluate() as action:
                    actions += core.handle(carry_out(action, self._setup, self._device))
                case Keep(kept=after):
                    actions += core.handle(Saved(after))
                case Post() as post:
                    pass
        if post is None:
            raise LedgerError(f"task {answer.task} cannot be read by a worker")
        return post, after

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
