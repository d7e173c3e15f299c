"""The tasks that an aggregator has out, and how it makes more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmq.algorithms.base import OpaqueState
from fedmq.algorithms.rng import derive_seed
from fedmq.algorithms.schedules import ScheduleView
from fedmq.broker.rejections import Code, Rejection
from fedmq.broker.wire.schema import Message
from fedmq.nodes.aggregator.checkpoint import OutstandingTask
from fedmq.nodes.aggregator.fleet import Fleet
from fedmq.nodes.aggregator.progress import Progress
from fedmq.nodes.aggregator.version import VersionBuffer
from fedmq.nodes.messages.actions import AggregatorAction, PostMessage
from fedmq.nodes.messages.payloads import Packed, pack
from fedmq.nodes.messages.tensor_tables import fitted
from fedmq.nodes.run.setup import Setup


class Tasks:
    """Tasks by the id of their message, and whether anybody still works on them.

    Args:
        setup: what is learned, and when.
        members: who is here.
        progress: who has failed, and is not asked again at once; by default nobody.

    Attributes:
        flights: those that are out.
    """

    def __init__(self, setup: Setup, members: Fleet, progress: Progress | None = None) -> None:
        self._setup, self._fleet = setup, members
        self._progress = progress or Progress(setup, rules=0)
        self.in_flight: dict[str, OutstandingTask] = {}
        self._same_for_all: Packed | None = None
        # Worked out once for each change of the members, then kept up to date: a version may
        # wait for thousands of tasks, and each result asks how many are left.
        self._changes = -1
        self._in_flight = 0
        self._outstanding: Counter[int] = Counter()
        self._of_version: Counter[int] = Counter()
        self._returned: set[str] = set()
        """Tasks of clients that have come back since the version began."""
        self._nobody_idle = False
        """The last draw left nobody, and nobody has become idle since."""
        self._reachable = np.empty(0, np.int64)

    def resume(self, flights: dict[str, OutstandingTask]) -> None:
        """Take over what a checkpoint tells."""
        self.in_flight = flights
        self._changes = -1
        self.begin_version()

    def begin_version(self) -> None:
        """Make tasks anew from now on."""
        self._same_for_all = None
        self._nobody_idle = False
        self._returned.clear()

    def joined(self, message: Message) -> None:
        """Note that a node has come, before its clients can be reached."""
        for name, flight in self.in_flight.items():
            back = flight.client not in self._fleet.hosts
            if back and any(a <= flight.client <= b for a, b in message.body["clients"]):
                self._returned.add(name)

    def pack(self, state: OpaqueState, version: int, client: int) -> Packed:
        """Return a client's task as what goes into its message."""
        if self._same_for_all is not None and not self._setup.algorithm.task_per_client:
            return self._same_for_all
        seed = derive_seed(self._setup.config.run.seed, "downlink", version, client)
        algorithm = self._setup.algorithm
        task, who = algorithm.task(state, client), f"{type(algorithm).__name__}.task"
        self._same_for_all = pack(task, self._setup.downlink, seed, who)
        return self._same_for_all

    def sent(self, name: str, client: int, version: int) -> None:
        """Note that a task is out."""
        flight = self.in_flight[name] = OutstandingTask(client, version, self._fleet.hosts[client])
        self._count(flight, 1)

    def answered(self, message: Message) -> OutstandingTask | Rejection:
        """Take a task off the list by its answer; or say why that is none.

        Its client may be drawn again only after `freed`: its result may stay in hand.
        """
        flight = self.in_flight.get(message.re or "")
        if flight is None or message.re is None:
            return Rejection(Code.UNKNOWN_TASK, f"no task {message.re!r} is out")
        if message.sender not in (flight.node, self._fleet.hosts.get(flight.client)):
            text = f"task {message.re!r} is not with {message.sender}"
            return Rejection(Code.WRONG_NODE, text)
        self._returned.discard(message.re)
        del self.in_flight[message.re]
        self._count(flight, -1)
        return flight

    def discard(self, name: str) -> OutstandingTask | None:
        """Expect no answer to a task any more; return it if one was expected."""
        flight = self.in_flight.pop(name, None)
        self._returned.discard(name)
        if flight is not None:
            self._count(flight, -1)
            self.freed()
        return flight

    def freed(self) -> None:
        """Note that a client may be drawn again: its answer does not count for this version."""
        self._nobody_idle = False

    def past_deadline(self, version: int) -> None:
        """Do not wait for the tasks of a version any longer."""
        for flight in self.in_flight.values():
            flight.past_deadline |= flight.version == version
        self._changes = -1

    def is_expected(self, name: str) -> bool:
        """Tell whether a task is out, with a client that can be reached."""
        flight = self.in_flight.get(name)
        return flight is not None and flight.client in self._fleet.hosts

    def view(self, current: VersionBuffer, version: int) -> ScheduleView:
        """Return what a schedule wants to know of a version."""
        self._work_out()
        asked = self._setup.schedule.ordered  # others replace tasks, and look at nobody's place
        return ScheduleView(
            clients=self._setup.problem.clients,
            in_flight=self._in_flight,
            started=current.started,
            outstanding=self._outstanding[version],
            results=current.absorbed + len(current.held),
            deadline_passed=current.deadline_passed,
            late=current.late,
            behind=self._in_flight - self._of_version[version] - self._back(version),
            idle=len(self._idle(current)) if asked and not self._outstanding[version] else 0,
        )

    def _back(self, version: int) -> int:
        """Return how many tasks of earlier versions are with clients that have come back."""
        found = (self.in_flight[name] for name in self._returned)
        return sum(e.version != version and e.client in self._fleet.hosts for e in found)

    def draw(self, count: int, current: VersionBuffer, version: int) -> list[int]:
        """Return so many reachable clients that have no task, or all of them, in order."""
        if not count:
            return []
        self._work_out()
        idle = self._idle(current)
        self._nobody_idle = len(idle) <= count
        return current.draw(idle, count, self._setup.config.run.seed, version)

    def _idle(self, current: VersionBuffer) -> npt.NDArray[np.int64]:
        """Return the clients that may be asked now, in order.

        They can be reached, have neither a task nor a result in hand, and are not made to wait.
        """
        if self._nobody_idle:
            return self._reachable[:0]
        busy = {flight.client for flight in self.in_flight.values()} | current.contributed
        busy |= self._progress.waiting(self._fleet.hosts)
        out = np.array([client for client in busy if client in self._fleet.hosts], np.int64)
        return np.delete(self._reachable, np.searchsorted(self._reachable, out))

    def _count(self, flight: OutstandingTask, by: int) -> None:
        if flight.client in self._fleet.hosts:
            self._in_flight += by
            self._of_version[flight.version] += by
            self._outstanding[flight.version] += by * (not flight.past_deadline)
            for counted in (self._of_version, self._outstanding):
                if not counted[flight.version]:
                    del counted[flight.version]  # versions come by the thousands, too

    def _work_out(self) -> None:
        """Count anew if nodes have come or gone."""
        if self._changes != self._fleet.changes:
            self._changes = self._fleet.changes
            self._in_flight, self._outstanding, self._of_version = 0, Counter(), Counter()
            self._nobody_idle = False
            for flight in self.in_flight.values():
                self._count(flight, 1)
            self._reachable = np.array(sorted(self._fleet.hosts), np.int64)


class MessageFactory:
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

    def post(
        self,
        out: list[AggregatorAction],
        kind: str,
        to: str,
        body: Mapping[str, Any],
        packed: Packed | None = None,
    ) -> str:
        """Write the next message, and post it; return its id."""
        message = self.write(kind, to, body, packed)
        out.append(PostMessage(*fitted(message, packed.data if packed else ())))
        return message.id
