"""Collection of results: which ones count, their weights, and the order of accumulation."""

from __future__ import annotations

import enum
from typing import Literal

from fedmq.algorithms.base import OpaqueState, examples_of
from fedmq.algorithms.errors import Fault, ResultError
from fedmq.broker.link.events import Delivery
from fedmq.broker.rejections import Code, Rejection
from fedmq.broker.wire.schema import Message
from fedmq.codecs.errors import CodecError
from fedmq.nodes.aggregator.checkpoint import Counts
from fedmq.nodes.aggregator.progress import Progress
from fedmq.nodes.aggregator.tasks import Tasks
from fedmq.nodes.aggregator.version import DeferredResults, VersionBuffer, room_for
from fedmq.nodes.errors import rejection_of
from fedmq.nodes.messages.actions import AggregatorAction, Handled
from fedmq.nodes.messages.payloads import numbers_of
from fedmq.nodes.run.setup import Setup


class _Held(enum.Enum):
    HELD = enum.auto()


HELD = _Held.HELD
"""The result waits for earlier results of its cohort."""
Held = Literal[_Held.HELD]


class ResultCollector:
    """Collects the results for an aggregator's next version.

    Args:
        setup: objects of the run.
        tasks: the tasks that results answer.
        state: the algorithm's state at the first version.
        progress: records failures and used results.

    Attributes:
        current: results of the next version so far.
        counts: counts of all results so far.
        reply: what a result contains: ``model`` or ``update``.
    """

    def __init__(self, setup: Setup, tasks: Tasks, state: OpaqueState, progress: Progress) -> None:
        self._algorithm, self._schedule, self._tasks = setup.algorithm, setup.schedule, tasks
        self._progress = progress
        self._most_bytes = room_for(setup.algorithm, state)
        self.reply = setup.algorithm.fixed_reply or setup.schedule.reply
        self.counts = Counts()
        self.begin_version(state)

    def begin_version(self, state: OpaqueState) -> None:
        """Begin to gather towards the version after this one."""
        self.current = VersionBuffer(self._algorithm.new_accumulator(state))

    def take(
        self, delivery: Delivery, state: OpaqueState, version: int, out: list[AggregatorAction]
    ) -> Handled | None:
        """Take a result: return that it is dealt with, and how, or None while it is held."""
        why = self._take(delivery, state, version, out)
        if why == HELD:
            return None
        self._tasks.freed()  # its client has no held result, so it can be drawn again
        return Handled.of(delivery.seq, why)

    def undelivered(self, name: str, message: Message) -> None:
        """Record that a task was not delivered, or was rejected, according to a message."""
        task = self._tasks.discard(name)
        if task is not None:
            self.counts.dropped += 1
            why = (str(message.body.get(key, "")) for key in ("code", "reason"))
            self._progress.failed(task.client, task.node, *why)

    def take_waiting(
        self,
        waiting: DeferredResults,
        state: OpaqueState,
        version: int,
        out: list[AggregatorAction],
    ) -> None:
        """Take the results that came while the version before this one was being committed."""
        here, waiting.received = waiting.received, {}
        for delivery in here.values():
            done = self.take(delivery, state, version, out)
            if done is not None:
                out.append(done)

    def end(self, deferred: DeferredResults) -> list[Handled]:
        """Count the results that no version will use; reject deferred ones."""
        done = []
        for seq, delivery in deferred.received.items():
            self._tasks.discard(delivery.message.re or "")
            failed = delivery.message.kind == "failed"
            self.counts.dropped += failed
            self.counts.refused += not failed
            over = Rejection(Code.RUN_OVER, "the run is over")
            done.append(Handled.of(seq, None if failed else over))
        self.counts.used -= self.current.num_results
        self.counts.unused += self.current.num_results + len(self.current.held)
        return done

    def _take(
        self, delivery: Delivery, state: OpaqueState, version: int, out: list[AggregatorAction]
    ) -> Rejection | Held | None:
        message = delivery.message
        task = self._tasks.answered(message)
        if isinstance(task, Rejection):
            self.counts.refused += 1
            return task
        if message.kind == "failed":
            self.counts.dropped += 1
            why = (str(message.body.get(key, "")) for key in ("code", "reason", "where"))
            self._progress.failed(task.client, message.sender, *why)
            return None
        staleness = version - task.version
        try:
            numbers = numbers_of(message)
            n = examples_of(numbers)
            if numbers.get("reply", self.reply) != self.reply:
                raise ResultError(f"expected reply {self.reply!r}", Fault.MALFORMED)
        except (ResultError, CodecError) as error:
            return self._rejected(task.client, message.sender, rejection_of(error))
        weight = self._schedule.weight(n, staleness)
        if weight is None:
            self.counts.stale += 1
            self._progress.answered(task.client, message.sender)
            code = Code.STALE if self._schedule.cohort(1) is None else Code.LATE
            return Rejection(code, f"too stale: {staleness} versions behind")
        if self._schedule.ordered and not staleness:
            self.current.held[message.re or ""] = (delivery, weight, task.client)
            self.current.contributed.add(task.client)
            self.add_in_order(state, out)
            return HELD
        return self._add(state, delivery, weight, task.client, staleness)

    def add_in_order(
        self, state: OpaqueState, out: list[AggregatorAction], *, everything: bool = False
    ) -> None:
        """Accumulate held results in cohort order, up to the first outstanding task."""
        current = self.current
        if not current.held:
            return
        order, in_flight = current.order, self._tasks.in_flight
        # The loop ends: the task of each held result is in the order.
        while not (order[current.settled] in current.held or order[current.settled] in in_flight):
            current.settled += 1
        for index in range(current.settled, len(order)):
            name = order[index]
            if name in current.held:
                delivery, weight, client = current.held.pop(name)
                why = self._add(state, delivery, weight, client, 0)
                if why is not None:
                    current.contributed.discard(client)
                    self._tasks.freed()
                out.append(Handled.of(delivery.seq, why))
            elif not everything and self._tasks.is_expected(name):
                return

    def _add(
        self, state: OpaqueState, delivery: Delivery, weight: float, client: int, staleness: int
    ) -> Rejection | None:
        """Add a result to the version; return the rejection if it cannot be used."""
        about = client, staleness
        why = self.current.add(self._algorithm, state, delivery, weight, about, self._most_bytes)
        node = delivery.message.sender
        if why is not None:
            return self._rejected(client, node, why)
        self.counts.used += 1
        self._progress.used(client, node)
        return None

    def _rejected(self, client: int, node: str, why: Rejection) -> Rejection:
        self.counts.refused += 1
        self._progress.failed(client, node, why.code, why.reason)
        return why
