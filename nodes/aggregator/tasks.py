"""An aggregator's outstanding tasks, and the making of new ones."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from fedmq.algorithms.rng import derive_seed
from fedmq.algorithms.schedules import ScheduleView
from fedmq.broker.link.events import PostMessage
from fedmq.broker.rejections import Code, Rejection
from fedmq.broker.wire.schema import Message
from fedmq.nodes.aggregator.checkpoint import OutstandingTask
from fedmq.nodes.aggregator.fleet import Clients, ClientSet, Fleet, as_list, numbers_in
from fedmq.nodes.aggregator.progress import Progress
from fedmq.nodes.aggregator.version import VersionBuffer
from fedmq.nodes.messages.actions import AggregatorAction
from fedmq.nodes.messages.payloads import Packed, pack
from fedmq.nodes.messages.tensor_tables import fitted
from fedmq.nodes.run.setup import Setup


class Tasks:
    """Outstanding tasks, which of them a reachable client works on, and the idle clients.

    All of it is kept up to date, event by event: a run can have a million clients, and a version
    can wait for thousands of tasks.

    Args:
        setup: objects of the run.
        fleet: connected nodes.
        progress: clients to skip after failures.

    Attributes:
        in_flight: outstanding tasks by the id of their message.
        num_in_flight: number of those of reachable clients.
    """

    def __init__(self, setup: Setup, fleet: Fleet, progress: Progress) -> None:
        self._setup, self._fleet, self._progress = setup, fleet, progress
        self.in_flight: dict[str, OutstandingTask] = {}
        self._of_client: dict[int, str] = {}
        """Id of the outstanding task of each client that has one."""
        self._same_for_all: Packed | None = None
        self._current: VersionBuffer | None = None
        self._contributed: set[int] = set()
        """The current version's clients with a held or used result, in a synchronous round."""
        # Of tasks of reachable clients:
        self.num_in_flight = 0
        self._outstanding: Counter[int] = Counter()
        self._of_version: Counter[int] = Counter()
        self._num_back = 0
        """Number of tasks in `_returned` of earlier versions."""
        self._returned: set[str] = set()
        """Tasks of clients that came back since the version began."""
        self._idle = fleet.reachable.copy()
        """Reachable clients that have neither a task nor contributed; some may be skipped."""

    def resume(self, in_flight: dict[str, OutstandingTask]) -> None:
        """Restore the outstanding tasks of a checkpoint; call it after `Fleet.resume`."""
        self.in_flight = in_flight
        self._of_client = {task.client: name for name, task in in_flight.items()}
        self._returned.clear()
        self._same_for_all, self._num_back = None, 0
        self.num_in_flight, self._outstanding, self._of_version = 0, Counter(), Counter()
        self._idle = self._fleet.reachable.copy()
        for name, task in in_flight.items():
            self._idle.discard(task.client)
            self._count(name, task, 1)
        for client in self._contributed:
            self._idle.discard(client)

    def begin_version(self, current: VersionBuffer) -> None:
        """Make new tasks from now on; the clients of the version before can be drawn again."""
        self._same_for_all, self._num_back = None, 0
        self._returned.clear()
        before = self._contributed
        self._current, self._contributed = current, current.contributed
        for client in before:
            self.freed(client)

    def adopt(self) -> None:
        """Make new tasks from now on, because the state of the version was replaced."""
        self._same_for_all = None

    def came_back(self, clients: Clients) -> None:
        """Record that clients have become reachable; call it after the change of the fleet."""
        self._idle.add_all(clients)
        for client in _among(clients, self._contributed):
            self._idle.discard(client)
        for client in _among(clients, self._of_client):
            self._idle.discard(client)
            name = self._of_client[client]
            task = self.in_flight[name]
            self._returned.add(name)
            self._count(name, task, 1)
            if self._current is not None and task.version == self._current.version:
                self._current.expect(name)

    def went_away(self, clients: Clients) -> None:
        """Record that clients have become unreachable; call it after the change of the fleet."""
        self._idle.discard_all(clients)
        for client in _among(clients, self._of_client):
            name = self._of_client[client]
            self._add(name, self.in_flight[name], -1)

    def pack(self, current: VersionBuffer, client: int) -> Packed:
        """Return a client's task as a message's body and blobs."""
        if self._same_for_all is not None and not self._setup.algorithm.task_per_client:
            return self._same_for_all
        seed = derive_seed(self._setup.config.run.seed, "downlink", current.version, client)
        algorithm = self._setup.algorithm
        task, who = algorithm.task(current.state, client), f"{type(algorithm).__name__}.task"
        self._same_for_all = pack(task, self._setup.downlink, seed, who)
        return self._same_for_all

    def sent(self, name: str, client: int, version: int) -> None:
        """Record that a task was sent."""
        node = self._fleet.hosts.get(client) or ""
        task = self.in_flight[name] = OutstandingTask(client, version, node)
        self._of_client[client] = name
        self._idle.discard(client)
        self._count(name, task, 1)

    def answered(self, message: Message) -> OutstandingTask | Rejection:
        """Remove the task that a message answers; return it, or the rejection of the message.

        Its client can be drawn again only after `freed`, as its result may be held.
        """
        task = self.in_flight.get(message.re or "")
        if task is None or message.re is None:
            return Rejection(Code.UNKNOWN_TASK, f"no task {message.re!r} is out")
        if message.sender not in (task.node, self._fleet.hosts.get(task.client)):
            text = f"task {message.re!r} is not with {message.sender}"
            return Rejection(Code.WRONG_NODE, text)
        self._remove(message.re, task)
        return task

    def discard(self, name: str) -> OutstandingTask | None:
        """Remove a task that will not be answered; return it if it was outstanding."""
        task = self.in_flight.get(name)
        if task is not None:
            self._remove(name, task)
            self.freed(task.client)
        return task

    def freed(self, client: int) -> None:
        """Record that a client can be drawn again: its answer does not count for this version."""
        busy = client in self._of_client or client in self._contributed
        if not busy and client in self._fleet.reachable:
            self._idle.add(client)

    def past_deadline(self, version: int) -> None:
        """Stop waiting for the tasks of a version."""
        for name, task in self.in_flight.items():
            if task.version == version and not task.past_deadline:
                self._count(name, task, -1)
                task.past_deadline = True
                self._count(name, task, 1)

    def is_expected(self, name: str) -> bool:
        """Return whether a task is outstanding with a reachable client."""
        task = self.in_flight.get(name)
        return task is not None and task.client in self._fleet.reachable

    def view(self, current: VersionBuffer) -> ScheduleView:
        """Return a schedule's view of a version."""
        version = current.version
        outstanding = self._outstanding[version]
        ordered = self._setup.schedule.ordered  # other schedules do not use the number of idle
        return current.view(
            self.num_in_flight,
            outstanding,
            behind=self.num_in_flight - self._of_version[version] - self._num_back,
            idle=self._num_idle() if ordered and not outstanding else 0,
        )

    def draw(self, count: int, current: VersionBuffer) -> list[int]:
        """Draw ``count`` idle clients, or all if there are fewer; return them in order."""
        if not count:
            return []
        with self._without_skipped() as idle:
            return current.draw(idle, count)

    def _num_idle(self) -> int:
        """Return the number of clients that can be drawn."""
        with self._without_skipped() as idle:
            return len(idle)

    @contextlib.contextmanager
    def _without_skipped(self) -> Iterator[ClientSet]:
        """Yield the idle clients without those that are skipped after failures."""
        clients, nodes = self._progress.skipped(self._fleet)
        ranges = [(client, client) for client in clients]
        for node in nodes:
            ranges += self._fleet.hosts.ranges_of(node)
        skipped = self._idle.discard_all(numbers_in(ranges)) if ranges else None
        yield self._idle
        if skipped is not None:
            self._idle.add_all(skipped)

    def faults(self, current: VersionBuffer) -> Iterator[str]:
        """Yield what contradicts itself, for `AggregatorState.validate_state`."""
        clients = Counter(task.client for task in self.in_flight.values())
        for client, number in clients.items():
            if number > 1:
                yield f"client {client} has {number} tasks in flight"
            if client in current.contributed:
                yield f"client {client} has a task in flight, and a result in this round"
        names = set(current.order)
        for name, task in self.in_flight.items():
            if task.version > current.version:
                yield f"task {name} is of version {task.version}, after the current one"
            elif (task.version == current.version) != (name in names):
                has = "has" if name in names else "lacks"
                yield (
                    f"task {name} was made from version {task.version}; "
                    f"the cohort of version {current.version} {has} it"
                )
            if name in current.held:
                yield f"task {name} is in flight, but its result was received"
        if not self._returned <= self.in_flight.keys():
            yield "clients came back to tasks that are not in flight"
        reachable = [t for t in self.in_flight.values() if t.client in self._fleet.reachable]
        if self.num_in_flight != len(reachable):
            yield f"{self.num_in_flight} tasks are counted, {len(reachable)} are in flight"
        back = [name for name in self._returned & self.in_flight.keys() if self.is_expected(name)]
        if self._num_back != sum(self.in_flight[n].version != current.version for n in back):
            yield f"{self._num_back} tasks of earlier versions are back, but there are {back}"
        idle = set(self._fleet.reachable.all().tolist()) - clients.keys() - current.contributed
        if idle != set(self._idle.all().tolist()):
            yield f"clients {self._idle.all()} count as idle, but {sorted(idle)} are"
        yield from self._idle.faults()

    def _remove(self, name: str, task: OutstandingTask) -> None:
        self._count(name, task, -1)
        self._returned.discard(name)
        del self.in_flight[name]
        if self._of_client.get(task.client) == name:
            del self._of_client[task.client]

    def _count(self, name: str, task: OutstandingTask, by: int) -> None:
        if task.client in self._fleet.reachable:
            self._add(name, task, by)

    def _add(self, name: str, task: OutstandingTask, by: int) -> None:
        self.num_in_flight += by
        self._of_version[task.version] += by
        self._outstanding[task.version] += by * (not task.past_deadline)
        for counted in (self._of_version, self._outstanding):
            if not counted[task.version]:
                del counted[task.version]  # a run can have thousands of versions
        if name in self._returned and self._current and task.version != self._current.version:
            self._num_back += by


def _among(clients: Clients, known: Collection[int]) -> list[int]:
    """Return those of some clients that are known; it costs as much as the smaller collection."""
    if len(clients) <= len(known):
        return [client for client in as_list(clients) if client in known]
    found = np.fromiter(known, np.int64, len(known))
    return as_list(found[np.isin(found, clients)])


class MessageFactory:
    """Makes the messages of one node; their ids are numbered.

    Attributes:
        next_id: number of the next message.
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
        """Post the next message; return its id."""
        message = self.write(kind, to, body, packed)
        out.append(PostMessage(*fitted(message, packed.data if packed else ())))
        return message.id
