"""The tasks that an aggregator has out, and how it makes more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedmq.algorithms.rng import derive_seed
from fedmq.algorithms.schedules import View
from fedmq.broker.wire import Message
from fedmq.nodes.checkpoint import Flight
from fedmq.nodes.gathering import Gathering
from fedmq.nodes.members import Members
from fedmq.nodes.payload import Packed, pack
from fedmq.nodes.setup import Setup


class Tasks:
    """Tasks by the id of their message, and whether anybody still works on them.

    Args:
        setup: what is learned, and when.
        members: who is here.

    Attributes:
        flights: those that are out.
    """

    def __init__(self, setup: Setup, members: Members) -> None:
        self._setup, self._members = setup, members
        self.flights: dict[str, Flight] = {}
        self._same_for_all: Packed | None = None

    def begin_version(self) -> None:
        """Make tasks anew from now on."""
        self._same_for_all = None

    def pack(self, state: Any, version: int, client: int) -> Packed:
        """Return a client's task as what goes into its message."""
        if self._same_for_all is not None and not self._setup.algorithm.personal:
            return self._same_for_all
        seed = derive_seed(self._setup.config.run.seed, "downlink", version, client)
        task = self._setup.algorithm.task(state, client)
        self._same_for_all = pack(task, self._setup.downlink, seed)
        return self._same_for_all

    def sent(self, name: str, client: int, version: int) -> None:
        """Note that a task is out."""
        self.flights[name] = Flight(client, version, self._members.hosts[client])

    def answered(self, message: Message) -> Flight | str:
        """Take a task off the list by its answer; or say why that is none."""
        flight = self.flights.get(message.re or "")
        if flight is None or message.re is None:
            return f"no task {message.re!r} is out"
        if message.sender not in (flight.node, self._members.hosts.get(flight.client)):
            return f"task {message.re!r} is not with {message.sender}"
        del self.flights[message.re]
        return flight

    def forget(self, name: str) -> bool:
        """Expect no answer to a task any more; tell whether one was expected."""
        return self.flights.pop(name, None) is not None

    def overdue(self, version: int) -> None:
        """Do not wait for the tasks of a version any longer."""
        for flight in self.flights.values():
            flight.overdue |= flight.version == version

    def is_expected(self, name: str) -> bool:
        """Tell whether a task is out, with a client that can be reached."""
        flight = self.flights.get(name)
        return flight is not None and flight.client in self._members.hosts

    def view(self, current: Gathering, version: int) -> View:
        """Return what a schedule wants to know of a version."""
        expected = [self.flights[name] for name in self.flights if self.is_expected(name)]
        return View(
            clients=self._setup.problem.clients,
            flying=len(expected),
            started=current.started,
            outstanding=sum(each.version == version and not each.overdue for each in expected),
            results=current.absorbed + len(current.held),
            deadline_passed=current.deadline_passed,
        )

    def draw(self, count: int, current: Gathering, version: int) -> list[int]:
        """Return so many reachable clients that have no task, or all of them, in order."""
        if not count:
            return []
        busy = {flight.client for flight in self.flights.values()}
        idle = sorted(set(self._members.hosts) - busy - current.contributed)
        return current.draw(idle, count, self._setup.config.run.seed, version)


class Letters:
    """Messages of one node to its run, each with an id that follows from how many came before.

    Attributes:
        next_id: of the next message; a counter.
    """

    def __init__(self, run: str, node: str) -> None:
        self._run, self._node = run, node
        self.next_id = 0

    def write(
        self, kind: str, to: str, body: Mapping[str, Any], packed: Packed | None = None
    ) -> Message:
        """Return the next message."""
        name = f"{self._node}/{self.next_id}"
        self.next_id += 1
        about = {"kind": kind, "id": name, "run": self._run, "sender": self._node, "to": to}
        return Message(**about, body=dict(body), blobs=packed.blobs if packed else ())
