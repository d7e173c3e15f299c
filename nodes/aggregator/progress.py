"""Whether a run gets anywhere: failures in a row, and clients that are not asked again at once.

A pure part of the aggregator's fold. A client that failed twice or more in a row is skipped for a
while that doubles with each failure, up to a limit. So is a node, several of whose clients failed
one after the other. Under synchronous rounds the while is counted in versions, so that cohorts
follow from the seed and not from the speed of a machine; under other schedules in seconds. When
nobody else can be asked, a timer ends the wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from fedmq.broker.rejections import Code
from fedmq.nodes.process.exception_text import clip_text
from fedmq.nodes.run.setup import Setup

RULES = 1
"""Version of the rules in this module. A run's record names it; older releases have none: 0."""

_FEWEST, _MOST = 6, 100
_TIMES_EACH = 3
_AT_ONCE_EACH = 2
_DROPPED_PER_FAILURE = 10
"""Number of clients gone on demand (``worker.drop``) that count as one failure."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_LONGEST_WAIT_VERSIONS = 16
_SHORTEST_TIMER_S = 0.01
_OF_A_CLIENT, _OF_A_NODE = 2, 5
"""Failures in a row of a client, or of all clients of a node, before it is made to wait."""


class Failing(Struct):
    """A client or node whose last answers were failures.

    times: failures in a row. waits: how often it was made to wait for them.
    due: from this version, or time, on it may be asked again.
    """

    times: int = 0
    waits: int = 0
    due: float = 0.0


class Failures(Struct):
    """What a checkpoint holds of failures.

    in_a_row: failed and rejected tasks without a used result in between. dropped: of them, those
        that went away on demand. last: which the last one was, and why.
    clients, nodes: those that failed last time.
    wake: when the timer of `Progress.timer` is due; 0 without one.
    evaluations: of the model that failed, without one in between that did not.
    """

    in_a_row: int = 0
    dropped: int = 0
    last: str = ""
    clients: dict[int, Failing] = {}
    nodes: dict[str, Failing] = {}
    wake: float = 0.0
    evaluations: int = 0


def failures_allowed(setup: Setup, wanted: int | None) -> int:
    """Return how many failures in a row end a run; ``wanted``: what was asked for, if anything.

    By default each client of a small run is tried three times, and of any run as many tasks
    may fail as twice go out at once.
    """
    if wanted is not None:
        return wanted
    clients = setup.problem.clients
    at_once = min(clients, setup.schedule.at_once(clients))
    return max(_FEWEST, min(_TIMES_EACH * clients, _MOST), _AT_ONCE_EACH * at_once)


class Progress:
    """Counts failures in a row, and says who may be asked again.

    Args:
        setup: what is learned, and when.
        rules: 0: nothing is counted, and everybody may be asked.

    Attributes:
        failures: what has been counted.
        version, now: of the aggregator.
    """

    def __init__(self, setup: Setup, rules: int) -> None:
        self.rules = rules
        self._setup = setup
        self.allow(setup.config.run.failures)
        self.failures = Failures()
        self.version, self.now = 0, 0.0
        self._by_version = setup.schedule.ordered

    def resume(self, failures: Failures, rules: int, version: int, now: float) -> None:
        """Take over what a checkpoint tells; a run goes on by the rules that it began with."""
        self.failures, self.rules, self.version, self.now = failures, rules, version, now

    def allow(self, failures: int | None) -> None:
        """Set how many failures in a row end the run; None for the default."""
        self.allowed = failures_allowed(self._setup, failures)

    def start_over(self) -> None:
        """Forget what failed: the run was taken up again, and its cause may be mended."""
        self.failures = Failures()

    def used(self, client: int, node: str) -> None:
        """Note that a result is in a version."""
        self.failures.in_a_row = self.failures.dropped = 0
        self.answered(client, node)

    def answered(self, client: int, node: str) -> None:
        """Note that a client has done a task, whether or not its result still counts."""
        self.failures.clients.pop(client, None)
        self.failures.nodes.pop(node, None)

    def failed(self, client: int, node: str, code: str, reason: str, where: str = "") -> None:
        """Note that a task failed, or that its result was rejected."""
        if not self.rules:
            return
        place = f" ({clip_text(where)})" if where else ""
        self.failures.in_a_row += 1
        self.failures.last = f"client {client}: {clip_text(reason)}{place}"
        if code == Code.DROPPED:  # an experiment: it was asked to
            self.failures.dropped += 1
            return
        one = self.failures.clients.setdefault(client, Failing())
        one.times += 1
        if one.times >= _OF_A_CLIENT:
            self._let_wait(one, _LONGEST_WAIT_S)
        host = self.failures.nodes.setdefault(node, Failing())
        host.times += 1
        if host.times >= _OF_A_NODE and not self._waits(host):
            self._let_wait(host, _FIRST_WAIT_S)

    @property
    def hopeless(self) -> str:
        """Return why the run is to end, if too much has failed, or ""."""
        failures = self.failures
        counted = failures.in_a_row - failures.dropped + failures.dropped // _DROPPED_PER_FAILURE
        if not self.rules or counted < self.allowed:
            return ""
        return (
            f"{failures.in_a_row} tasks in a row failed or were rejected (run.failures); the last, "
            f"of {failures.last}"
        )

    def evaluated(self, failed: str) -> str:
        """Note that an evaluation of the model is over, and why it failed, if it did.

        Returns:
            Why a run that ends at a target is to end now; "" if it is not.
        """
        self.failures.evaluations = self.failures.evaluations + 1 if failed else 0
        if not self.rules or self.failures.evaluations < self.allowed:
            return ""
        return (
            f"{self.failures.evaluations} evaluations in a row failed (run.failures), and "
            f"run.target_accuracy needs them; the last: {clip_text(failed)}"
        )

    def waiting(self, hosts: Mapping[int, str]) -> set[int]:
        """Return the clients, of these, that are not to be asked now."""
        failures = self.failures
        if not failures.clients and not failures.nodes:
            return set()  # as nearly always
        found = {k for k, each in failures.clients.items() if self._waits(each) and k in hosts}
        nodes = {name for name, each in failures.nodes.items() if self._waits(each)}
        return found | {k for k, host in hosts.items() if host in nodes} if nodes else found

    def timer(self, hosts: Mapping[int, str]) -> float | None:
        """Return after how many seconds a client may be asked again; None if no timer is needed."""
        waiting = self.waiting(hosts)
        if not waiting:
            return None
        if self._by_version:
            soonest = self._soonest(waiting, hosts)
            after = _seconds(min(max(each.waits for each in kept) for kept in soonest))
        else:
            after = max(_SHORTEST_TIMER_S, self._due(waiting, hosts) - self.now)
        if self.failures.wake and self.failures.wake <= self.now + after:
            return None
        self.failures.wake = self.now + after
        return after

    def timer_is_over(self, hosts: Mapping[int, str]) -> None:
        """Let those be asked again who have waited longest."""
        self.failures.wake = 0.0
        waiting = self.waiting(hosts)
        if self._by_version and waiting:
            for kept in self._soonest(waiting, hosts):
                for each in kept:
                    each.due = self._clock

    @property
    def _clock(self) -> float:
        return self.version if self._by_version else self.now

    def _waits(self, one: Failing) -> bool:
        # A clock may be set back: nobody waits for longer than the longest wait.
        longest = _LONGEST_WAIT_VERSIONS + 1 if self._by_version else _LONGEST_WAIT_S
        return self._clock < one.due <= self._clock + longest

    def _let_wait(self, one: Failing, longest_s: float) -> None:
        one.waits += 1
        if self._by_version:
            skipped = min(2 ** min(one.waits - 1, 10), _LONGEST_WAIT_VERSIONS)
            one.due = float(self.version + 1 + skipped)
        else:
            one.due = self.now + min(_seconds(one.waits), longest_s)

    def _of(self, client: int, hosts: Mapping[int, str]) -> list[Failing]:
        """Return what keeps a client waiting."""
        found = (self.failures.clients.get(client), self.failures.nodes.get(hosts[client]))
        return [each for each in found if each is not None and self._waits(each)]

    def _due(self, waiting: Iterable[int], hosts: Mapping[int, str]) -> float:
        """Return when the first of some clients may be asked again."""
        return min(max(each.due for each in self._of(k, hosts)) for k in waiting)

    def _soonest(self, waiting: set[int], hosts: Mapping[int, str]) -> list[list[Failing]]:
        """Return what keeps those waiting, each of them, who may be asked first."""
        due = self._due(waiting, hosts)
        every = [self._of(client, hosts) for client in waiting]
        return [kept for kept in every if max(each.due for each in kept) <= due]


def _seconds(waits: int) -> float:
    return float(min(_FIRST_WAIT_S * 2.0 ** min(waits - 1, 10), _LONGEST_WAIT_S))
