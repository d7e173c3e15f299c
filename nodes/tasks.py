"""The tasks that an aggregator has out, and how it makes more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

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
        # Worked out once for each change of the members, then kept up to date: a version may
        # wait for thousands of tasks, and each result asks how many are left.
        self._changes = -1
        self._flying = 0
        self._outstanding: Counter[int] = Counter()
        self._reachable = np.empty(0, np.int64)

    def resume(self, flights: dict[str, Flight]) -> None:
        """Take over what a checkpoint tells."""
        self.flights = flights
        self._changes = -1

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
        flight = self.flights[name] = Flight(client, version, self._members.hosts[client])
        self._count(flight, 1)

    def answered(self, message: Message) -> Flight | str:
        """Take a task off the list by its answer; or say why that is none."""
        flight = self.flights.get(message.re or "")
        if flight is None or message.re is None:
            return f"no task {message.re!r} is out"
        if message.sender not in (flight.node, self._members.hosts.get(flight.client)):
            return f"task {message.re!r} is not with {message.sender}"
        self.forget(message.re)
        return flight

    def forget(self, name: str) -> bool:
        """Expect no answer to a task any more; tell whether one was expected."""
        flight = self.flights.pop(name, None)
        if flight is not None:
            self._count(flight, -1)
        return flight is not None

    def overdue(self, version: int) -> None:
        """Do not wait for the tasks of a version any longer."""
        for flight in self.flights.values():
            flight.overdue |= flight.version == version
        self._changes = -1

    def is_expected(self, name: str) -> bool:
        """Tell whether a task is out, with a client that can be reached."""
        flight = self.flights.get(name)
        return flight is not None and flight.client in self._members.hosts

    def view(self, current: Gathering, version: int) -> View:
        """Return what a schedule wants to know of a version."""
        self._work_out()
        return View(
            clients=self._setup.problem.clients,
            flying=self._flying,
            started=current.started,
            outstanding=self._outstanding[version],
            results=current.absorbed + len(current.held),
            deadline_passed=current.deadline_passed,
        )

    def draw(self, count: int, current: Gathering, version: int) -> list[int]:
        """Return so many reachable clients that have no task, or all of them, in order."""
        if not count:
            return []
        self._work_out()
        busy = {flight.client for flight in self.flights.values()} | current.contributed
        out = np.array([client for client in busy if client in self._members.hosts], np.int64)
        idle = np.delete(self._reachable, np.searchsorted(self._reachable, out))
        return current.draw(idle, count, self._setup.config.run.seed, version)

    def _count(self, flight: Flight, by: int) -> None:
        if flight.client in self._members.hosts:
            self._flying += by
            self._outstanding[flight.version] += by * (not flight.overdue)
            if not self._outstanding[flight.version]:
                del self._outstanding[flight.version]  # versions come by the thousands, too

    def _work_out(self) -> None:
        """Count anew if nodes have come or gone."""
        if self._changes != self._members.changes:
            self._changes = self._members.changes
            self._flying, self._outstanding = 0, Counter()
            for flight in self.flights.values():
                self._count(flight, 1)
            self._reachable = np.array(sorted(self._members.hosts), np.int64)


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
