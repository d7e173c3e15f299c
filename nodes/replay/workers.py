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
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedmq.algorithms.toolkit.arithmetic import ARITHMETIC
from fedmq.broker.errors import LedgerError
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.wire.schema import Buffer, Message
from fedmq.codecs.errors import CodecError
from fedmq.nodes.messages.actions import PostMessage
from fedmq.nodes.messages.payloads import unpack
from fedmq.nodes.replay.fold import accepted_entry, computed_by, inbound
from fedmq.nodes.replay.histories import Answer, last_uses, read_histories
from fedmq.nodes.replay.tolerance import (
    NAMES,
    TOLERANCE,
    is_number,
    near_differences,
    number_distance,
    overall_distance,
)
from fedmq.nodes.run.devices import choose_device
from fedmq.nodes.run.setup import Setup
from fedmq.nodes.trace.differ import Operand, differences
from fedmq.nodes.trace.differences import Difference, DifferenceKind, Field, Gap
from fedmq.nodes.worker.client_state import ClientStateStore, SavedClientState
from fedmq.nodes.worker.core import Evaluate, SaveClientState, Saved, Train, Worker
from fedmq.nodes.worker.training import carry_out

_HONEST = frozenset({"body.elapsed_s", "body.device", "body.after", "body.version_0"})
"""What differs between two trainings of one task, and what a node says of where it started."""


@dataclass(frozen=True)
class Retrained:
    """One task, trained or evaluated again.

    task, result: numbers of both messages.
    differences: what is not as it was recorded; empty if nothing. On another kind of device, and
        in traces of fedmq 0.1.0, numbers within the tolerance are not among them.
    apart: how far those lie apart, relatively; None where the bytes have to be equal.
    """

    task: int
    result: int
    message: Message
    seconds: float
    differences: list[Difference]
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
        self._computed = computed_by(trace)
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
        states: dict[int, SavedClientState | None] = {}
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

    def _again(
        self, answer: Answer, before: SavedClientState | None
    ) -> tuple[PostMessage, SavedClientState | None]:
        """Give a worker's core a task and carry out what it asks for.

        Return its answer, and what the client keeps.
        """
        kept = ClientStateStore()
        if before is not None and answer.client is not None:
            kept.put(answer.client, before)
        core = Worker(
            self._setup, self._trace.run, answer.node, self._histories.clients[answer.node], kept
        )
        task = inbound(self._trace, accepted_entry(self._trace, answer.seq))
        actions = list(core.handle(task))
        post: PostMessage | None = None
        after: SavedClientState | None = None
        while actions:
            match actions.pop(0):
                case Train() | Evaluate() as action:
                    actions += core.handle(carry_out(action, self._setup, self._device))
                case SaveClientState(kept=after):
                    actions += core.handle(Saved(after))
                case PostMessage() as post:
                    pass
        if post is None:
            raise LedgerError(f"task {answer.task} cannot be read by a worker")
        return post, after

    def _compare(self, task: int, seq: int, answer: PostMessage, seconds: float) -> Retrained:
        message = accepted_entry(self._trace, seq).read()
        read = functools.partial(self._trace.blob, message)
        recorded, replayed = (
            Operand(message, read),
            Operand(answer.message, answer.data.__getitem__),
        )
        if self._computed.arithmetic < ARITHMETIC:
            found, distance = near_differences(recorded, replayed, ignore=_HONEST, overall=True)
            return Retrained(task, seq, message, seconds, found, distance * TOLERANCE)
        found = differences(recorded, replayed, names=NAMES, ignore=_HONEST)
        apart = None
        device = message.body.get("device")
        if found and device and device != answer.message.body["device"]:
            apart = _distance(message, read, answer)
            if apart <= TOLERANCE:
                found = [each for each in found if not depends_on_device(each)]
        return Retrained(task, seq, message, seconds, found, apart)


def depends_on_device(difference: Difference) -> bool:
    """Tell whether another kind of device may make this difference, if it is a small one.

    Rounding changes the values of tensors and metrics, and the sign of a zero. It changes no
    integers, adds or removes nothing, and gives no tensor another shape.
    """
    match difference:
        case Difference(kind=DifferenceKind.VALUES, gap=Gap(rounded=rounded)):
            return rounded
        case Difference(kind=DifferenceKind.ENCODING):
            return True
        case Difference(kind=DifferenceKind.FIELD, place=Field() as place, operands=sides):
            return place.is_under("body", "metrics") and all(map(is_number, sides))
        case _:
            return False


def _distance(message: Message, read: Callable[[int], Buffer], answer: PostMessage) -> float:
    """Return how far the computed numbers of two answers lie apart; infinity: not comparable."""
    if message.kind == "score":
        ours, theirs = message.body.get("metrics"), answer.message.body["metrics"]
        if not isinstance(ours, dict) or ours.keys() != theirs.keys():
            return math.inf
        return max((number_distance(ours[name], theirs[name]) for name in theirs), default=0.0)
    try:
        recorded = unpack(message, read)
    except CodecError:
        return math.inf
    return overall_distance(recorded, unpack(answer.message, answer.data.__getitem__))
