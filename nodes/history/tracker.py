"""Which nodes are connected, which clients they host, and which tasks are unanswered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedmq.broker.ledger.entries import Accepted, AnyEntry, Refusal
from fedmq.broker.wire.addresses import (
    AGGREGATOR,
    AVAILABILITY,
    BROKER,
    CONTINUED,
    EVALUATOR,
    WORKER,
    node_address,
)
from fedmq.broker.wire.client_map import ClientMap, is_range
from fedmq.broker.wire.schema import Message
from fedmq.nodes.history.facts import Facts, SentTask, client_of, natural
from fedmq.nodes.messages.actions import ANSWERS


@dataclass
class NodeState:
    """State of one node.

    role: its newest; empty for a node that has never joined.
    sessions, tasks, drops: number of its sessions, answered tasks and failed tasks.
    here: whether it is connected.
    """

    role: str = ""
    sessions: int = 0
    tasks: int = 0
    drops: int = 0
    here: bool = False


class Placement:
    """Which nodes are connected and which clients they host, from the broker's messages.

    Attributes:
        nodes: by name, in the order in which they first joined or answered.
        aggregator: name of the aggregator's node.
    """

    def __init__(self) -> None:
        self.nodes: dict[str, NodeState] = {}
        self.aggregator = AGGREGATOR
        self._hosts: dict[str, str] = {}
        self._host_of_client = ClientMap()
        self._away = bytearray()
        """1 for each client that is not available, though its node may be connected."""

    def feed(self, message: Message) -> None:
        """Process the next message of the broker, or of a worker on the availability of clients."""
        if message.kind == AVAILABILITY:
            for name, flag in (("back", b"\0"), ("away", b"\1")):
                self._mark(message.sender, message.body.get(name), flag)
            return
        if message.kind == CONTINUED:
            for each in self.nodes.values():
                each.here = False
            return
        match message.kind, message.body:
            case "joined", {"node": str(name), "role": str(role), "clients": list(ranges)} as body:
                reports = body.get("reports_availability") is True
                self._joined(name, role, ranges, b"\1" if reports else b"\0")
            case "left", {"node": str(name)} if name in self.nodes:
                self.nodes[name].here = False
                for low, high in self._host_of_client.ranges_of(name):
                    self._away[low : high + 1] = bytes(len(self._away[low : high + 1]))

    def node(self, name: str) -> NodeState:
        """Return the state of a node, which may not have joined."""
        return self.nodes.setdefault(name, NodeState())

    def host_of(self, address: str) -> str | None:
        """Return the connected node that hosts an address, or None."""
        client = client_of(address)
        name = self._hosts.get(address) if client is None else self._host_of_client.get(client)
        return name if name is not None and self.nodes[name].here else None

    def _joined(self, name: str, role: str, ranges: list[Any], flag: bytes) -> None:
        node = self.node(name)
        node.role, node.here = role, True
        node.sessions += 1
        self._hosts[node_address(name)] = name
        if role == AGGREGATOR:
            self.aggregator = name
        if role in (AGGREGATOR, EVALUATOR):
            self._hosts[role] = name
        elif role == WORKER:
            for low, high in ranges:
                self._host_of_client.assign(low, high, name)
                self._mark(name, [[low, high]], flag)

    def unreachable(self, clients: int) -> list[tuple[int, int]]:
        """Return which of the clients numbered below ``clients`` can get no task now.

        They are ranges with both ends included: clients without a connected node, and those that
        are not available.
        """
        found = bytearray(b"\1") * clients
        for low, high, name in self._host_of_client:
            if self.nodes[name].here:
                found[low : high + 1] = bytes(len(found[low : high + 1]))
        for low, high in _ranges_in(self._away):
            found[low : high + 1] = b"\1" * len(found[low : high + 1])
        return _ranges_in(found)

    def _mark(self, node: str, ranges: object, flag: bytes) -> None:
        """Set whether clients of a node are away; ranges that are not its own do not count."""
        for each in ranges if isinstance(ranges, list) else ():
            if is_range(each) and self._host_of_client.hosts_all(node, *each):
                low, high = each
                self._away.extend(bytes(max(0, high + 1 - len(self._away))))
                self._away[low : high + 1] = flag * (high - low + 1)


def _ranges_in(flags: bytearray) -> list[tuple[int, int]]:
    """Return the ranges of ones, both ends included."""
    found = []
    low = flags.find(1)
    while low >= 0:
        end = flags.find(0, low)
        end = len(flags) if end < 0 else end
        found.append((low, end - 1))
        low = flags.find(1, end)
    return found


class TaskTracker:
    """The first layer of the read model: the facts of each entry, without any counts.

    A second pass over a ledger needs only these; `RunHistory` counts from them.

    Attributes:
        placement: all nodes, and which clients they host.
        unanswered: tasks and evaluations that await an answer, by id, in the order in which they
            were sent.
        withdrawn: rejected ones, and those from before an extension of the run. A dead-lettered one
            may be sent again, and a node that was cut off may still answer one.
    """

    def __init__(self) -> None:
        self.placement = Placement()
        self.unanswered: dict[str, SentTask] = {}
        self.withdrawn: dict[str, SentTask] = {}

    def feed(self, entry: AnyEntry) -> Facts:
        """Process the next entry, and return its facts.

        A kind of message counts only from the sender that it belongs to.
        """
        if isinstance(entry, Accepted):
            message, placement = entry.read(), self.placement
            task = None
            if message.sender == BROKER or message.kind == AVAILABILITY:
                placement.feed(message)
            elif message.sender == placement.aggregator:
                if message.kind in ("task", "evaluate"):
                    task = self._sent(entry, message)
            elif message.kind in ANSWERS:
                task = self._take(message.re or "")
                node = placement.node(message.sender)
                node.tasks += message.kind != "failed"
                node.drops += message.kind == "failed"
            return Facts(entry, message, placement.host_of(message.to), task)
        if isinstance(entry, Refusal):
            task = self.unanswered.get(entry.id) or self.withdrawn.get(entry.id)
            if task is not None and task.seq == entry.of:
                task.rejected, task.dead_lettered = entry.known_code, entry.dead_lettered
                self.unanswered.pop(entry.id, None)
                self.withdrawn[entry.id] = task
        return Facts(entry)

    def withdraw_all(self) -> None:
        """Withdraw all unanswered ones: after an extension, the aggregator has forgotten them."""
        self.withdrawn |= self.unanswered
        self.unanswered.clear()

    def _take(self, name: str) -> SentTask | None:
        """Remove a task or an evaluation by its id, and return it; None if it is unknown."""
        return self.unanswered.pop(name, None) or self.withdrawn.pop(name, None)

    def _sent(self, entry: Accepted, message: Message) -> SentTask:
        before = self._take(message.id)
        task = self.unanswered[message.id] = SentTask(
            entry.seq,
            entry.at,
            message.to,
            client_of(message.to),
            self.placement.host_of(message.to),
            natural(message.body.get("model_version")),
            message.kind == "evaluate",
            before.rejected if before is not None and before.dead_lettered else None,
        )
        return task
