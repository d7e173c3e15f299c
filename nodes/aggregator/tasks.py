"""An aggregator's outstanding tasks, and the making of new ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmq.algorithms.rng import derive_seed
from fedmq.algorithms.schedules import ScheduleView
from fedmq.broker.link.events import PostMessage
from fedmq.broker.rejections import Code, Rejection
from fedmq.broker.wire.schema import Message
from fedmq.nodes.aggregator.checkpoint import OutstandingTask
from fedmq.nodes.aggregator.fleet import Fleet
from fedmq.nodes.aggregator.progress import Progress
from fedmq.nodes.aggregator.version import VersionBuffer
from fedmq.nodes.messages.actions import AggregatorAction
from fedmq.nodes.messages.payloads import Packed, pack
from fedmq.nodes.messages.tensor_tables import fitted
from fedmq.nodes.run.setup import Setup


class Tasks:
    """Outstanding tasks, and which of them a reachable client works on.

    Args:
        setup: objects of the run.
        fleet: connected nodes.
        progress: clients to skip after failures.

    Attributes:
        in_flight: outstanding tasks by the id of their message.
    """

    def __init__(self, setup: Setup, fleet: Fleet, progress: Progress) -> None:
        self._setup, self._fleet, self._progress = setup, fleet, progress
        self.in_flight: dict[str, OutstandingTask] = {}
        self._same_for_all: Packed | None = None
        # Counted once for each change of the fleet, then updated: a version can wait for
        # thousands of tasks, and each result needs the number of those left.
        self._changes = -1
        self._in_flight = 0
        self._outstanding: Counter[int] = Counter()
        self._of_version: Counter[int] = Counter()
        self._returned: set[str] = set()
        """Tasks of clients that came back since the version began."""
        self._nobody_idle = False
        """Whether the last draw took all idle clients, and none has become idle since."""
        self._reachable = np.empty(0, np.int64)

    def resume(self, in_flight: dict[str, OutstandingTask]) -> None:
        """Restore the outstanding tasks of a checkpoint."""
        self.in_flight = in_flight
        self._changes = -1
        self.begin_version()

    def begin_version(self) -> None:
        """Make new tasks from now on."""
        self._same_for_all = None
        self._nobody_idle = False
        self._returned.clear()

    def joined(self, message: Message) -> None:
        """Record that a node joins; call it before `Fleet.joined`."""
        for name, task in self.in_flight.items():
            back = task.client not in self._fleet.hosts
            if back and any(a <= task.client <= b for a, b in message.body["clients"]):
                self._returned.add(name)

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
        task = self.in_flight[name] = OutstandingTask(client, version, self._fleet.hosts[client])
        self._count(task, 1)

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
        self._returned.discard(message.re)
        del self.in_flight[message.re]
        self._count(task, -1)
        return task

    def discard(self, name: str) -> OutstandingTask | None:
        """Remove a task that will not be answered; return it if it was outstanding."""
        task = self.in_flight.pop(name, None)
        self._returned.discard(name)
        if task is not None:
            self._count(task, -1)
            self.freed()
        return task

    def freed(self) -> None:
        """Record that a client can be drawn again: its answer does not count for this version."""
        self._nobody_idle = False

    def past_deadline(self, version: int) -> None:
        """Stop waiting for the tasks of a version."""
        for task in self.in_flight.values():
            task.past_deadline |= task.version == version
        self._changes = -1

    def is_expected(self, name: str) -> bool:
        """Return whether a task is outstanding with a reachable client."""
        task = self.in_flight.get(name)
        return task is not None and task.client in self._fleet.hosts

    def view(self, current: VersionBuffer) -> ScheduleView:
        """Return a schedule's view of a version."""
        self._recount()
        version = current.version
        outstanding = self._outstanding[version]
        ordered = self._setup.schedule.ordered  # other schedules do not use the number of idle
        return current.view(
            self._in_flight,
            outstanding,
            behind=self._in_flight - self._of_version[version] - self._back(version),
            idle=len(self._idle(current)) if ordered and not outstanding else 0,
        )

    def _back(self, version: int) -> int:
        """Return the number of tasks of earlier versions whose clients came back."""
        found = (self.in_flight[name] for name in self._returned)
        return sum(e.version != version and e.client in self._fleet.hosts for e in found)

    def draw(self, count: int, current: VersionBuffer) -> list[int]:
        """Draw ``count`` idle clients, or all if there are fewer; return them in order."""
        if not count:
            return []
        self._recount()
        idle = self._idle(current)
        self._nobody_idle = len(idle) <= count
        return current.draw(idle, count)

    def _idle(self, current: VersionBuffer) -> npt.NDArray[np.int64]:
        """Return the idle clients, in order.

        They are reachable, have neither a task nor a held result, and are not skipped.
        """
        if self._nobody_idle:
            return self._reachable[:0]
        busy = {task.client for task in self.in_flight.values()} | current.contributed
        busy |= self._progress.waiting(self._fleet.hosts)
        out = np.array([client for client in busy if client in self._fleet.hosts], np.int64)
        return np.delete(self._reachable, np.searchsorted(self._reachable, out))

    def faults(self, current: VersionBuffer) -> Iterator[str]:
        """Yield what contradicts itself, for `AggregatorState.validate_state`."""
        clients = Counter(task.client for task in self.in_flight.values())
        for client, number in clients.items():
            if number > 1:
                yield f"client {client} has {number} tasks in flight"
            if client in current.contributed:
                yield f"client {client} has a task in flight, and a result in this round"
        names, settled = set(current.order), set(current.order[: current.settled])
        for name, task in self.in_flight.items():
            if task.version > current.version:
                yield f"task {name} is of version {task.version}, after the current one"
            elif (task.version == current.version) != (name in names):
                has = "has" if name in names else "lacks"
                yield (
                    f"task {name} was made from version {task.version}; "
                    f"the cohort of version {current.version} {has} it"
                )
            if name in current.held or name in settled:
                yield f"task {name} is in flight, but its result was received"
        if not self._returned <= self.in_flight.keys():
            yield "clients came back to tasks that are not in flight"
        reachable = [t for t in self.in_flight.values() if t.client in self._fleet.hosts]
        if self._changes == self._fleet.changes and self._in_flight != len(reachable):
            yield f"{self._in_flight} tasks are counted, {len(reachable)} are in flight"

    def _count(self, task: OutstandingTask, by: int) -> None:
        if task.client in self._fleet.hosts:
            self._in_flight += by
            self._of_version[task.version] += by
            self._outstanding[task.version] += by * (not task.past_deadline)
            for counted in (self._of_version, self._outstanding):
                if not counted[task.version]:
                    del counted[task.version]  # a run can have thousands of versions

    def _recount(self) -> None:
        """Count all tasks again if the fleet has changed."""
        if self._changes != self._fleet.changes:
            self._changes = self._fleet.changes
            self._in_flight, self._outstanding, self._of_version = 0, Counter(), Counter()
            self._nobody_idle = False
            for task in self.in_flight.values():
                self._count(task, 1)
            self._reachable = np.array(sorted(self._fleet.hosts), np.int64)


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
