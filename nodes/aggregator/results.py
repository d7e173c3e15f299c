"""Results as they arrive: which tasks they answer, and their counts."""

from __future__ import annotations

from collections.abc import Sequence

from fedmq.algorithms.base import OpaqueState
from fedmq.broker.link.events import Delivery
from fedmq.broker.rejections import Code, Rejection
from fedmq.broker.wire.schema import Message
from fedmq.nodes.aggregator.checkpoint import Counts
from fedmq.nodes.aggregator.progress import Progress
from fedmq.nodes.aggregator.tasks import Tasks
from fedmq.nodes.aggregator.version import AddedResult, Outcome, VersionBuffer, room_for
from fedmq.nodes.messages.actions import AggregatorAction, Handled
from fedmq.nodes.run.setup import Setup


class ResultCollector:
    """Collects the results for an aggregator's next version, and counts all results.

    Args:
        setup: objects of the run.
        tasks: the tasks that results answer.
        state: the algorithm's state at the first version.
        progress: records failures and used results.

    Attributes:
        current: the version in the making.
        counts: counts of all results so far.
    """

    def __init__(self, setup: Setup, tasks: Tasks, state: OpaqueState, progress: Progress) -> None:
        self._setup, self._tasks, self._progress = setup, tasks, progress
        self._max_bytes = room_for(setup.algorithm, state)
        self.counts = Counts()
        self.begin_version(state, 0)

    def begin_version(self, state: OpaqueState, version: int) -> None:
        """Begin to collect results for the version after this one."""
        self.current = VersionBuffer(
            self._setup, state, version, self._max_bytes, rules=self._progress.rules
        )
        self._tasks.begin_version(self.current)

    def take(self, delivery: Delivery, out: list[AggregatorAction]) -> None:
        """Handle a result or a failed task; a held result is handled later."""
        message = delivery.message
        task = self._tasks.answered(message)
        if isinstance(task, Rejection):
            self.counts.refused += 1
            out.append(Handled.of(delivery.seq, task))
            return
        if message.kind == "failed":
            self.counts.dropped += 1
            why = (str(message.body.get(key, "")) for key in ("code", "reason", "where"))
            self._progress.failed(task.client, message.sender, *why)
            out.append(Handled(delivery.seq))
        else:
            added = self.current.add(delivery, task.client, task.version)
            if added.outcome is Outcome.HELD:
                self.add_in_order(out)
                return
            self._count(added, out)
        self._tasks.freed(task.client)  # it has no held result

    def add_in_order(self, out: list[AggregatorAction], *, everything: bool = False) -> None:
        """Add held results in cohort order, up to the first outstanding task, or all of them."""
        tasks = self._tasks
        for added in self.current.add_held(None if everything else tasks.is_expected):
            self._count(added, out)
            if added.outcome is Outcome.REJECTED:
                tasks.freed(added.client)

    def undelivered(self, name: str, message: Message) -> None:
        """Record that a task was not delivered, or was rejected, according to a message."""
        task = self._tasks.discard(name)
        if task is not None:
            self.counts.dropped += 1
            why = (str(message.body.get(key, "")) for key in ("code", "reason"))
            self._progress.failed(task.client, task.node, *why)

    def end(self, deferred: Sequence[Delivery], out: list[AggregatorAction]) -> None:
        """Count the results that no version will use; reject deferred ones."""
        for delivery in deferred:
            self._tasks.discard(delivery.message.re or "")
            failed = delivery.message.kind == "failed"
            self.counts.dropped += failed
            self.counts.refused += not failed
            over = Rejection(Code.RUN_OVER, "the run is over")
            out.append(Handled.of(delivery.seq, None if failed else over))
        self.counts.used -= self.current.num_results
        self.counts.unused += self.current.num_results + len(self.current.held)

    def _count(self, added: AddedResult, out: list[AggregatorAction]) -> None:
        """Count a result that was used or rejected."""
        client, node, why = added.client, added.delivery.message.sender, added.why
        if why is None:
            self.counts.used += 1
            self._progress.used(client, node)
        elif added.outcome is Outcome.STALE:
            self.counts.stale += 1
            self._progress.answered(client, node)
        else:
            self.counts.refused += 1
            self._progress.failed(client, node, why.code, why.reason)
        out.append(Handled.of(added.delivery.seq, why))
