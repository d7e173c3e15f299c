"""Failures in a row: they end a run, and clients that fail are skipped for a while.

A pure part of the aggregator's fold. A client that failed at least twice in a row is skipped for
a time that doubles with each failure, up to a limit. So is a node whose clients failed several
times in a row. Synchronous rounds measure this back-off in versions, so that cohorts depend on the
seed and not on the speed of a machine; other schedules measure it in seconds. When no other client
is available, a timer ends the back-off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from msgspec import Struct

from fedmq.broker.rejections import Code
from fedmq.nodes.aggregator.fleet import Fleet
from fedmq.nodes.process.exception_text import clip_text
from fedmq.nodes.run.setup import Setup

RULES = 3
"""Version of the rules for failures and answers, as in a run's record; 0 in older releases.

Since 1, failures in a row are counted. Since 2, metrics and results are checked for their size.
Since 3, a checkpoint has the clients of nodes as ranges, and very large ones are less frequent.
"""
CHECKS_SIZES = 2
"""The first rules by which the sizes of metrics and results are checked."""
COMPACT_CHECKPOINTS = 3
"""The first rules by which the size of checkpoints does not depend on the number of clients."""

_FEWEST, _MOST = 6, 100
_TIMES_EACH = 3
_AT_ONCE_EACH = 2
_DROPPED_PER_FAILURE = 10
"""Number of simulated drop-outs (``worker.drop``) that count as one failure."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_LONGEST_WAIT_VERSIONS = 16
_SHORTEST_TIMER_S = 0.01
_OF_A_CLIENT, _OF_A_NODE = 2, 5
"""Failures in a row of a client, or of all clients of a node, before it is skipped."""


class Failing(Struct):
    """A client or node whose last answers were failures.

    times: failures in a row. waits: number of back-offs because of them.
    due: version, or time, from which it gets tasks again.
    """

    times: int = 0
    waits: int = 0
    due: float = 0.0


class Failures(Struct):
    """The failures in a checkpoint.

    in_a_row: failed tasks and rejected results without a used result in between.
    dropped: number of simulated drop-outs among them.
    last: client and reason of the last one.
    clients, nodes: those whose last answer was a failure.
    wake: time at which the timer of `Progress.timer` is due; 0 without one.
    evaluations: failed evaluations of the model in a row.
    """

    in_a_row: int = 0
    dropped: int = 0
    last: str = ""
    clients: dict[int, Failing] = {}
    nodes: dict[str, Failing] = {}
    wake: float = 0.0
    evaluations: int = 0


def failures_allowed(setup: Setup, wanted: int | None) -> int:
    """Return the number of failures in a row that ends a run; ``wanted``: the configured number.

    By default it allows three tasks per client, within limits, and in any case twice the number of
    concurrent tasks.
    """
    if wanted is not None:
        return wanted
    clients = setup.problem.clients
    at_once = min(clients, setup.schedule.at_once(clients))
    return max(_FEWEST, min(_TIMES_EACH * clients, _MOST), _AT_ONCE_EACH * at_once)


class Progress:
    """Counts failures in a row, and determines the clients to skip.

    Args:
        setup: objects of the run.
        rules: version of the rules; with 0 nothing is counted and no client is skipped.

    Attributes:
        failures: the counts.
        version, now: the aggregator's version and time.
    """

    def __init__(self, setup: Setup, rules: int) -> None:
        self.rules = rules
        self._setup = setup
        self.allow(setup.config.run.failures)
        self.failures = Failures()
        self.version, self.now = 0, 0.0
        self._by_version = setup.schedule.ordered

    def resume(self, failures: Failures, rules: int, version: int, now: float) -> None:
        """Restore the failures of a checkpoint; a run keeps the rules that it started with."""
        self.failures, self.rules, self.version, self.now = failures, rules, version, now

    def allow(self, failures: int | None) -> None:
        """Set the number of failures in a row that ends the run; None for the default."""
        self.allowed = failures_allowed(self._setup, failures)

    def start_over(self) -> None:
        """Reset the failures: the run was resumed, and their cause may be fixed."""
        self.failures = Failures()

    def used(self, client: int, node: str) -> None:
        """Record that a result is in a version."""
        self.failures.in_a_row = self.failures.dropped = 0
        self.answered(client, node)

    def answered(self, client: int, node: str) -> None:
        """Record that a client has done a task, whether or not its result is used."""
        self.failures.clients.pop(client, None)
        self.failures.nodes.pop(node, None)

    def failed(self, client: int, node: str, code: str, reason: str, where: str = "") -> None:
        """Record that a task failed, or that its result was rejected."""
        if not self.rules:
            return
        place = f" ({clip_text(where)})" if where else ""
        self.failures.in_a_row += 1
        self.failures.last = f"client {client}: {clip_text(reason)}{place}"
        if code == Code.DROPPED:  # simulated, see ``worker.drop``
            self.failures.dropped += 1
            return
        one = self.failures.clients.setdefault(client, Failing())
        one.times += 1
        if one.times >= _OF_A_CLIENT:
            self._back_off(one, _LONGEST_WAIT_S)
        host = self.failures.nodes.setdefault(node, Failing())
        host.times += 1
        if host.times >= _OF_A_NODE and not self._waits(host):
            self._back_off(host, _FIRST_WAIT_S)

    @property
    def hopeless(self) -> str:
        """Return the reason if the run has too many failures in a row, else ""."""
        failures = self.failures
        counted = failures.in_a_row - failures.dropped + failures.dropped // _DROPPED_PER_FAILURE
        if not self.rules or counted < self.allowed:
            return ""
        return (
            f"{failures.in_a_row} tasks in a row failed or were rejected (run.failures); the last, "
            f"of {failures.last}"
        )

    def evaluated(self, failed: str, key: str) -> str:
        """Record the end of an evaluation of the model.

        Args:
            failed: why it failed, or "".
            key: of the goal that needs it, such as ``run.target_accuracy``.

        Returns:
            The reason if too many evaluations failed, else "".
        """
        self.failures.evaluations = self.failures.evaluations + 1 if failed else 0
        if not self.rules or self.failures.evaluations < self.allowed:
            return ""
        return (
            f"{self.failures.evaluations} evaluations in a row failed (run.failures), and "
            f"{key} needs them; the last: {clip_text(failed)}"
        )

    def skipped(self, fleet: Fleet) -> tuple[list[int], list[str]]:
        """Return the clients, and the nodes with all their clients, that are skipped now.

        Each of them is reachable, or has a reachable client.
        """
        failures = self.failures
        if not failures.clients and not failures.nodes:
            return [], []  # the usual case, without work
        clients, nodes = failures.clients.items(), failures.nodes.items()
        return (
            [k for k, each in clients if self._waits(each) and k in fleet.reachable],
            [name for name, each in nodes if self._waits(each) and fleet.num_reachable_of(name)],
        )

    def timer(self, fleet: Fleet) -> float | None:
        """Return the seconds until a client is available again; None if no timer is needed."""
        soonest = self._soonest(fleet)
        if not soonest:
            return None
        if self._by_version:
            after = _seconds(min(max(each.waits for each in causes) for causes in soonest))
        else:
            due = max(each.due for each in soonest[0])
            after = max(_SHORTEST_TIMER_S, due - self.now)
        if self.failures.wake and self.failures.wake <= self.now + after:
            return None
        self.failures.wake = self.now + after
        return after

    def timer_is_over(self, fleet: Fleet) -> None:
        """End the back-off of the clients that are due first."""
        self.failures.wake = 0.0
        if self._by_version:
            for causes in self._soonest(fleet):
                for each in causes:
                    each.due = self._clock

    def faults(self) -> Iterator[str]:
        """Yield what contradicts itself, for `AggregatorState.validate_state`."""
        failures = self.failures
        if not 0 <= failures.dropped <= failures.in_a_row:
            yield f"{failures.dropped} of {failures.in_a_row} failures in a row are drop-outs"
        for who, each in (*failures.clients.items(), *failures.nodes.items()):
            if each.times < 1 or each.waits > each.times:
                yield f"{who} has {each.waits} back-offs after {each.times} failures"

    @property
    def _clock(self) -> float:
        return self.version if self._by_version else self.now

    def _waits(self, one: Failing) -> bool:
        # A clock can be set back: no back-off is longer than the longest.
        longest = _LONGEST_WAIT_VERSIONS + 1 if self._by_version else _LONGEST_WAIT_S
        return self._clock < one.due <= self._clock + longest

    def _back_off(self, one: Failing, longest_s: float) -> None:
        one.waits += 1
        if self._by_version:
            skipped = min(2 ** min(one.waits - 1, 10), _LONGEST_WAIT_VERSIONS)
            one.due = float(self.version + 1 + skipped)
        else:
            one.due = self.now + min(_seconds(one.waits), longest_s)

    def _soonest(self, fleet: Fleet) -> list[list[Failing]]:
        """Return the failures because of which clients are skipped that are available first.

        They are the failures of one client and its node, or those of a node for all its clients
        without failures of their own.
        """
        failures = self.failures
        clients, nodes = self.skipped(fleet)
        every: list[list[Failing]] = []
        own = Counter[str]()
        for client in clients:
            node = fleet.hosts.get(client) or ""
            own[node] += 1
            every.append([failures.clients[client]] + [failures.nodes[node]] * (node in nodes))
        every += [
            [failures.nodes[node]] for node in nodes if own[node] < fleet.num_reachable_of(node)
        ]
        dues = [max(each.due for each in causes) for causes in every]
        first = min(dues, default=0.0)
        return [causes for causes, due in zip(every, dues, strict=True) if due <= first]


def _seconds(waits: int) -> float:
    return float(min(_FIRST_WAIT_S * 2.0 ** min(waits - 1, 10), _LONGEST_WAIT_S))
