"""Who is here to work for an aggregator, as its inbox tells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fedmq.broker.wire.addresses import EVALUATOR, WORKER
from fedmq.broker.wire.schema import Message


@dataclass
class Fleet:
    """The nodes that are here.

    hosts: the worker that hosts each client that can be reached.
    evaluators: names of the evaluators.
    changes: how often a node has come or gone; what was worked out from the hosts before the
        last change no longer holds.
    expects_evaluator: whether one was here when a run stopped that was taken up again.
    """

    hosts: dict[int, str] = field(default_factory=dict)
    evaluators: set[str] = field(default_factory=set)
    changes: int = 0
    expects_evaluator: bool = False

    def joined(self, message: Message) -> None:
        """Take in a node; clients that it hosts are with it from now on."""
        self.changes += 1
        node = message.body["node"]
        if message.body["role"] == EVALUATOR:
            self.evaluators.add(node)
        elif message.body["role"] == WORKER:
            for low, high in message.body["clients"]:
                self.hosts.update(dict.fromkeys(range(low, high + 1), node))

    def left(self, message: Message) -> None:
        """Let a node go, and the clients that are still with it."""
        self.changes += 1
        node = message.body["node"]
        self.evaluators.discard(node)
        self.hosts = {client: host for client, host in self.hosts.items() if host != node}

    def all_gone(self) -> None:
        """Let everybody go: the run was taken up again, and its nodes are yet to come."""
        self.expects_evaluator |= bool(self.evaluators)
        self.resume({}, ())

    def suffice(self, clients: int) -> bool:
        """Tell whether this many clients can be reached, and an evaluator that was here is back."""
        return len(self.hosts) >= clients and bool(self.evaluators or not self.expects_evaluator)

    def resume(self, hosts: dict[int, str], evaluators: Iterable[str]) -> None:
        """Take over what a checkpoint tells."""
        self.changes += 1
        self.hosts, self.evaluators = hosts, set(evaluators)
