"""Train a worker's recorded tasks again and compare the results with the record.

A result depends only on the ledger and the configuration: the task, the client's data, and seeds
derived from names. A client's local state follows from its earlier tasks, on whichever nodes. On
the same kind of device, the result has the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from structlog.typing import FilteringBoundLogger

from fedmq.algorithms.toolkit.arithmetic import ARITHMETIC
from fedmq.broker.errors import LedgerError
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.link.events import PostMessage
from fedmq.broker.wire.schema import Buffer, Message
from fedmq.codecs.errors import CodecError
from fedmq.nodes.messages.metrics import received_metrics
from fedmq.nodes.messages.payloads import unpack
from fedmq.nodes.process.logs import SILENT
from fedmq.nodes.replay.fold import accepted_entry, computed_by, recorded_delivery
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
from fedmq.nodes.worker.core import Worker
from fedmq.nodes.worker.driver import WorkerDriver
from fedmq.nodes.worker.training import Compute, compute

_HONEST = frozenset({"body.elapsed_s", "body.device", "body.after", "body.version_0"})
"""Fields that differ between two trainings of a task: times, device, and the starting state."""


class AnswerPort:
    """The `WorkerPort` of a replayed task.

    Args:
        compute: trains and evaluates.

    Attributes:
        answer: the message that the worker posts.
        state: the client's new local state.
    """

    log: FilteringBoundLogger = SILENT

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        self.answer: PostMessage | None = None
        self.state: SavedClientState | None = None

    def now(self) -> float:
        """Return 0: durations are not compared."""
        return 0.0

    def post(self, message: Message, data: Sequence[Buffer], consumes: tuple[int, ...]) -> None:
        """Keep the answer."""
        self.answer = PostMessage(message, tuple(data), consumes)

    def done(
        self,
        seqs: Sequence[int],
        refused: Mapping[int, str] | None = None,
        codes: Mapping[int, str] | None = None,
    ) -> None:
        """Do nothing: a task that is rejected has no answer."""

    def away(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that does nothing."""
        return contextlib.nullcontext()

    def pause(self, seconds: float) -> None:
        """Do not wait."""

    def save(self, client: int, state: SavedClientState) -> SavedClientState:  # noqa: ARG002
        """Keep the client's state."""
        self.state = state
        return state


@dataclass(frozen=True)
class Retrained:
    """One task, trained or evaluated again.

    task, result: numbers of both messages.
    message: the recorded result.
    seconds: duration of the training.
    differences: from the record. On another kind of device, and in traces of fedmq 0.1.0, only
        those beyond the tolerance.
    distance: relative distance of the values; None if the bytes must be equal.
    """

    task: int
    result: int
    message: Message
    seconds: float
    differences: list[Difference]
    distance: float | None = None

    @property
    def matches(self) -> bool:
        """Return whether the result matches the record, as far as the device allows."""
        return not self.differences


class Retraining:
    """A worker (or the evaluator) of a recorded run.

    If a client's local state depends on tasks that other nodes trained, those are trained, too,
    but not yielded.

    Args:
        trace: of the run.
        setup: of the run.
        node: name of the worker.

    Raises:
        LedgerError: no such node has answered a task in this run.
    """

    def __init__(self, trace: Trace, setup: Setup, node: str) -> None:
        self._trace, self._node = trace, node
        self._computed = computed_by(trace)
        # The recorded results were not dropped.
        undisturbed = {"slowdown": 1.0, "drop": 0.0, "nodes": {}}
        worker = setup.config.worker.model_copy(update=undisturbed)
        config = setup.config.model_copy(update={"worker": worker})
        self._setup = dataclasses.replace(setup, config=config)
        self._device = choose_device(setup.config.worker.device)
        self._histories = read_histories(trace)
        self._own = self._histories.of(node)

    def train_all(self) -> Iterator[Retrained]:
        """Train all tasks that have a result, in order."""
        yield from self._train(self._own)

    def train_one(self, task: str) -> Retrained:
        """Train one task, after those that its client's local state depends on.

        Raises:
            LedgerError: the worker has no result of this task.
        """
        answers = self._histories.answers
        own = {answers[index].task: index for index in self._own}
        if task not in own:
            some = ", ".join(list(own)[:5])
            raise LedgerError(
                f"--task: expected a task with a result from {self._node} ({some}, ...), "
                f"got {task!r}"
            )
        [found] = self._train([own[task]])
        return found

    def _train(self, wanted: Sequence[int]) -> Iterator[Retrained]:
        """Train the tasks of these answers from the local states that they started from."""
        answers, shown = self._histories.answers, set(wanted)
        needed = self._histories.with_predecessors(wanted)
        last_use = last_uses(answers, needed)
        states: dict[int, SavedClientState | None] = {}
        stateless: set[int | None] = set()
        for index in needed:
            answer = answers[index]
            if index not in shown and answer.client in stateless:
                continue
            began = time.perf_counter()
            before = states.get(answer.start) if answer.start is not None else None
            post, state = self._answer_again(answer, before)
            if state is None and not answer.start_recorded and post.message.kind == "result":
                stateless.add(answer.client)
            if index in last_use:
                states[index] = state
            if answer.start is not None and last_use.get(answer.start) == index:
                states.pop(answer.start, None)
            if index in shown and answer.result is not None:
                seconds = time.perf_counter() - began
                yield self._compare(answer.seq, answer.result, post, seconds)

    def _answer_again(
        self, answer: Answer, before: SavedClientState | None
    ) -> tuple[PostMessage, SavedClientState | None]:
        """Run a worker's core on a task; return its answer and the client's new local state."""
        store = ClientStateStore()
        if before is not None and answer.client is not None:
            store.put(answer.client, before)
        clients = self._histories.clients[answer.node]
        core = Worker(self._setup, self._trace.run, answer.node, clients, store)
        port = AnswerPort(functools.partial(compute, setup=self._setup, device=self._device))
        task = recorded_delivery(self._trace, accepted_entry(self._trace, answer.seq))
        driver = WorkerDriver(core, self._setup, port)
        driver.handle(task)
        if driver.error is not None:
            raise driver.error  # the recorded worker had a result
        if port.answer is None:
            raise LedgerError(f"task {answer.task}: expected an answer of the worker, got none")
        return port.answer, port.state

    def _compare(self, task: int, seq: int, answer: PostMessage, seconds: float) -> Retrained:
        message = _comparable(accepted_entry(self._trace, seq).read())
        read = functools.partial(self._trace.blob, message)
        answer = msgspec.structs.replace(answer, message=_comparable(answer.message))
        recorded, replayed = (
            Operand(message, read),
            Operand(answer.message, answer.data.__getitem__),
        )
        if self._computed.arithmetic < ARITHMETIC:
            found, distance = near_differences(recorded, replayed, ignore=_HONEST, overall=True)
            return Retrained(task, seq, message, seconds, found, distance * TOLERANCE)
        found = differences(recorded, replayed, names=NAMES, ignore=_HONEST)
        relative = None
        device = message.body.get("device")
        if found and device and device != answer.message.body.get("device"):
            relative = _distance(message, read, answer)
            if relative <= TOLERANCE:
                found = [each for each in found if not depends_on_device(each)]
        return Retrained(task, seq, message, seconds, found, relative)


def _comparable(message: Message) -> Message:
    """Return an answer with metrics as numbers: older releases sent NaN as a number, too."""
    metrics = message.body.get("metrics")
    if message.kind != "score" or not isinstance(metrics, dict):
        return message
    body = {**message.body, "metrics": metrics | received_metrics(metrics)}
    return msgspec.structs.replace(message, body=body)


def depends_on_device(difference: Difference) -> bool:
    """Return whether rounding on another kind of device may cause a small difference of this kind.

    Rounding changes values of tensors and metrics, and the sign of zero; not integers, shapes or
    names.
    """
    match difference:
        case Difference(kind=DifferenceKind.VALUES, gap=Gap(rounded=rounded)):
            return rounded
        case Difference(kind=DifferenceKind.ENCODING):
            return True
        case Difference(kind=DifferenceKind.FIELD, place=Field() as place, operands=operands):
            return place.is_under("body", "metrics") and all(map(is_number, operands))
        case _:
            return False


def _distance(message: Message, read: Callable[[int], Buffer], answer: PostMessage) -> float:
    """Return the distance of two answers' computed values; infinity if they cannot be compared."""
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
