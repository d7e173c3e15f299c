"""Nodes that wait for a run that has not started: their last Hello, in few bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import msgspec
from msgspec import Struct

from fedmq.broker.access.owners import owner_of
from fedmq.broker.access.quotas import source_of
from fedmq.broker.access.rights import Origin
from fedmq.broker.wire.schema import Hello

_REPORT_EACH_S = 60.0
_decode = msgspec.msgpack.Decoder(Hello).decode
_encode = msgspec.msgpack.Encoder().encode


class Early(Struct, frozen=True):
    """A connection that waits.

    data: its Hello, encoded: as objects, the ranges of many clients take ten times the memory.
    at: when the Hello came, in seconds since 1970.
    """

    name: tuple[str, str, str]
    """Run, node and owner: the newest session of these is the node."""
    origin: Origin
    data: bytes
    at: float

    @property
    def hello(self) -> Hello:
        """Decode the Hello."""
        return _decode(self.data)


class EarlyHellos:
    """The last Hello of each connection that waits.

    Args:
        most: number of connections that may wait.
        lease_s: nodes repeat their Hello while they wait, so one that did not in this time, in
            seconds, is gone.
    """

    def __init__(self, most: int, lease_s: float) -> None:
        self._most, self._lease_s = most, lease_s
        self._waiting: dict[bytes, Early] = {}
        self._report_at = -math.inf

    def __contains__(self, peer: bytes) -> bool:
        """Return whether a connection waits."""
        return peer in self._waiting

    def __iter__(self) -> Iterator[tuple[bytes, Origin]]:
        """Yield the connections that wait, the one that came first before the others."""
        for peer, early in self._waiting.items():
            yield peer, early.origin

    def add(self, peer: bytes, hello: Hello, origin: Origin, now: float) -> bool:
        """Let a connection wait; return False if too many do.

        One key, or one address of another host, cannot take the places of all others.
        """
        if peer not in self._waiting and len(self._waiting) >= self._most:
            since = now - self._lease_s
            self._waiting = {k: each for k, each in self._waiting.items() if each.at > since}
            if len(self._waiting) >= self._most and not self._make_room(source_of(origin)):
                return False
        owner = owner_of(origin.key, hello.key, hello.session)
        # Only an aggregator's configuration is read, and an aggregator never waits.
        data = _encode(msgspec.structs.replace(hello, config=""))
        self._waiting[peer] = Early((hello.run, hello.node, owner), origin, data, now)
        return True

    def may_report(self, now: float) -> bool:
        """Return whether to log that too many wait: once in a while, as each one tries again."""
        due = now >= self._report_at
        if due:
            self._report_at = now + _REPORT_EACH_S
        return due

    def _make_room(self, source: str) -> bool:
        """Remove the oldest connection of the source with the most; False if it is this one."""
        counts = Counter(source_of(each.origin) for each in self._waiting.values())
        largest, number = counts.most_common(1)[0]
        if counts[source] + 1 >= number:
            return False
        waiting = self._waiting.items()
        del self._waiting[next(k for k, each in waiting if source_of(each.origin) == largest)]
        return True

    def discard(self, peer: bytes) -> None:
        """Stop waiting for a connection."""
        self._waiting.pop(peer, None)

    def take(self, now: float) -> list[tuple[bytes, Early]]:
        """Remove all, and return those that are to be tried now.

        Of several sessions of one node, the newest is the node.
        """
        newest = {each.name: (peer, each) for peer, each in self._waiting.items()}
        self._waiting = {}
        since = now - self._lease_s
        return [(peer, each) for peer, each in newest.values() if each.at > since]

    def put_back(self, peer: bytes, early: Early) -> None:
        """Let a connection wait since its last Hello, as before `take`."""
        if peer in self._waiting:
            self._waiting[peer] = early
