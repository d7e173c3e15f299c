"""Which faults histories had: how many had each kind, and which kinds met in one history."""

import itertools
from collections import Counter

from fedmq.broker.virtual.disk import DiskFault

KINDS = frozenset(
    (
        "frame lost",
        "frame duplicated",
        "frame delayed past others",
        "connection cut",
        "partition",
        "broker killed",
        "broker killed while it sends",
        "broker killed in a disk operation",
        "broker suspended and continued",
        "broker suspended and killed",
        "power failure",
        "aggregator killed",
        "worker killed",
        "evaluator killed",
        "node killed after a frame",
        "node suspended and continued",
        "node suspended and killed",
        "disk full",
        *DiskFault,
        "clock set forward",
        "clock set back",
        "clock at another rate",
        "key revoked",
        "key replaced",
        "key enrolled",
        "attack",
    )
)
"""All kinds of faults. Any two can meet in one history."""


class Coverage:
    """Counts histories.

    Attributes:
        histories: number of histories.
        kinds: number of those that had a fault of each kind.
        pairs: number of those that had faults of both kinds, by the sorted pair.
    """

    def __init__(self):
        self.histories = 0
        self.kinds, self.pairs = Counter(), Counter()

    def add(self, kinds):
        """Add a history with faults of these kinds."""
        self.histories += 1
        kinds = sorted(str(each) for each in kinds)
        self.kinds.update(kinds)
        self.pairs.update(itertools.combinations(kinds, 2))

    def update(self, other):
        """Add the histories of another object."""
        self.histories += other.histories
        self.kinds.update(other.kinds)
        self.pairs.update(other.pairs)

    @property
    def missing(self):
        """Return the kinds that no history had."""
        return sorted(str(each) for each in KINDS - self.kinds.keys())

    @property
    def missing_pairs(self):
        """Return the pairs of kinds that met in no history."""
        pairs = itertools.combinations(sorted(str(each) for each in KINDS), 2)
        return [pair for pair in pairs if pair not in self.pairs]

    def report(self):
        """Return lines for people: the kinds, the pairs, and the rarest of both."""
        lines = [f"{times:7d} {kind}" for kind, times in self.kinds.most_common()]
        lines += [f"      0 {kind}" for kind in self.missing]
        possible = len(KINDS) * (len(KINDS) - 1) // 2
        lines.append(f"pairs of kinds that met: {possible - len(self.missing_pairs)} of {possible}")
        rarest = self.missing_pairs[:10] or [pair for pair, _ in self.pairs.most_common()[:-6:-1]]
        lines += [f"{self.pairs[pair]:7d} {' + '.join(pair)}" for pair in rarest]
        return lines
