"""Which node hosts each client or address, stored by ranges: a node can host a million clients."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

from msgspec.structs import replace

from fedmq.broker.wire.addresses import CLIENT, WORKER, addresses
from fedmq.broker.wire.schema import Hello, Range


class ClientMap:
    """The node of each client that has one.

    Memory and time depend on the number of ranges, not on that of clients. Neighbouring ranges of
    one node are joined, so two maps with the same content are equal.
    """

    def __init__(self) -> None:
        self._lows: list[int] = []
        self._highs: list[int] = []
        self._nodes: list[str] = []
        self._size = 0

    def __len__(self) -> int:
        """Return the number of clients that have a node."""
        return self._size

    def __contains__(self, client: int) -> bool:
        """Return whether a client has a node."""
        return self.get(client) is not None

    def __eq__(self, other: object) -> bool:
        """Return whether another map has the same content."""
        return isinstance(other, ClientMap) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment] # it can change

    def __iter__(self) -> Iterator[tuple[int, int, str]]:
        """Yield (low, high, node) of each range in order, both ends included."""
        return zip(self._lows, self._highs, self._nodes, strict=True)

    def get(self, client: int) -> str | None:
        """Return the node of a client, or None."""
        at = bisect_right(self._lows, client) - 1
        return self._nodes[at] if at >= 0 and client <= self._highs[at] else None

    def hosts_all(self, node: str, low: int, high: int) -> bool:
        """Return whether a node hosts all clients of a range, both ends included."""
        at = bisect_right(self._lows, low) - 1
        return at >= 0 and high <= self._highs[at] and self._nodes[at] == node

    def between(self, low: int, high: int) -> Iterator[tuple[int, int, str]]:
        """Yield (low, high, node) of the parts of a range, both ends included, that have a node."""
        first, end = bisect_left(self._highs, low), bisect_right(self._lows, high)
        for at in range(first, end):
            yield max(low, self._lows[at]), min(high, self._highs[at]), self._nodes[at]

    def ranges_of(self, node: str) -> list[tuple[int, int]]:
        """Return the ranges of a node's clients, both ends included."""
        return [(low, high) for low, high, host in self if host == node]

    def by_node(self) -> dict[str, list[tuple[int, int]]]:
        """Return the ranges of all nodes."""
        found: dict[str, list[tuple[int, int]]] = {}
        for low, high, node in self:
            found.setdefault(node, []).append((low, high))
        return found

    def gaps(self, clients: int) -> list[tuple[int, int]]:
        """Return the ranges of the clients without a node, of those numbered below ``clients``."""
        ends = zip([-1, *self._highs], [*self._lows, clients], strict=True)
        return [(high + 1, low - 1) for high, low in ends if high + 1 < low]

    def assign(self, low: int, high: int, node: str) -> None:
        """Let a node host the clients of a range, both ends included."""
        self.clear(low, high)
        at = bisect_left(self._lows, low)
        self._size += high - low + 1
        if at < len(self._lows) and (self._lows[at], self._nodes[at]) == (high + 1, node):
            high = self._highs[at]
            self._replace(at, at + 1, [])
        if at > 0 and (self._highs[at - 1], self._nodes[at - 1]) == (low - 1, node):
            at -= 1
            low = self._lows[at]
            self._replace(at, at + 1, [])
        self._replace(at, at, [(low, high, node)])

    def clear(self, low: int, high: int) -> None:
        """Remove the clients of a range, both ends included."""
        first, end = bisect_left(self._highs, low), bisect_right(self._lows, high)
        rest = []
        for at in range(first, end):
            before, after, node = self._lows[at], self._highs[at], self._nodes[at]
            self._size -= min(after, high) - max(before, low) + 1
            rest += [(before, low - 1, node)] if before < low else []
            rest += [(high + 1, after, node)] if after > high else []
        self._replace(first, end, rest)

    def remove(self, node: str) -> list[tuple[int, int]]:
        """Remove the clients of a node; return their ranges."""
        removed = self.ranges_of(node)
        for low, high in removed:
            self.clear(low, high)
        return removed

    def _replace(self, first: int, end: int, ranges: list[tuple[int, int, str]]) -> None:
        self._lows[first:end] = [low for low, _, _ in ranges]
        self._highs[first:end] = [high for _, high, _ in ranges]
        self._nodes[first:end] = [node for _, _, node in ranges]


class AddressMap:
    """The node that hosts each address of a run: a dictionary in which clients are ranges."""

    def __init__(self) -> None:
        self._clients = ClientMap()
        self._others: dict[str, str] = {}

    def __len__(self) -> int:
        """Return the number of addresses that have a node."""
        return len(self._clients) + len(self._others)

    def __contains__(self, address: str) -> bool:
        """Return whether an address has a node."""
        return self.get(address) is not None

    def get(self, address: str) -> str | None:
        """Return the name of the node that hosts an address, or None."""
        kind, _, number = address.partition("/")
        if kind == CLIENT and number.isascii() and number.isdecimal():
            return self._clients.get(int(number))
        return self._others.get(address)

    def add(self, hello: Hello) -> None:
        """Let a node host its addresses."""
        self._others |= dict.fromkeys(addresses(_without_clients(hello)), hello.node)
        for low, high in _clients_of(hello):
            self._clients.assign(low, high, hello.node)

    def remove(self, hello: Hello) -> None:
        """Remove those addresses of a node that it still hosts."""
        for address in addresses(_without_clients(hello)):
            if self._others.get(address) == hello.node:
                del self._others[address]
        for low, high in _clients_of(hello):
            for first, last, node in [*self._clients.between(low, high)]:
                if node == hello.node:
                    self._clients.clear(first, last)

    def hosted(self, hello: Hello) -> Iterator[tuple[str, str]]:
        """Yield (address, node) of addresses of a Hello that have a node; of a range, the first."""
        for address in addresses(_without_clients(hello)):
            if (node := self._others.get(address)) is not None:
                yield address, node
        for low, high in _clients_of(hello):
            for first, _, node in self._clients.between(low, high):
                yield f"{CLIENT}/{first}", node

    def nodes(self) -> set[str]:
        """Return the names of all nodes."""
        return {*self._others.values(), *(node for _, _, node in self._clients)}


def _without_clients(hello: Hello) -> Hello:
    return replace(hello, clients=())


def _clients_of(hello: Hello) -> Sequence[Range]:
    return hello.clients if hello.role == WORKER else ()


def is_range(value: object) -> bool:
    """Return whether a value from a message is a range [low, high] of clients."""
    match value:
        case [int(low), int(high)]:
            return type(low) is type(high) is int and 0 <= low <= high
    return False
