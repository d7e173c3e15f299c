"""A whole run in virtual time: the real cores, over a network with seeded faults.

The hosts here do the work of the programs without threads, sockets or waiting. The algorithm
really trains; the duration of training is drawn. Only the clients' states on a worker's disk and
the broker's ledger survive a crash.
"""

from __future__ import annotations

import functools
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from msgspec.structs import replace

from fedmq.broker.link.events import Delivery, PostMessage
from fedmq.broker.settings import BrokerSettings, LedgerSettings
from fedmq.broker.virtual.broker import VirtualBroker
from fedmq.broker.virtual.hosts import LinkHost
from fedmq.broker.virtual.network import Faults, VirtualNetwork
from fedmq.broker.wire.addresses import AGGREGATOR, EVALUATOR, RECORD, WORKER
from fedmq.broker.wire.encoding import decode_message
from fedmq.broker.wire.schema import (
    Buffer,
    Done,
    Hello,
    Message,
    RunEnded,
)
from fedmq.nodes.aggregator.computed import Computed
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.messages.actions import AckUpTo, AggregatorAction, Commit, EndRun, Start
from fedmq.nodes.messages.actions import Handled as DoneWith
from fedmq.nodes.run.devices import kind_of
from fedmq.nodes.run.setup import Setup
from fedmq.nodes.worker.client_state import ClientStateStore
from fedmq.nodes.worker.core import Action as WorkerAction
from fedmq.nodes.worker.core import (
    Evaluate,
    Evaluated,
    Pause,
    SaveClientState,
    Saved,
    Train,
    Trained,
    Worker,
)
from fedmq.nodes.worker.training import carry_out

RUN = "simulated"
_CHAT_TO = (RECORD, EVALUATOR, AGGREGATOR)
Ranges = tuple[tuple[int, int], ...]
H = TypeVar("H", bound="NodeHost")


@dataclass
class Chances:
    """Fault rates of a simulated run, per second of virtual time, and durations.

    faults: faults of single frames.
    crash: rate of crashes of each process.
    doom: rate of crashes at the worst moment: of the broker in the middle of a batch, of a node
        right after a post.
    cut, partition: rates of broken and partitioned connections, for each connection.
    away_s, partition_s: longest absence of a crashed process, and longest partition, in seconds.
    train_s: mean duration of a task, in seconds.
    chat: rate of bursts of small unused messages from each worker and the evaluator.
    share_files: whether nodes read blobs from the ledger's files, as on one host.
    """

    faults: Faults = field(default_factory=Faults)
    crash: float = 0.0
    doom: float = 0.0
    cut: float = 0.0
    partition: float = 0.0
    away_s: float = 5.0
    partition_s: float = 8.0
    train_s: float = 0.5
    chat: float = 0.0
    share_files: bool = False


class Simulation:
    """One run: a broker, an aggregator, workers and an evaluator.

    Args:
        setup: objects of the run, shared by all processes.
        workers: number of workers; each hosts a range of clients.
        folder: new folder for the broker's ledger.
        seed: seed of all faults and durations.
        chances: fault rates.
        settings: of the broker.
    """

    def __init__(
        self,
        setup: Setup,
        workers: int,
        folder: Path,
        seed: int,
        chances: Chances | None = None,
        settings: BrokerSettings | None = None,
    ) -> None:
        self.setup, self.chances = setup, chances or Chances()
        self.rng = random.Random(seed)  # noqa: S311 - not for secrets
        self.network = VirtualNetwork(self.rng, self.chances.faults)
        self.broker = VirtualBroker(
            self.network,
            folder,
            settings or BrokerSettings(3.0, 0.5),
            LedgerSettings(share_files=self.chances.share_files),
        )
        self.sessions: list[NodeHost] = []
        """All sessions of all nodes, in the order of their starts."""
        self.calm = False
        self._config = setup.config.to_toml()
        self._started = 0
        total = setup.problem.clients
        self.aggregator: AggregatorHost = self._begin(AggregatorHost, AGGREGATOR, (), None)
        for index in range(workers):
            clients = ((index * total // workers, (index + 1) * total // workers - 1),)
            self._begin(WorkerHost, f"worker-{index}", clients, ClientStateStore())
        self._begin(WorkerHost, EVALUATOR, (), ClientStateStore())
        self._inject_faults()

    def run(self, calm_after_s: float, limit_s: float) -> bool:
        """Simulate, without faults after ``calm_after_s``; return whether the run ended in time."""
        began = self.network.now
        self.network.after(calm_after_s, self._calm_down)
        while self.network.now - began < limit_s and self.network.step():
            if self.broker.up and self.broker.core.idle:
                return True
        return False

    @property
    def nodes(self) -> list[NodeHost]:
        """Return the sessions that are up."""
        return [each for each in self.sessions if each.link.up]

    def _begin(self, kind: type[H], name: str, clients: Ranges, kept: ClientStateStore | None) -> H:
        self._started += 1
        role = name if name in (AGGREGATOR, EVALUATOR) else WORKER
        setup = self.setup
        hello = Hello(
            node=name,
            role=role,
            session=f"{self._started:08d}",
            key=f"key of {name}",
            run=RUN,
            clients=clients,
            config=self._config if role == AGGREGATOR else "",
            total_clients=setup.problem.clients if role == AGGREGATOR else 0,
        )
        host = kind(self, hello, kept)
        self.sessions.append(host)
        if isinstance(host, AggregatorHost):
            self.aggregator = host
        return host

    def _restart_later(self, host: NodeHost) -> None:
        """Restart a node after a while, with its name, clients and disk."""
        hello = host.hello
        begin = functools.partial(self._begin, type(host), hello.node, hello.clients, host.kept)
        self.network.after(self.rng.random() * self.chances.away_s, begin)

    # ---- faults

    def _inject_faults(self) -> None:
        """Draw faults for this moment, and schedule the next draw."""
        if self.calm:
            return
        every = 0.1
        rng, chances = self.rng, self.chances
        if self.broker.up and rng.random() < chances.crash * every:
            self.broker.crash()
        if rng.random() < chances.doom * every:
            self.broker.crash_at_send = rng.randrange(3)
        if not self.broker.up:
            self.network.after(rng.random() * chances.away_s, self._revive_broker)
        for host in self.nodes:
            if host.link.ended is not None:
                continue
            if rng.random() < chances.crash * every:
                host.link.crash()
                self._restart_later(host)
            elif rng.random() < chances.doom * every:
                host.link.doomed = functools.partial(self._restart_later, host)
            elif rng.random() < chances.cut * every:
                self.network.cut(host.link)
            elif rng.random() < chances.partition * every:
                self.network.partition(host.link.name, rng.random() * chances.partition_s)
            elif (
                chances.chat
                and isinstance(host, WorkerHost)
                and rng.random() < chances.chat * every
            ):
                host.chat(rng)
        self.network.after(every, self._inject_faults)

    def _revive_broker(self) -> None:
        if not self.broker.up:
            self.broker.start()

    def _calm_down(self) -> None:
        self.calm = True
        self.network.faults = Faults()
        self.broker.crash_at_send = None
        self._revive_broker()


class NodeHost(ABC):
    """A session of a node: its link and its core."""

    def __init__(self, simulation: Simulation, hello: Hello, kept: ClientStateStore | None) -> None:
        self.simulation, self.hello, self.kept = simulation, hello, kept
        self.link = LinkHost(simulation.network, hello)
        self.link.on_news = self.look
        self._delivery: Delivery | None = None
        self._blobs: dict[tuple[str, bytes], Buffer] = {}

    def look(self) -> None:
        """Handle the deliveries that have arrived."""
        while self.link.ended is None and self.link.up and self.ready():
            if self._delivery is None:
                if not self.link.inbox:
                    return
                self._delivery = self.link.take()
            if not self.has_blobs(self._delivery):
                return
            delivery, self._delivery = self._delivery, None
            self.work(self.with_blobs(delivery))

    @abstractmethod
    def ready(self) -> bool:
        """Return whether the core can handle a message now."""

    @abstractmethod
    def work(self, delivery: Delivery) -> None:
        """Pass a message with complete blobs to the core."""

    def has_blobs(self, delivery: Delivery) -> bool:
        """Return whether all blobs of a delivery are here; request the first missing one."""
        owner = delivery.message.sender
        for index, blob in enumerate(delivery.message.blobs):
            name = (owner, blob.digest)
            if index in delivery.inline:
                self._blobs[name] = delivery.inline[index]
            elif name in self.link.fetched:
                data = self.link.fetched.pop(name)
                if data is None:
                    raise AssertionError(f"a blob of {delivery.message.id} is unavailable")
                self._blobs[name] = data
            elif name not in self._blobs and blob.size == len(
                here := b"".join(self.link.files.chunks(blob, delivery.extents.get(index, ())))
            ):
                self._blobs[name] = here
            elif name not in self._blobs:
                self.link.fetch(owner, blob)
                return name in self.link.fetched and self.has_blobs(delivery)
        return True

    def with_blobs(self, delivery: Delivery) -> Delivery:
        """Return a delivery with all its blobs."""
        message = delivery.message
        blobs = (self._blobs[message.sender, blob.digest] for blob in message.blobs)
        return replace(delivery, inline=dict(enumerate(blobs)))


class AggregatorHost(NodeHost):
    """Does the work of `run_aggregator`."""

    def __init__(self, simulation: Simulation, hello: Hello, kept: ClientStateStore | None) -> None:
        super().__init__(simulation, hello, kept)
        computed = Computed(device=kind_of("cpu"))
        self.core = Aggregator(simulation.setup, RUN, AGGREGATOR, computed)
        self.finished = ""
        self._started = False
        self._unsettled: list[int] = []

    def ready(self) -> bool:
        """Start the core, with its checkpoint, once the broker has admitted it."""
        if self.link.admitted is None:
            return False
        if not self._started:
            found = self.link.admitted.welcome.checkpoint
            start = Start()
            if found is not None:
                delivery = Delivery(found.seq, found.at, decode_message(found.message), {})
                if not self.has_blobs(delivery):
                    return False
                start = Start(self.with_blobs(delivery))
            self._started = True
            self._act(self.core.handle(start))
        return not self.finished

    def work(self, delivery: Delivery) -> None:
        """Fold a message."""
        self._unsettled.append(delivery.seq)
        self._act(self.core.handle(delivery))

    def _act(self, actions: Sequence[AggregatorAction]) -> None:
        for action in actions:
            match action:
                case PostMessage(message, data, consumes):
                    self.link.post(message, data, consumes)
                case DoneWith(seq, refused, code) if refused:
                    self.link.publish(Done.rejecting(seq, refused, code))
                case AckUpTo(but):
                    settled = [seq for seq in self._unsettled if seq not in but]
                    self.link.publish(Done(seqs=tuple(settled)))
                    self._unsettled = [seq for seq in self._unsettled if seq in but]
                case Commit():
                    self._commit(action)
                case EndRun(reason):
                    self.finished = reason
                    self.link.publish(RunEnded(reason=reason))

    def _commit(self, commit: Commit) -> None:
        """Post the end of a commit after a while, if this session is still up."""

        def done() -> None:
            if self.link.up:
                self.link.post(commit.message, (), ())

        simulation = self.simulation
        simulation.network.after(simulation.rng.expovariate(1 / simulation.chances.train_s), done)


class WorkerHost(NodeHost):
    """Does the work of `run_worker`."""

    def __init__(self, simulation: Simulation, hello: Hello, kept: ClientStateStore | None) -> None:
        super().__init__(simulation, hello, kept)
        self.core = Worker(simulation.setup, RUN, hello.node, hello.clients, kept)
        self._busy = False
        self._chats = 0

    def chat(self, rng: random.Random) -> None:
        """Post several small unused messages."""
        for _ in range(rng.randint(2, 6)):
            self._chats += 1
            name, to = f"{self.hello.session}/{self._chats}", rng.choice(_CHAT_TO)
            sender = self.hello.node
            self.link.post(Message(kind="chat", id=name, run=RUN, sender=sender, to=to), (), ())

    def ready(self) -> bool:
        """Return whether no task is running."""
        return self.link.admitted is not None and not self._busy

    def work(self, delivery: Delivery) -> None:
        """Handle a task."""
        self._act(list(self.core.handle(delivery)))

    def _act(self, actions: list[WorkerAction]) -> None:
        setup = self.simulation.setup
        while actions:
            action = actions.pop(0)
            match action:
                case Train() | Evaluate():
                    self._later(carry_out(action, setup, "cpu"), actions)
                    return
                case SaveClientState(client, state):
                    stands = self.kept.put(client, state) if self.kept is not None else state
                    actions = [*self.core.handle(Saved(stands)), *actions]
                case PostMessage(message, data, consumes):
                    self.link.post(message, data, consumes)
                case DoneWith(seq, refused, code) if refused:
                    self.link.publish(Done.rejecting(seq, refused, code, (seq,)))
                case DoneWith(seq):
                    self.link.publish(Done(seqs=(seq,)))
                case Pause():
                    pass  # the duration is drawn in any case

    def _later(self, event: Trained | Evaluated, rest: list[WorkerAction]) -> None:
        """Report the result of training after a while, if this session is still up."""

        def done() -> None:
            if self.link.up:
                self._busy = False
                self._act([*self.core.handle(event), *rest])
                self.look()

        self._busy = True
        simulation = self.simulation
        simulation.network.after(simulation.rng.expovariate(1 / simulation.chances.train_s), done)
