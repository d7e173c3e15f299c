"""The nodes that are connected to an aggregator's run, and the clients that can get tasks.

A run can have a million clients. So an event costs as much as it changes, not as there are clients:
hosts are stored by ranges, and sets of clients as bitmaps with a count for each block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedmq.broker.rejections import Code, Rejection
from fedmq.broker.wire.addresses import EVALUATOR, WORKER
from fedmq.broker.wire.client_map import ClientMap, is_range
from fedmq.broker.wire.schema import Message

Clients = npt.NDArray[np.int64]
"""Numbers of clients, in order."""
Ranges = Sequence[tuple[int, int]]
"""Ranges of clients, both ends included."""
_BLOCK_BITS = 10


class ClientSet:
    """A set of clients that finds the n-th of them without looking at all.

    Args:
        clients: number of clients of the run; the set has numbers below it.
    """

    def __init__(self, clients: int) -> None:
        self._has = np.zeros(clients, np.bool_)
        self._counts = np.zeros((clients >> _BLOCK_BITS) + 1, np.int64)
        self._size = 0

    def __len__(self) -> int:
        """Return the number of clients in the set."""
        return self._size

    def __contains__(self, client: int) -> bool:
        """Return whether a client is in the set."""
        return 0 <= client < len(self._has) and bool(self._has[client])

    def add(self, client: int) -> None:
        """Add a client, if it is not in the set."""
        if not self._has[client]:
            self._has[client] = True
            self._counts[client >> _BLOCK_BITS] += 1
            self._size += 1

    def discard(self, client: int) -> None:
        """Remove a client, if it is in the set."""
        if self._has[client]:
            self._has[client] = False
            self._counts[client >> _BLOCK_BITS] -= 1
            self._size -= 1

    def add_all(self, clients: Clients) -> Clients:
        """Add clients; return those that were not in the set."""
        return self._set(clients[~self._has[clients]], present=True)

    def discard_all(self, clients: Clients) -> Clients:
        """Remove clients; return those that were in the set."""
        return self._set(clients[self._has[clients]], present=False)

    def at(self, positions: Clients) -> Clients:
        """Return the clients at ascending positions of the ordered set."""
        ends = np.cumsum(self._counts)
        blocks = np.searchsorted(ends, positions, side="right")
        found = np.empty(len(positions), np.int64)
        edges = [0, *as_list(np.flatnonzero(blocks[1:] != blocks[:-1]) + 1), len(blocks)]
        for first, end in itertools.pairwise(edges if len(blocks) else ()):
            block = int(blocks[first])
            start = block << _BLOCK_BITS
            members = np.flatnonzero(self._has[start : start + (1 << _BLOCK_BITS)])
            before = ends[block] - self._counts[block]
            found[first:end] = members[positions[first:end] - before] + start
        return found

    def all(self) -> Clients:
        """Return all clients of the set, in order."""
        return np.flatnonzero(self._has)

    def count(self, low: int, high: int) -> int:
        """Return the number of clients in a range, both ends included."""
        return int(np.count_nonzero(self._has[low : high + 1]))

    def missing(self) -> list[tuple[int, int]]:
        """Return the ranges of the clients that are not in the set."""
        edges = np.flatnonzero(np.diff(~self._has, prepend=False, append=False))
        return [(low, high - 1) for low, high in edges.reshape(-1, 2).tolist()]

    def copy(self) -> ClientSet:
        """Return another set with the same clients."""
        found = ClientSet(len(self._has))
        found._has, found._counts = self._has.copy(), self._counts.copy()
        found._size = self._size
        return found

    def faults(self) -> Iterator[str]:
        """Yield what contradicts itself, for `AggregatorState.validate_state`."""
        found = np.bincount(self.all() >> _BLOCK_BITS, minlength=len(self._counts))
        if found.tolist() != self._counts.tolist() or found.sum() != self._size:
            yield f"{self._size} clients are counted as {self._counts}, but there are {found}"

    def _set(self, clients: Clients, *, present: bool) -> Clients:
        self._has[clients] = present
        counts = np.bincount(clients >> _BLOCK_BITS, minlength=len(self._counts))
        self._counts += counts if present else -counts
        self._size += len(clients) if present else -len(clients)
        return clients


class Fleet:
    """The connected nodes.

    Methods that change the reachable clients return those that changed.

    Args:
        clients: number of clients of the run.

    Attributes:
        hosts: the worker of each client whose node is connected.
        reachable: those of them that are available.
        evaluators: names of the evaluators.
        unreported: workers that have yet to report which of their clients are available.
        expects_evaluator: whether a resumed run had an evaluator before.
    """

    def __init__(self, clients: int) -> None:
        self._clients = clients
        self.hosts, self.reachable = ClientMap(), ClientSet(clients)
        self.evaluators: set[str] = set()
        self.unreported: set[str] = set()
        self.expects_evaluator = False

    def joined(self, message: Message) -> tuple[Clients, Clients]:
        """Add a node; return which clients came back and went away.

        It hosts its clients from now on. All of them are available; if it reports which are, all
        are away until then.
        """
        node, ranges = message.body["node"], message.body["clients"]
        if message.body["role"] == EVALUATOR:
            self.evaluators.add(node)
        if message.body["role"] != WORKER:
            return _NOBODY, _NOBODY
        for low, high in ranges:
            self.hosts.assign(low, high, node)
        if message.body.get("reports_availability") is True:
            self.unreported.add(node)
            return _NOBODY, self.reachable.discard_all(numbers_in(ranges))
        self.unreported.discard(node)
        return self.reachable.add_all(numbers_in(ranges)), _NOBODY

    def left(self, message: Message) -> Clients:
        """Remove a node, and the clients that it still hosts."""
        node = message.body["node"]
        self.evaluators.discard(node)
        self.unreported.discard(node)
        return self.reachable.discard_all(numbers_in(self.hosts.remove(node)))

    def availability(self, message: Message) -> tuple[Clients, Clients] | Rejection:
        """Return which clients came back and went away, according to a worker's message.

        Nothing has changed yet: call `came_back`, then `went_away`.
        """
        found = []
        for name in ("back", "away"):
            ranges = message.body.get(name, [])
            if not isinstance(ranges, list) or not all(map(is_range, ranges)):
                text = f"expected ranges [low, high] of clients in {name}"
                return Rejection(Code.MALFORMED, text)
            for low, high in ranges:
                if not self.hosts.hosts_all(message.sender, low, high):
                    text = f"clients {low} to {high} are not with {message.sender}"
                    return Rejection(Code.WRONG_CLIENT, text)
            found.append(numbers_in(ranges))
        return found[0], found[1]

    def reported(self, message: Message) -> None:
        """Record that a worker's message was applied; unless it says so, no other one follows."""
        if message.body.get("more") is not True:
            self.unreported.discard(message.sender)

    def came_back(self, clients: Clients) -> Clients:
        """Record that clients of connected nodes are available."""
        return self.reachable.add_all(clients)

    def went_away(self, clients: Clients) -> Clients:
        """Record that clients of connected nodes are not available."""
        return self.reachable.discard_all(clients)

    def all_gone(self) -> Clients:
        """Remove all nodes: the run was resumed, and they have yet to join."""
        self.expects_evaluator |= bool(self.evaluators)
        gone = self.reachable.all()
        self.resume({}, ())
        return gone

    def suffice(self, clients: int) -> bool:
        """Return whether the nodes of enough clients, and an expected evaluator, are connected.

        A node that reports which of its clients are available counts once it has.
        """
        known = len(self.hosts) - sum(high - low + 1 for low, high in self._unreported_ranges())
        return known >= clients and bool(self.evaluators or not self.expects_evaluator)

    def yet_to_join(self) -> list[tuple[int, int]]:
        """Return the ranges of clients whose node has not joined, or not reported after it."""
        return sorted([*self.hosts.gaps(self._clients), *self._unreported_ranges()])

    def _unreported_ranges(self) -> list[tuple[int, int]]:
        return [each for node in self.unreported for each in self.hosts.ranges_of(node)]

    def num_reachable_of(self, node: str) -> int:
        """Return the number of reachable clients of a node."""
        return sum(self.reachable.count(low, high) for low, high in self.hosts.ranges_of(node))

    @property
    def has_unavailable(self) -> bool:
        """Return whether a client is not available though its node is connected."""
        return len(self.hosts) > len(self.reachable)

    def unavailable(self) -> bytes:
        """Return, as a bitmap, the clients that are not available though their nodes are connected.

        It is empty if there are none.
        """
        if not self.has_unavailable:
            return b""
        bits = np.zeros(self._clients, np.bool_)
        for low, high, _ in self.hosts:
            bits[low : high + 1] = True
        bits[self.reachable.all()] = False
        return np.packbits(bits).tobytes()

    def resume(
        self,
        hosts: Mapping[str, Iterable[tuple[int, int]]],
        evaluators: Iterable[str],
        unavailable: bytes = b"",
        unreported: Iterable[str] = (),
    ) -> None:
        """Restore the nodes of a checkpoint; the arguments are as in `Fold`."""
        self.hosts, self.reachable = ClientMap(), ClientSet(self._clients)
        self.evaluators, self.unreported = set(evaluators), set(unreported)
        for node, ranges in hosts.items():
            for low, high in ranges:
                self.hosts.assign(low, high, node)
        self.reachable.add_all(numbers_in([(low, high) for low, high, _ in self.hosts]))
        bits = np.unpackbits(np.frombuffer(unavailable, np.uint8))[: self._clients]
        self.reachable.discard_all(np.flatnonzero(bits))

    def faults(self) -> Iterator[str]:
        """Yield what contradicts itself, for `AggregatorState.validate_state`."""
        total = self._clients
        if unknown := [(low, high) for low, high, _ in self.hosts if not 0 <= low <= high < total]:
            yield f"clients {unknown} have a host, but the run has {total} clients"
        if lost := [client for client in self.reachable.all() if client not in self.hosts]:
            yield f"clients {lost} are reachable, but have no host"
        yield from self.reachable.faults()


_NOBODY: Clients = np.empty(0, np.int64)


def numbers_in(ranges: Ranges) -> Clients:
    """Return the clients of ranges, each once."""
    lows, highs = np.array(ranges, np.int64).reshape(-1, 2).T
    sizes = highs - lows + 1
    found = np.repeat(highs + 1 - np.cumsum(sizes), sizes) + np.arange(sizes.sum())
    return found if len(lows) < 2 else np.unique(found)


def as_list(clients: Clients) -> list[int]:
    """Return clients as Python's own numbers."""
    found: list[int] = clients.tolist()
    return found
