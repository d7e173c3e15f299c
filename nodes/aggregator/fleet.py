"""The nodes that are connected to an aggregator's run, according to its inbox."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from fedmq.broker.wire.addresses import EVALUATOR, WORKER
from fedmq.broker.wire.schema import Message


@dataclass
class Fleet:
    """The connected nodes.

    hosts: the worker of each reachable client.
    evaluators: names of the evaluators.
    changes: number of changes so far; values derived from ``hosts`` are valid until the next one.
    expects_evaluator: whether a resumed run had an evaluator before.
    """

    hosts: dict[int, str] = field(default_factory=dict)
    evaluators: set[str] = field(default_factory=set)
    changes: int = 0
    expects_evaluator: bool = False

    def joined(self, message: Message) -> None:
        """Add a node; it hosts its clients from now on."""
        self.changes += 1
        node = message.body["node"]
        if message.body["role"] == EVALUATOR:
            self.evaluators.add(node)
        elif message.body["role"] == WORKER:
            for low, high in message.body["clients"]:
                self.hosts.update(dict.fromkeys(range(low, high + 1), node))

    def left(self, message: Message) -> None:
        """Remove a node, and the clients that it still hosts."""
        self.changes += 1
        node = message.body["node"]
        self.evaluators.discard(node)
        self.hosts = {client: host for client, host in self.hosts.items() if host != node}

    def all_gone(self) -> None:
        """Remove all nodes: the run was resumed, and they have yet to join."""
        self.expects_evaluator |= bool(self.evaluators)
        self.resume({}, ())

    def suffice(self, clients: int) -> bool:
        """Return whether enough clients are reachable, and an expected evaluator is back."""
        return len(self.hosts) >= clients and bool(self.evaluators or not self.expects_evaluator)

    def resume(self, hosts: dict[int, str], evaluators: Iterable[str]) -> None:
        """Restore the nodes of a checkpoint."""
        self.changes += 1
        self.hosts, self.evaluators = hosts, set(evaluators)

    def faults(self, clients: int) -> Iterator[str]:
        """Yield what contradicts itself, for `AggregatorState.validate_state`."""
        if unknown := [client for client in self.hosts if not 0 <= client < clients]:
            yield f"clients {unknown} have a host, but the run has {clients} clients"
