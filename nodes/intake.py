"""Results as they come: which of them count, how much, and in what order they are added up."""

from __future__ import annotations

from typing import Any

from fedmq.algorithms.base import examples_of
from fedmq.algorithms.errors import ResultError
from fedmq.codecs.errors import CodecError
from fedmq.nodes.checkpoint import Counts
from fedmq.nodes.gathering import Gathering, room_for
from fedmq.nodes.inbox import AggregatorAction, Done, Inbound
from fedmq.nodes.payload import numbers_of
from fedmq.nodes.setup import Setup
from fedmq.nodes.tasks import Tasks


class Intake:
    """What an aggregator does with results, towards its next version.

    Args:
        setup: what is learned, and when.
        tasks: that results answer.
        state: the algorithm's, of the first version.

    Attributes:
        current: what has been gathered.
        counts: what became of all results so far.
        reply: what a result is to be: a model, an update.
    """

    def __init__(self, setup: Setup, tasks: Tasks, state: Any) -> None:
        self._algorithm, self._schedule, self._tasks = setup.algorithm, setup.schedule, tasks
        self._most_bytes = room_for(setup.algorithm, state)
        self.reply = setup.algorithm.sends or setup.schedule.reply
        self.counts = Counts()
        self.begin_version(state)

    def begin_version(self, state: Any) -> None:
        """Begin to gather towards the version after this one."""
        self.current = Gathering(self._algorithm.gather(state))

    def take(
        self, inbound: Inbound, state: Any, version: int, out: list[AggregatorAction]
    ) -> str | None:
        """Take a result: "" if used or not needed, a reason if refused, None if held."""
        message = inbound.message
        flight = self._tasks.answered(message)
        if isinstance(flight, str):
            self.counts.refused += 1
            return flight
        if message.kind == "failed":
            self.counts.dropped += 1
            return ""
        staleness = version - flight.version
        try:
            numbers = numbers_of(message)
            n = examples_of(numbers)
            if numbers.get("reply", self.reply) != self.reply:
                raise ResultError(f"expected reply {self.reply!r}")
        except (ResultError, CodecError) as error:
            self.counts.refused += 1
            return str(error)
        weight = self._schedule.weight(n, staleness)
        if weight is None:
            self.counts.stale += 1
            return f"too stale: {staleness} versions behind"
        self.current.staleness.append(staleness)
        if self._schedule.ordered and not staleness:
            self.current.held[message.re or ""] = (inbound, weight, flight.client)
            self.current.contributed.add(flight.client)
            self.add_in_order(state, out)
            return None
        return self._add(state, inbound, weight, flight.client, staleness)

    def add_in_order(
        self, state: Any, out: list[AggregatorAction], *, everything: bool = False
    ) -> None:
        """Add up held results in cohort order, up to the first that is still out."""
        current = self.current
        if not current.held:
            return
        order, flights = current.order, self._tasks.flights
        # It ends: the task of a held result is in the order.
        while order[current.settled] not in current.held and order[current.settled] not in flights:
            current.settled += 1
        for index in range(current.settled, len(order)):
            name = order[index]
            if name in current.held:
                inbound, weight, client = current.held.pop(name)
                refused = self._add(state, inbound, weight, client, 0)
                if refused:
                    current.contributed.discard(client)
                out.append(Done(inbound.seq, refused))
            elif not everything and self._tasks.is_expected(name):
                return

    def _add(self, state: Any, inbound: Inbound, weight: float, client: int, staleness: int) -> str:
        """Add one result to the version; return why it was refused, or ""."""
        about = client, staleness
        reason = self.current.absorb(
            self._algorithm, state, inbound, weight, about, self._most_bytes
        )
        self.counts.refused += bool(reason)
        self.counts.used += not reason
        return reason
