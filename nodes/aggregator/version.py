"""The version in the making: its results, the tasks sent for it, and its commit."""

from __future__ import annotations

import enum
import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from msgspec import Struct

from fedmq.algorithms.base import (
    UNBOUNDED,
    AnyAlgorithm,
    Bounds,
    OpaqueState,
    Result,
    examples_of,
)
from fedmq.algorithms.errors import Fault, ResultError
from fedmq.algorithms.problems.base import MOST_EXAMPLES
from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.schedules import ScheduleView
from fedmq.algorithms.toolkit.returned import check_tensors
from fedmq.algorithms.values import ReturnedError, kind_of_value, plain_number
from fedmq.broker.errors import WireError
from fedmq.broker.link.events import Delivery
from fedmq.broker.rejections import Code, Rejection
from fedmq.codecs.errors import CodecError
from fedmq.nodes.aggregator.fleet import ClientSet, as_list
from fedmq.nodes.aggregator.progress import CHECKS_SIZES, RULES
from fedmq.nodes.errors import rejection_of
from fedmq.nodes.messages.payloads import fail_on_partial_reread, numbers_of, unpack
from fedmq.nodes.run.setup import Setup

_ROOM = 16
"""Memory that codecs need to decode a result, as a multiple of its size."""
_LEAST_BYTES = 1 << 20
_TIMES = 1e12
"""Values of a result that are larger than the model's by this factor are rejected.

float32 has 7 digits: of a model that is added to such an update, nothing is left. A gradient of
FedSGD may be large, because its step is small.
"""


def room_for(algorithm: AnyAlgorithm, state: OpaqueState) -> int:
    """Return the memory limit for decoding a result, in bytes.

    Raises:
        ReturnedError: the algorithm does not say how large one is, or has no tensors by name.
    """
    check_tensors(algorithm.tensors(state), "the model", f"{type(algorithm).__name__}.tensors")
    found = algorithm.result_bytes(state)
    number = plain_number(found)
    if number is None or not 0 <= number < math.inf:
        who = f"{type(algorithm).__name__}.result_bytes"
        raise ReturnedError(f"{who}: expected a number of bytes, got {kind_of_value(found)}")
    return max(_LEAST_BYTES, int(_ROOM * number))


def most_examples(setup: Setup) -> int:
    """Return the largest number of examples of a result; it decides the result's weight."""
    chosen = setup.config.run.max_examples
    if chosen is not None:
        return chosen
    return setup.problem.most_examples if setup.algorithm.counts_examples else MOST_EXAMPLES


class Outcome(enum.Enum):
    """What was done with a result."""

    USED = enum.auto()
    STALE = enum.auto()
    """It is too many versions behind, or came after its round."""
    REJECTED = enum.auto()
    HELD = enum.auto()
    """It waits for earlier results of its cohort."""


class AddedResult(Struct, frozen=True):
    """A client's result and its outcome; ``why`` if it is not used."""

    delivery: Delivery
    client: int
    outcome: Outcome
    why: Rejection | None = None


class HeldResult(Struct, frozen=True):
    """A result that waits for earlier ones of its cohort; its weight is known."""

    delivery: Delivery
    client: int
    weight: float


class VersionBuffer:
    """The version in the making. Only its own methods change its fields.

    Args:
        setup: objects of the run.
        state: the algorithm's state of the current version, from which tasks are made.
        version: number of the current version; the one in the making is the next.
        max_bytes: that a result may take in memory while it is decoded, see `room_for`.
        in_order: whether a result waits for earlier ones of its cohort; by default as the
            schedule says. A what-if replay adds results in the recorded order.
        rules: by which results are checked, see `fedmq.nodes.aggregator.progress`.

    Attributes:
        reply: what a result contains: ``model`` or ``update``.
        accumulator: the algorithm's accumulator of results.
        order: ids of the tasks sent for the version, in cohort order.
        held: results that wait for earlier ones of the cohort, by the id of their task.
        draws: number of random draws of clients.
        contributed: in a synchronous round, clients whose results were received; each counts once.
        num_results, late: number of used results, and of those from earlier versions.
        weights, staleness: sum of the results' weights, and the staleness of each, in versions.
        deadline_passed: whether the version no longer waits for outstanding tasks.
    """

    def __init__(
        self,
        setup: Setup,
        state: OpaqueState,
        version: int,
        max_bytes: int,
        *,
        in_order: bool | None = None,
        rules: int = RULES,
    ) -> None:
        self._algorithm, self._schedule = setup.algorithm, setup.schedule
        self._clients, self._seed = setup.problem.clients, setup.config.run.seed
        self._max_bytes = max_bytes
        self._in_order = self._schedule.ordered if in_order is None else in_order
        checks = rules >= CHECKS_SIZES
        self._most_examples = most_examples(setup) if checks else MOST_EXAMPLES
        self._bounds = Bounds(_TIMES, setup.config.run.max_update_norm) if checks else UNBOUNDED
        self.state, self.version = state, version
        self.reply = self._algorithm.fixed_reply or self._schedule.reply
        self.accumulator = self._algorithm.new_accumulator(state)
        self.order: list[str] = []
        self.draws = 0
        # Positions in the order, the first one on top. A task that cannot return a result any more
        # stays in `_expected` until it is on top, so each result costs the logarithm of the cohort.
        self._positions: dict[str, int] = {}
        self._expected: list[int] = []
        self._held_positions: list[int] = []
        self.held: dict[str, HeldResult] = {}
        self.contributed: set[int] = set()
        self.num_results = self.late = 0
        self.weights = 0.0
        self.staleness: list[int] = []
        self.deadline_passed = False

    def adopt(self, state: OpaqueState) -> None:
        """Replace the state of the current version, such as by the recorded one in a replay."""
        self.state = state

    # ---- tasks

    def draw(self, idle: ClientSet, count: int) -> list[int]:
        """Draw ``count`` of the idle clients, or all if there are fewer; return them in order."""
        if len(idle) <= count:
            return as_list(idle.all())
        rng = derive_rng(self._seed, "cohort", self.version, self.draws)
        self.draws += 1
        return as_list(idle.at(np.sort(rng.choice(len(idle), count, replace=False))))

    def sent(self, task: str) -> None:
        """Record that a task, given by its id, was sent."""
        if self._in_order:
            self._positions[task] = len(self.order)
            heapq.heappush(self._expected, len(self.order))
        self.order.append(task)

    def expect(self, task: str) -> None:
        """Record that a task of this version can return a result again."""
        if self._in_order:
            heapq.heappush(self._expected, self._positions[task])

    def pass_deadline(self) -> None:
        """Stop waiting for outstanding tasks."""
        self.deadline_passed = True

    # ---- results

    def add(self, delivery: Delivery, client: int, version: int) -> AddedResult:
        """Add a result, hold it until its turn, or reject it.

        Args:
            delivery: the result.
            client: that it comes from.
            version: from which its task was made.
        """
        staleness = self.version - version
        try:
            numbers = numbers_of(delivery.message)
            n = examples_of(numbers, self._most_examples)
            if numbers.get("reply", self.reply) != self.reply:
                raise ResultError(f"expected reply {self.reply!r}", Fault.MALFORMED)
        except (ResultError, CodecError) as error:
            return AddedResult(delivery, client, Outcome.REJECTED, rejection_of(error))
        weight = self._schedule.weight(n, staleness)
        if weight is None:
            code = Code.STALE if self._schedule.cohort(1) is None else Code.LATE
            why = Rejection(code, f"too stale: {staleness} versions behind")
            return AddedResult(delivery, client, Outcome.STALE, why)
        if self._in_order and not staleness:
            task = delivery.message.re or ""
            self.held[task] = HeldResult(delivery, client, weight)
            heapq.heappush(self._held_positions, self._positions[task])
            self.contributed.add(client)
            return AddedResult(delivery, client, Outcome.HELD)
        return self._accumulate(delivery, client, staleness, weight)

    def add_held(self, is_expected: Callable[[str], bool] | None) -> Iterator[AddedResult]:
        """Add held results in cohort order, up to the first task that is expected to return one.

        Args:
            is_expected: whether a task, given by its id, is expected to return a result; None to
                wait for no task.
        """
        if not self.held:
            return
        first = math.inf if is_expected is None else self._first_expected(is_expected)
        while self._held_positions and self._held_positions[0] < first:
            held = self.held.pop(self.order[heapq.heappop(self._held_positions)])
            added = self._accumulate(held.delivery, held.client, 0, held.weight)
            if added.outcome is Outcome.REJECTED:
                self.contributed.discard(held.client)
            yield added

    def _first_expected(self, is_expected: Callable[[str], bool]) -> float:
        """Return the position of the first task that is expected to return a result."""
        while self._expected:
            task = self.order[self._expected[0]]
            if task not in self.held and is_expected(task):
                break
            heapq.heappop(self._expected)
        return self._expected[0] if self._expected else math.inf

    def _accumulate(
        self, delivery: Delivery, client: int, staleness: int, weight: float
    ) -> AddedResult:
        try:
            stream = fail_on_partial_reread(delivery.chunks)
            payload = unpack(delivery.message, delivery.read, stream, self._max_bytes)
            n = examples_of(payload.numbers)
            result = Result(client, staleness, payload, n, self._bounds)
            self.accumulator = self._algorithm.accumulate(
                self.accumulator, self.state, result, weight
            )
        except (ResultError, CodecError, WireError) as error:
            return AddedResult(delivery, client, Outcome.REJECTED, rejection_of(error))
        self.num_results += 1
        self.weights += weight
        self.staleness.append(staleness)
        self.late += staleness > 0
        return AddedResult(delivery, client, Outcome.USED)

    # ---- the commit

    def view(
        self, in_flight: int = 0, outstanding: int = 0, behind: int = 0, idle: int = 0
    ) -> ScheduleView:
        """Return a schedule's view of the version; the arguments are as in `ScheduleView`."""
        return ScheduleView(
            clients=self._clients,
            in_flight=in_flight,
            started=len(self.order),
            outstanding=outstanding,
            results=self.num_results + len(self.held),
            deadline_passed=self.deadline_passed,
            late=self.late,
            behind=behind,
            idle=idle,
        )

    def is_ready(self, view: ScheduleView) -> bool:
        """Return whether to commit the version now."""
        return self._schedule.is_ready(view)

    def commit(self) -> OpaqueState:
        """Return the algorithm's state of the next version."""
        divisor = self._schedule.divisor(self.weights, self.num_results)
        return self._algorithm.commit(self.state, self.accumulator, divisor)

    def faults(self) -> Iterator[str]:
        """Yield what contradicts itself, for `AggregatorState.validate_state`."""
        if self.num_results != len(self.staleness):
            yield f"{self.num_results} results are used, {len(self.staleness)} have a staleness"
        if self.late != sum(each > 0 for each in self.staleness):
            yield f"{self.late} results count as late, the staleness is {self.staleness}"
        if not all(0 <= each <= self.version for each in self.staleness):
            yield f"version {self.version} cannot have results of staleness {self.staleness}"
        if len(set(self.order)) != len(self.order):
            yield "a task is in the cohort twice"
        if self._in_order and [*self._positions] != self.order:
            yield f"tasks {[*self._positions]} have a position in the cohort {self.order}"
        if sorted(self._held_positions) != sorted(self._positions.get(k, -1) for k in self.held):
            yield f"results are held of tasks that are settled or unknown: {sorted(self.held)}"
        if not self._in_order and (self.held or self.contributed):
            yield "results are held, but the schedule has no cohort order"
        if outside_clients := {each.client for each in self.held.values()} - self.contributed:
            yield f"clients {sorted(outside_clients)} have a held result and have not contributed"

    def facts(self) -> dict[str, int | float]:
        """Return the fields about results in the version's record."""
        return {
            "results": self.num_results,
            "late": self.late,
            "weights": self.weights,
            "mean_staleness": sum(self.staleness) / len(self.staleness) if self.staleness else 0.0,
            "max_staleness": max(self.staleness, default=0),
        }


@dataclass
class DeferredResults:
    """Results that arrive during the commit of a version in the background.

    received: results by number.
    awaited: numbers of results of an earlier session that will be delivered again.
    unsettled: numbers of results from before the last checkpoint that it does not include.
    """

    received: dict[int, Delivery] = field(default_factory=dict)
    awaited: set[int] = field(default_factory=set)
    unsettled: tuple[int, ...] = ()

    def add(self, delivery: Delivery) -> None:
        """Defer a result."""
        self.received[delivery.seq] = delivery
        self.awaited.discard(delivery.seq)

    def take(self) -> list[Delivery]:
        """Remove and return the received results, in the order of their arrival."""
        taken, self.received = self.received, {}
        return list(taken.values())

    def leave_unsettled(self) -> tuple[int, ...]:
        """Record that a checkpoint does not include the deferred results; return their numbers."""
        self.unsettled = self.numbers()
        return self.unsettled

    def numbers(self) -> tuple[int, ...]:
        """Return the numbers of all deferred results, received or awaited."""
        return tuple(sorted({*self.received, *self.awaited}))

    def faults(self, position: int) -> Iterator[str]:
        """Yield what contradicts itself, for `AggregatorState.validate_state`."""
        if both := self.received.keys() & self.awaited:
            yield f"results {sorted(both)} are received and awaited"
        if unknown := self.awaited.difference(self.unsettled):
            yield f"results {sorted(unknown)} are awaited, but no checkpoint leaves them out"
        if late := [seq for seq in self.numbers() if seq > position]:
            yield f"results {late} are deferred, but come after message {position}"
