"""Who is here to work for an aggregator, as its inbox tells."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedmq.broker.state import EVALUATOR, WORKER
from fedmq.broker.wire import Message


@dataclass
class Members:
    """The nodes that are here.

    hosts: the worker that hosts each client that can be reached.
    evaluators: names of the evaluators.
    """

    hosts: dict[int, str] = field(default_factory=dict)
    evaluators: set[str] = field(default_factory=set)

    def joined(self, message: Message) -> None:
        """Take in a node; clients that it hosts are with it from now on."""
        node = message.body["node"]
        if message.body["role"] == EVALUATOR:
            self.evaluators.add(node)
        elif message.body["role"] == WORKER:
            for low, high in message.body["clients"]:
                self.hosts.update(dict.fromkeys(range(low, high + 1), node))

    def left(self, message: Message) -> None:
        """Let a node go, and the clients that are still with it."""
        node = message.body["node"]
        self.evaluators.discard(node)
        self.hosts = {client: host for client, host in self.hosts.items() if host != node}
