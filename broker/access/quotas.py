"""Count live sessions and joins by where they come from, so that one peer cannot use up a limit."""

from __future__ import annotations

import functools
import ipaddress
from collections import Counter

from fedmq.broker.access.rights import Origin
from fedmq.broker.settings import Limits

JOINS_AT_ONCE = 20
"""Joins of one node that its rate does not limit, as when it is restarted; of a source, all of its
sessions may begin twice."""
RESTARTS_AT_ONCE = 4
"""Hellos of one session that are answered with all its deliveries; then one per heartbeat."""
RUNS_PER_S = 1.0
"""Runs that a key may open, on average; as many at once as the broker may have."""
_MOST_SOURCES = 10_000
_HOST_BITS = 64
"""Length of the prefix of a network that one host may have to itself."""


class Bucket:
    """A token bucket: it allows a number of events at once, and later ones at a rate.

    Args:
        size: tokens of a full bucket, with which it begins.
    """

    def __init__(self, size: float) -> None:
        self._size = self._tokens = size
        self._at = 0.0

    def take(self, now: float, per_s: float) -> bool:
        """Take a token if there is one; ``per_s`` tokens come back each second."""
        self._tokens = min(self._size, self._tokens + max(0.0, now - self._at) * per_s)
        self._at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def wait_s(self, per_s: float) -> float:
        """Return the seconds from the last `take` until there is a token."""
        return max(0.0, (1.0 - self._tokens) / per_s)


class Quotas:
    """The live sessions and the joins of each source: a key, or another host (see `network_of`).

    Connections without a key from this host are not counted by source: all its users share one.

    Args:
        limits: of the broker.

    Attributes:
        sessions: number of live sessions by source.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.sessions: Counter[str] = Counter()
        self._joins: dict[str, Bucket] = {}
        self._opened: dict[str, Bucket] = {}
        """By key; all connections without one share a bucket."""

    def has_room(self, origin: Origin) -> bool:
        """Return whether one more session from this origin may begin."""
        source = source_of(origin)
        return not source or self.sessions[source] < self._limits.sessions

    def may_join(self, origin: Origin, own: Bucket, now: float) -> bool:
        """Count a join; return whether its source and its node, with its own bucket, may."""
        if not own.take(now, self._limits.joins_per_s):
            return False
        source = source_of(origin)
        if not source:
            return True
        if source not in self._joins:
            if len(self._joins) >= _MOST_SOURCES:
                del self._joins[next(iter(self._joins))]
            self._joins[source] = Bucket(2 * self._limits.sessions)
        return self._joins[source].take(now, self._limits.joins_per_s * JOINS_AT_ONCE)

    def join_wait_s(self, origin: Origin, own: Bucket) -> float:
        """Return the seconds after which a node that `may_join` has just refused may join."""
        waits = [own.wait_s(self._limits.joins_per_s)]
        if of_source := self._joins.get(source_of(origin)):
            waits.append(of_source.wait_s(self._limits.joins_per_s * JOINS_AT_ONCE))
        return max(waits)

    def may_open(self, origin: Origin, now: float) -> bool:
        """Count a run that is opened; return whether it may be.

        A run that has ended stays in the ledger, and in memory; so their rate is limited, too.
        """
        bucket = self._opened.setdefault(origin.key, Bucket(self._limits.runs))
        return bucket.take(now, RUNS_PER_S)

    def open_wait_s(self, origin: Origin) -> float:
        """Return the seconds after which a run that `may_open` has just refused may be opened."""
        return self._opened[origin.key].wait_s(RUNS_PER_S)

    def begin(self, origin: Origin) -> None:
        """Count a session that begins."""
        if source := source_of(origin):
            self.sessions[source] += 1

    def end(self, origin: Origin) -> None:
        """Count a session that has ended."""
        if source := source_of(origin):
            self.sessions[source] -= 1
            if not self.sessions[source]:
                del self.sessions[source]


def source_of(origin: Origin) -> str:
    """Return the source that a connection counts for; "" for one without a key on this host."""
    return origin.key or ("" if origin.is_local else network_of(origin.address))


@functools.lru_cache(maxsize=1024)
def network_of(address: str) -> str:
    """Return what counts as one host: an IPv4 address, or the /64 network of an IPv6 address.

    A host with IPv6 usually has a whole /64 to choose its address from. The neighbours on one
    link, whose addresses are link-local, share theirs.
    """
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    is_ipv6 = isinstance(found, ipaddress.IPv6Address) and not found.ipv4_mapped
    if not is_ipv6 or found.is_link_local or found.is_loopback:
        return address
    return str(ipaddress.ip_network((found.packed[:8] + bytes(8), _HOST_BITS)))
