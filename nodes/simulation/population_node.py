"""A population node: one session of role worker whose clients are all devices of their own.

A live worker does one task at a time. Here, each client works at its own pace: a task waits for its
download, for its computation and for its upload, in virtual time, in a greenlet of its own. The
tasks of one client are done one after the other. Only clients with tasks use memory.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from structlog.typing import FilteringBoundLogger

from fedmq.broker.errors import LinkClosed, Rejected
from fedmq.broker.link.events import BlobSource, Delivery
from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.virtual.machine import Machine
from fedmq.broker.virtual.node import VirtualPort
from fedmq.broker.virtual.validation import validated
from fedmq.broker.wire.addresses import AGGREGATOR
from fedmq.broker.wire.schema import Buffer, Hello, Message
from fedmq.nodes.population.population import Population
from fedmq.nodes.process.logs import SILENT, Repeats
from fedmq.nodes.run.agreement import Fingerprint
from fedmq.nodes.run.setup import Setup
from fedmq.nodes.simulation.trainers import Trainer
from fedmq.nodes.simulation.virtual_node import VirtualNode
from fedmq.nodes.worker.client_state import ClientStateStore
from fedmq.nodes.worker.core import Evaluate, Evaluated, Train, Trained, Worker
from fedmq.nodes.worker.driver import Dropped, WorkerDriver
from fedmq.nodes.worker.program import work_until_over

Ranges = Sequence[tuple[int, int]]
"""Ranges of clients, both ends included."""
MOST_RANGES = 1000
"""Most ranges in one message: a receiver accepts bodies of 1024 items."""
_SHARED_BLOBS = 32
"""Number of blobs whose bytes tasks share: the models of so many versions."""


class PopulationNode(VirtualNode):
    """A session of a population node.

    Args:
        port, machine, hello, log: as of any node.
        setup: objects of the run.
        store: the clients' states, which survive the process.
        devices: of all clients.
        trainer: trains and evaluates.
        began: time of the network at which the virtual seconds of ``devices`` begin.
        version_0: see `version_zero`.
        checked: whether each core validates its state after each event.

    Attributes:
        store: as given.
    """

    def __init__(
        self,
        port: VirtualPort,
        machine: Machine,
        hello: Hello,
        setup: Setup,
        store: ClientStateStore,
        devices: Population,
        trainer: Trainer,
        began: float,
        log: FilteringBoundLogger = SILENT,
        version_0: Fingerprint | None = None,
        *,
        checked: bool = False,
    ) -> None:
        if devices.availability is not None:
            hello = replace(hello, reports_availability=True)
        super().__init__(port, machine, hello, lambda: 0.0, log)
        port.on_welcome = self._welcomed
        self.setup, self.store, self.devices, self.trainer = setup, store, devices, trainer
        self._began, self._checked = began, checked
        self._repeats, self._version_0 = Repeats(), version_0
        self._waiting: dict[int | None, deque[Delivery]] = {}
        """By client with a task in progress: deliveries that wait for the end of that task."""
        self._blobs = _SharedBlobs()
        self._posts: deque[tuple[Message, Sequence[Buffer], tuple[int, ...]]] = deque()
        """Results to post, while a task waits until the link has room."""
        self._posting = False
        self._reports = itertools.count(1)
        self._admitted = False

    def work(self, link: NodeLink) -> None:
        """Start the tasks that arrive, until the run is over."""
        self._admitted = True
        self._report_all()
        work_until_over(self._accept, link, self.log)

    def _welcomed(self) -> None:
        """Handle a Welcome: after a reconnect, the broker may have recorded a new join."""
        if self._admitted:
            self._report_all()

    def report(self, back: Ranges, away: Ranges) -> None:
        """Post that some of the hosted clients are available again, or not any more."""
        if not self._admitted:
            return  # it posts all that are available once it is admitted
        hosted = self.hello.clients
        kinds = [("back", each) for each in _within(back, hosted)]
        kinds += [("away", each) for each in _within(away, hosted)]
        if kinds:
            self._post_ranges(kinds)

    def _report_all(self) -> None:
        """Post which of the hosted clients are available, after the node has joined."""
        if self.devices.availability is not None:
            available = self.devices.availability.available
            found = _ranges(available, self.hello.clients)
            self._post_ranges([("back", each) for each in found])

    def _post_ranges(self, kinds: Sequence[tuple[str, tuple[int, int]]]) -> None:
        """Post ranges of clients that are back or away, in at least one message."""
        for start in range(0, max(1, len(kinds)), MOST_RANGES):
            part = kinds[start : start + MOST_RANGES]
            name = f"{self.hello.session}/availability/{next(self._reports)}"
            body: dict[str, Any] = {
                key: [list(each) for kind, each in part if kind == key] for key in ("back", "away")
            }
            if start + MOST_RANGES < len(kinds):
                body["more"] = True
            run, sender = self.hello.run, self.hello.node
            kind, to = "availability", AGGREGATOR
            self.link.hand_in(Message(kind=kind, id=name, run=run, sender=sender, to=to, body=body))

    def now(self) -> float:
        """Return the virtual seconds since the start."""
        return self._machine.true_time() - self._began

    def done_at(self, client: int | None, seconds: float) -> float:
        """Return the virtual time at which a client has worked for ``seconds`` from now on."""
        now, availability = self.now(), self.devices.availability
        if availability is None or client is None:
            return now + seconds
        return availability.work_until(client, now, seconds)

    def download_s(self, client: int, task: Message) -> float:
        """Return how long a task takes to a client, in seconds."""
        return self.devices.download_s(client, _size(task))

    def upload_s(self, client: int, answer: Message) -> float:
        """Return how long an answer takes from a client; one without a result is empty."""
        return self.devices.upload_s(client, _size(answer))

    def sleep_until(self, at: float) -> None:
        """Let the current task wait until a virtual time."""
        self.port.tasks.sleep_until(self._began + at)

    def post(self, message: Message, data: Sequence[Buffer], consumes: tuple[int, ...]) -> None:
        """Post a result, or leave it to the task that waits until the link has room.

        If thousands of tasks waited, each frame that arrives would wake all of them.
        """
        self._posts.append((message, data, consumes))
        if self._posting:
            return
        self._posting = True
        try:
            while self._posts:
                self.link.post(*self._posts.popleft())
        finally:
            self._posting = False

    def _accept(self, delivery: Delivery) -> None:
        """Begin a task, or let it wait for the one before of the same client."""
        client = delivery.message.body.get("client")
        client = client if type(client) is int and self._hosts(client) else None
        if client in self._waiting:
            self._waiting[client].append(delivery)
        else:
            self._waiting[client] = deque()
            self._begin(client, delivery)

    def _hosts(self, client: int) -> bool:
        return any(low <= client <= high for low, high in self.hello.clients)

    def _begin(self, client: int | None, delivery: Delivery) -> None:
        seconds = 0.0
        if client is not None:
            seconds = self.download_s(client, delivery.message)
        at = self._began + self.done_at(client, seconds)
        shared = self._blobs.share(delivery)
        self.port.tasks.start_at(at, functools.partial(self._do, client, shared))

    def _do(self, client: int | None, delivery: Delivery) -> None:
        """Do a task, in a greenlet of its own: with a worker's core and driver."""
        hello = self.hello
        about = (hello.run, hello.node, hello.clients, self.store, self._version_0)
        core = Worker(self.setup, *about)
        if self._checked:
            validated(core)
        port = _ClientPort(self, client, delivery.message.id)
        with contextlib.suppress(LinkClosed, Rejected):  # the program of this node ends by itself
            WorkerDriver(core, self.setup, port, self._repeats).handle(delivery)
            if waiting := self._waiting[client]:
                self._begin(client, waiting.popleft())
            else:
                del self._waiting[client]


class _ClientPort:
    """The `WorkerPort` of one task: a client's device, and the link of its node."""

    def __init__(self, node: PopulationNode, client: int | None, task: str) -> None:
        self._node, self._client, self._task = node, client, task
        self.log, self.now, self.save = node.log, node.now, node.store.put
        self.away = contextlib.nullcontext

    def compute(self, action: Train | Evaluate, /) -> Trained | Evaluated:
        """Train or evaluate, in the time that the client's device takes."""
        node, client = self._node, self._client
        seconds = 0.0 if client is None else node.devices.compute_s(client, self._task)
        due = node.done_at(client, seconds)
        if isinstance(action, Train) and node.devices.drops(action.client, self._task):
            node.sleep_until(due)
            raise Dropped
        wait = node.trainer.start(action, due)
        del action  # a trainer needs its tensors no longer than it holds them
        node.sleep_until(due)
        return wait()

    def post(self, message: Message, data: Sequence[Buffer], consumes: tuple[int, ...]) -> None:
        """Post a message once it has been uploaded."""
        node, client = self._node, self._client
        if client is not None:
            node.sleep_until(node.done_at(client, node.upload_s(client, message)))
        node.post(message, data, consumes)

    def done(
        self,
        seqs: Sequence[int],
        refused: Mapping[int, str] | None = None,
        codes: Mapping[int, str] | None = None,
    ) -> None:
        """Acknowledge or reject messages."""
        self._node.link.done(seqs, refused, codes)

    def pause(self, seconds: float) -> None:
        """Let the task wait."""
        self._node.sleep_until(self._node.now() + seconds)


class _SharedBlobs:
    """Lets tasks with the same blob share its bytes: thousands of them are in progress."""

    def __init__(self) -> None:
        self._blobs: OrderedDict[bytes, Buffer] = OrderedDict()

    def share(self, delivery: Delivery) -> Delivery:
        """Return the same delivery, whose blobs are read once for all deliveries."""
        inline = {
            index: self._shared(delivery.message.blobs[index].digest, data)
            for index, data in delivery.inline.items()
        }
        source = None if delivery.source is None else _SharingSource(self, delivery.source)
        return replace(delivery, inline=inline, source=source)

    def read(self, delivery: Delivery, index: int, source: BlobSource) -> Buffer:
        """Return the bytes of a blob that did not come with a delivery."""
        digest = delivery.message.blobs[index].digest
        known = self._blobs.get(digest)
        return self._shared(digest, source.read(delivery, index) if known is None else known)

    def _shared(self, digest: bytes, data: Buffer) -> Buffer:
        if digest not in self._blobs:
            # Tensors share the memory of writable buffers only.
            readonly = memoryview(data).readonly
            self._blobs[digest] = memoryview(bytearray(data)) if readonly else data
        found = self._blobs[digest]
        self._blobs.move_to_end(digest)
        if len(self._blobs) > _SHARED_BLOBS:
            self._blobs.popitem(last=False)
        return found


class _SharingSource:
    """The `BlobSource` of a delivery whose blobs are shared."""

    def __init__(self, shared: _SharedBlobs, source: BlobSource) -> None:
        self._shared, self._source = shared, source

    def read(self, delivery: Delivery, index: int) -> Buffer:
        """Return the bytes of a delivery's blob."""
        return self._shared.read(delivery, index, self._source)

    def chunks(self, delivery: Delivery, index: int) -> Iterator[Buffer]:
        """Yield the bytes of a delivery's blob."""
        return self._source.chunks(delivery, index)


def _size(message: Message) -> int:
    return sum(blob.size for blob in message.blobs)


def _within(ranges: Ranges, hosted: Ranges) -> Iterator[tuple[int, int]]:
    """Yield the parts of some ranges that lie in others."""
    for low, high in ranges:
        for first, last in hosted:
            if low <= last and high >= first:
                yield max(low, first), min(high, last)


def _ranges(available: NDArray[np.bool_], hosted: Ranges) -> list[tuple[int, int]]:
    """Return the ranges of hosted clients that are available."""
    found: list[tuple[int, int]] = []
    for low, high in hosted:
        here = np.concatenate(([False], available[low : high + 1], [False]))
        begins, ends = np.flatnonzero(here[1:] & ~here[:-1]), np.flatnonzero(here[:-1] & ~here[1:])
        found += [(low + int(a), low + int(b) - 1) for a, b in zip(begins, ends, strict=True)]
    return found
