"""The state of an aggregator's core, and its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET
from torch import Tensor

from fedmq.algorithms.base import OpaqueState
from fedmq.broker.rejections import Rejection
from fedmq.broker.wire.addresses import TIMER
from fedmq.broker.wire.schema import Message
from fedmq.nodes.aggregator.checkpoint import Counts, Fold
from fedmq.nodes.aggregator.computed import Computed
from fedmq.nodes.aggregator.evaluations import Evaluations
from fedmq.nodes.aggregator.fleet import Fleet
from fedmq.nodes.aggregator.progress import COMPACT_CHECKPOINTS, Progress
from fedmq.nodes.aggregator.results import ResultCollector
from fedmq.nodes.aggregator.tasks import MessageFactory, Tasks
from fedmq.nodes.aggregator.version import DeferredResults
from fedmq.nodes.messages.actions import ANSWERS, AggregatorAction, Commit
from fedmq.nodes.messages.payloads import Packed
from fedmq.nodes.run.goal import Goal, Spent
from fedmq.nodes.run.setup import Setup

_LEAST_TIMER_S = 1e-3
"""A shorter rest of ``run.max_wall_s`` counts as over: times since 1970 are rounded."""

_TASK_BYTES, _BYTES_PER_MESSAGE = 60, 600
"""Bytes of a task in a checkpoint, about, and most bytes of a checkpoint for each message."""


class AggregatorState:
    """The state of one run at its aggregator.

    Args:
        setup: objects of the run.
        run: id of the run.
        node: this node's name.
        computed: how numbers are computed; by default as in this release.
    """

    def __init__(self, setup: Setup, run: str, node: str, computed: Computed | None = None) -> None:
        self._setup = setup
        self._computed = computed or Computed()
        self._settings = setup.config.run
        self._goal = Goal.of(self._settings)
        self._spent, self._wall_timer = Spent(), ""
        self._messages = MessageFactory(run, node)
        self._post = self._messages.post
        self._algorithm, self._schedule = setup.algorithm, setup.schedule
        self._fleet = Fleet(setup.problem.clients)
        self._progress = Progress(setup, self._computed.rules)
        self._tasks = Tasks(setup, self._fleet, self._progress)
        state = self._algorithm.start(setup.problem)
        self._results = ResultCollector(setup, self._tasks, state, self._progress)
        self._evaluations = Evaluations()
        self._committing: Commit | None = None
        self._deferred = DeferredResults()
        self._running = False
        self._finishing = ""
        self._failed = False
        self._error: Exception | None = None
        self._asked_final: int | None = None
        self._ended = False
        self._evaluated = -1
        self._position = self._continues_at = -1
        self._now = 0.0
        self._checkpoint_at = -math.inf
        self._since_checkpoint = 0

    @property
    def state(self) -> OpaqueState:
        """Return the algorithm's state of the current version."""
        return self._results.current.state

    @property
    def version(self) -> int:
        """Return the number of the current version."""
        return self._results.current.version

    @property
    def failed(self) -> bool:
        """Return whether the run ends, or has ended, without reaching its goal."""
        return self._failed

    @property
    def finishing(self) -> str:
        """Return why the run ends, or has ended; "" while it goes on."""
        return self._finishing

    @property
    def position(self) -> int:
        """Return the number of the last message that the state includes."""
        return self._position

    @property
    def deferred(self) -> tuple[int, ...]:
        """Return the numbers of the messages up to there that it does not include."""
        return self._deferred.numbers()

    @property
    def counts(self) -> Counts:
        """Return the counts of results so far."""
        return self._results.counts

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the current model by name."""
        return self._algorithm.tensors(self.state)

    def state_snapshot(self) -> dict[str, Any]:
        """Return all parts of this core by name, so that two cores can be compared."""
        current = self._results.current
        return {
            "position": self._position,
            "version": self.version,
            "state": self.state,
            "gathered": current.accumulator,
            "weights": current.weights,
            "results": current.num_results,
            "staleness": current.staleness,
            "held": sorted(current.held),
            "tasks": self._tasks.in_flight,
            "nodes": self._fleet.hosts.by_node(),
            "unavailable": self._fleet.unavailable(),
            "unreported": sorted(self._fleet.unreported),
            "evaluating": sorted(self._evaluations.asked),
            "examinations": self._evaluations.client_evaluations,
            "scores": self._evaluations.scores,
            "committing": self._committing.token if self._committing else "",
            "waiting": list(self._deferred.numbers()),
            "counts": self._results.counts,
            "finishing": self._finishing,
            "next_id": self._messages.next_id,
        }

    def missing_clients(self) -> list[tuple[int, int]]:
        """Return the unreachable clients that the run waits for, as ranges with both ends.

        Before the first task these are all clients whose node has not joined, or has yet to report
        which are available. Later they are all
        unreachable clients, if no result can come from the reachable ones.
        """
        if self._ended or self._finishing or self._committing is not None:
            return []
        if not self._running:
            return self._fleet.yet_to_join()
        if self._tasks.num_in_flight or any(self._progress.skipped(self._fleet)):
            return []
        return self._fleet.reachable.missing()

    def validate_state(self) -> None:
        """Check the state between two events; tests and simulations do after each event.

        Raises:
            AssertionError: the state contradicts itself; the message says how.
        """
        for fault in self._faults():
            raise AssertionError(fault)

    def _note_received(self, message: Message) -> None:
        """Count a message of the inbox for the limits of the run."""
        self._since_checkpoint += 1
        if self._spent.started_at is None:
            self._spent.started_at = self._now
        if message.kind in ANSWERS:
            self._spent.payload_bytes += sum([blob.size for blob in message.blobs])

    def _request(
        self,
        out: list[AggregatorAction],
        kind: str,
        to: str,
        body: Mapping[str, Any],
        packed: Packed,
    ) -> str:
        """Post a task or an evaluation, and count its bytes; return its id."""
        self._spent.payload_bytes += sum([blob.size for blob in packed.blobs])
        return self._post(out, kind, to, body, packed)

    def _availability(self, message: Message) -> Rejection | None:
        """Apply a worker's message on which of its clients are available."""
        found = self._fleet.availability(message)
        if isinstance(found, Rejection):
            return found
        back, away = found  # one that came back and went away again is away
        self._tasks.came_back(self._fleet.came_back(back))
        self._tasks.went_away(self._fleet.went_away(away))
        self._fleet.reported(message)
        return None

    def _evaluated_as(self, name: str, accuracy: float | None) -> None:
        """Record the end of an evaluation, which can end the run."""
        known = self._evaluations.end(name, accuracy)
        if known is not None:
            self._spent.evaluated(known)
        self._finishing = self._finishing or self._goal.met_by(known)

    def _fail(self, why: str) -> None:
        """End the run as failed, unless it is ending already."""
        if not self._finishing:
            self._finishing, self._failed = why, True

    def _is_checkpoint_due(self) -> bool:
        """Return whether the next version's record is a checkpoint.

        A checkpoint has all tasks in flight. So that thousands of them are not written again for
        every few results, it costs at most a constant for each message since the last one.
        """
        if self._now - self._checkpoint_at < self._settings.checkpoint_s:
            return False
        if self._progress.rules < COMPACT_CHECKPOINTS:
            return True
        size = _TASK_BYTES * len(self._tasks.in_flight)
        size += self._setup.problem.clients // 8 if self._fleet.has_unavailable else 0
        return self._since_checkpoint * _BYTES_PER_MESSAGE >= size

    def _reaches_limit(self) -> bool:
        """Return whether the run ends, or ends now because it has reached a limit."""
        self._finishing = self._finishing or self._goal.limit_reached(self._spent)[1]
        return bool(self._finishing)

    def _set_wall_timer(self, after_s: float, out: list[AggregatorAction]) -> None:
        """Set the timer of ``run.max_wall_s``: nothing else may arrive in time."""
        self._wall_timer = f"wall/{self._position}"
        self._post(out, "timer", TIMER, {"token": self._wall_timer, "after_s": after_s})

    def _wall_time(self, out: list[AggregatorAction]) -> None:
        """End the run if its time is over; else set the timer for the rest of it."""
        self._wall_timer, limit = "", self._goal.max_wall_s
        if limit is None:
            return
        left = limit - self._spent.wall_s(self._now)
        if left > _LEAST_TIMER_S:
            self._set_wall_timer(min(left, limit), out)
            return
        wall_s = max(limit, limit - left)  # the tick may come a little earlier
        self._finishing = self._finishing or self._goal.limit_reached(self._spent, wall_s)[1]
        self._running = True  # it ends even if it waits for clients to join

    def _faults(self) -> Iterator[str]:
        current, counts = self._results.current, self._results.counts
        yield from current.faults()
        yield from self._deferred.faults(self._position)
        yield from self._evaluations.faults(self.version)
        yield from self._progress.faults()
        yield from self._fleet.faults()
        if (self._progress.version, self._progress.now) != (self.version, self._now):
            yield f"back-offs count from version {self._progress.version}, not {self.version}"
        if any(each < 0 for each in msgspec.structs.astuple(counts)):
            yield f"a count is negative: {counts}"
        if (self._ended or self._failed or self._asked_final is not None) and not self._finishing:
            yield "the run ends without a reason"
        if self._committing is not None and self._committing.token != f"commit/{self.version + 1}":
            yield f"{self._committing.token} is under way in version {self.version}"
        if self._committing is not None and (current.held or self._ended):
            yield "a version is being committed after the end, or without its held results"
        if self._ended:
            if self._deferred.numbers():
                yield f"results {self._deferred.numbers()} are deferred after the end"
            return
        yield from self._tasks.faults(current)
        if counts.used < current.num_results:
            yield f"{counts.used} results are used, {current.num_results} of them in one version"
        if not self._running or self._committing is not None or self._deferred.awaited:
            return
        if self._finishing and self._asked_final is None:
            yield f"the run waits for nothing, but has not ended: {self._finishing}"
        if not self._finishing and self._deferred.received:
            yield f"results {self._deferred.numbers()} are deferred, but no commit is under way"
        if not self._finishing and current.is_ready(self._tasks.view(current)):
            yield f"version {self.version + 1} is ready, but not committed"

    def _fold(self) -> Fold:
        """Return the state for a checkpoint, without the algorithm's."""
        nodes = self._fleet.hosts.by_node()
        compact = self._progress.rules >= COMPACT_CHECKPOINTS
        return Fold(
            position=self._position,
            at=self._now,
            version=self.version,
            next_id=self._messages.next_id + 1,
            outstanding=self._tasks.in_flight,
            hosts={} if compact else _host_of_each(nodes),
            nodes=nodes if compact else {},
            unavailable=self._fleet.unavailable(),
            unreported=sorted(self._fleet.unreported) or UNSET,
            evaluators=sorted(self._fleet.evaluators),
            evaluating=sorted(self._evaluations.asked),
            evaluated=self._evaluated,
            client_evaluations=self._evaluations.client_evaluations,
            scores=self._evaluations.scores,
            deferred=list(self._deferred.unsettled),
            counts=self._results.counts,
            running=self._running,
            finishing=self._finishing,
            ended=self._ended,
            arithmetic=self._computed.arithmetic,
            failures=self._progress.failures,
            failed=self._failed,
            goal=self._goal,
            spent=self._spent,
            wall_timer=self._wall_timer,
            expects_evaluator=self._fleet.expects_evaluator or UNSET,
            rules=self._progress.rules,
            asked_final=UNSET if self._asked_final is None else self._asked_final,
        )


def _host_of_each(nodes: Mapping[str, Sequence[tuple[int, int]]]) -> dict[int, str]:
    """Return the node of each client, from the ranges of each node."""
    return {
        client: node
        for node, ranges in nodes.items()
        for low, high in ranges
        for client in range(low, high + 1)
    }
