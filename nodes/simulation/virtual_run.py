"""A whole run in virtual time: the real programs, over a network with seeded faults.

Broker and nodes run the code of production, without threads, sockets or waiting. The algorithm
really trains; how long training takes is drawn. After a crash, only the broker's ledger, the
clients' states and each node's last session are left.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Mapping
from pathlib import Path

from msgspec.structs import replace

from fedmq.broker.access.rights import KEYLESS, AccessStore, Origin
from fedmq.broker.settings import BrokerSettings, LedgerSettings
from fedmq.broker.virtual.broker import VirtualBroker
from fedmq.broker.virtual.disk import VirtualDisk
from fedmq.broker.virtual.machine import Machine
from fedmq.broker.virtual.network import Faults, VirtualNetwork
from fedmq.broker.virtual.node import VirtualPort
from fedmq.broker.virtual.plain_disk import PlainDisk
from fedmq.broker.wire.addresses import AGGREGATOR, BROKER, EVALUATOR, RECORD, WORKER
from fedmq.broker.wire.schema import Hello, Message, Post
from fedmq.nodes.run.session import session_id
from fedmq.nodes.run.setup import Setup
from fedmq.nodes.simulation.chances import Chances
from fedmq.nodes.simulation.virtual_node import VirtualAggregator, VirtualNode, VirtualWorker, apart
from fedmq.nodes.worker.client_state import ClientStateStore

RUN = "simulated"
Ranges = tuple[tuple[int, int], ...]
_CHAT_TO = (RECORD, EVALUATOR, AGGREGATOR)


def split(clients: int, nodes: int) -> list[Ranges]:
    """Return ranges of about equal size, one for each node, that cover all clients."""
    return [((k * clients // nodes, (k + 1) * clients // nodes - 1),) for k in range(nodes)]


class Simulation:
    """One run: a broker, an aggregator, workers and an evaluator.

    Args:
        setup: objects of the run, shared by all processes.
        workers: number of workers; each hosts a range of clients.
        folder: new folder for the broker's ledger.
        seed: seed of all faults and durations.
        chances: fault rates.
        settings: of the broker.
        ledger_settings: of the broker; `Chances` decides durability and sharing of files.
        on_start: called with the broker whenever it has opened its ledger, and with each new
            session of a node.
        access: who may connect; by default a broker without keys.
        origins: what the transport proves about each node, by name; read when a session starts.
        run: id of the run.
        checked: whether all processes validate their states, and may fail at any time. Without,
            the disk is plain and nothing draws faults unless ``chances`` has some.

    Attributes:
        origins: as given.
        network, broker: of the run.
        began: the network's time at its start.
        aggregator: newest session of the aggregator.
        sessions: all sessions of all nodes, in the order of their starts.
        machines: the machine of the broker and of each node, by name.
    """

    aggregator: VirtualAggregator
    wall_s = 1e6
    """How far wall clocks are ahead of the network's time: a jump back does not take them below
    0."""
    draw_every_s = 0.1
    """Virtual time between two draws of faults."""
    host_name = "worker"
    """Names of nodes that host clients, up to their number."""

    def __init__(
        self,
        setup: Setup,
        workers: int,
        folder: Path,
        seed: int,
        chances: Chances | None = None,
        settings: BrokerSettings | None = None,
        ledger_settings: LedgerSettings | None = None,
        on_start: Callable[[VirtualBroker | VirtualNode], object] = lambda _: None,
        access: AccessStore | None = None,
        origins: Mapping[str, Origin] | None = None,
        *,
        run: str = RUN,
        checked: bool = True,
    ) -> None:
        self.run_id, self._checked = run, checked
        self.origins = {} if origins is None else origins
        self.setup, self.chances = setup, chances or Chances()
        self.rng = random.Random(seed)  # noqa: S311 - not for secrets
        self.network = VirtualNetwork(self.rng, self.chances.faults)
        self.began = self.network.now
        self.machines: dict[str, Machine] = {}
        self.sessions: list[VirtualNode] = []
        self._calm = self._restarts = False
        self._chats, self._on_start = 0, on_start
        self._config = setup.config.to_toml()
        self._last_session: dict[str, str] = {}
        settings = settings or BrokerSettings(3.0, 0.5)
        self._lease_s = settings.lease_s
        faulty = checked or self.chances.hurts_disk
        self._disk = VirtualDisk(self.rng) if faulty else None
        self.broker = VirtualBroker(
            self.network,
            folder,
            settings,
            dataclasses.replace(
                ledger_settings or LedgerSettings(),
                share_files=self.chances.share_files,
                durability="power" if self.chances.power else "process",
            ),
            machine=self.machine(BROKER),
            disk=self._disk or PlainDisk(),
            access=access,
            on_start=on_start,
            checked=checked,
        )
        if self._disk is not None:
            self._disk.rates = dict(self.chances.disk)
        self.broker.batch_s = self.chances.batch_s
        self.start_aggregator()
        for index, clients in enumerate(split(setup.problem.clients, workers)):
            self.start_worker(f"{self.host_name}-{index}", clients, ClientStateStore())
        self.start_worker(EVALUATOR, (), ClientStateStore())
        if checked or self.chances.any_faults:
            self._inject_faults()

    def run(self, calm_after_s: float, limit_s: float) -> bool:
        """Simulate, without faults after ``calm_after_s``; return whether the run ended in time."""
        began = self.network.now
        self.network.after(calm_after_s, self._calm_down)
        while self.network.now - began < limit_s and self.network.step():
            if self.broker.up and self.broker.core.idle:
                return True
        return False

    def close(self) -> None:
        """Kill all processes, and close the ledger."""
        for node in self.nodes:
            node.port.kill()
        self.broker.crash()

    @property
    def nodes(self) -> list[VirtualNode]:
        """Return the sessions that are up."""
        return [each for each in self.sessions if each.port.up]

    def start_aggregator(self) -> VirtualAggregator:
        """Start a session of the aggregator; it is restarted when it is killed."""
        port, machine, hello = self._session(AGGREGATOR)
        hello = replace(hello, config=self._config, total_clients=self.setup.problem.clients)
        node = self.aggregator_at(port, machine, hello)
        self._started(node, self.start_aggregator)
        self.aggregator = node
        return node

    def start_worker(self, name: str, clients: Ranges, store: ClientStateStore) -> VirtualNode:
        """Start a session of a worker or the evaluator; it is restarted when it is killed.

        Args:
            name: of the node.
            clients: ranges of clients that it hosts, both ends included.
            store: the clients' states.
        """
        port, machine, hello = self._session(name)
        hello = replace(hello, clients=clients)
        node = self.worker_at(port, machine, hello, store)
        self._started(node, functools.partial(self.start_worker, name, clients, store))
        return node

    def aggregator_at(self, port: VirtualPort, machine: Machine, hello: Hello) -> VirtualAggregator:
        """Return a new session of the aggregator."""
        return VirtualAggregator(port, machine, hello, self._draw_s, self.setup)

    def worker_at(
        self, port: VirtualPort, machine: Machine, hello: Hello, store: ClientStateStore
    ) -> VirtualNode:
        """Return a new session of a worker or the evaluator."""
        return VirtualWorker(port, machine, hello, self._draw_s, self.setup, store)

    def _session(self, name: str) -> tuple[VirtualPort, Machine, Hello]:
        """Return the process, machine and Hello of a new session of a node."""
        machine, last = self.machine(name), self._last_session.get(name, "")
        session = session_id(int(machine.wall() * 1e9), last, f"{len(self.sessions):08x}")
        self._last_session[name] = session
        role = name if name in (AGGREGATOR, EVALUATOR) else WORKER
        key = f"key of {name}"
        hello = Hello(node=name, role=role, session=session, key=key, run=self.run_id)
        origin = self.origins.get(name, KEYLESS)
        port = VirtualPort(self.network, machine, name, apart, origin, checked=self._checked)
        return port, machine, hello

    def _started(self, node: VirtualNode, again: Callable[[], VirtualNode]) -> None:
        self.sessions.append(node)
        node.port.on_exit = functools.partial(self.exited, node, again)
        self._on_start(node)

    def exited(self, node: VirtualNode, again: Callable[[], VirtualNode]) -> None:
        """Handle the end of a session: start another one later, if it was killed."""
        if node.ended is None:
            self._later(self.chances.away_s, again)

    def machine(self, name: str) -> Machine:
        """Return the machine of the broker, or of a node."""
        if name not in self.machines:
            drift = self.chances.drift
            rate = 1.0 + (drift and self.rng.uniform(-drift, drift))
            self.machines[name] = Machine(self.network, self.wall_s, rate)
        return self.machines[name]

    def _draw_s(self) -> float:
        return self.rng.expovariate(1 / self.chances.train_s)

    def _later(self, most_s: float, act: Callable[[], object]) -> None:
        self.network.after(self.rng.random() * most_s, act)

    # ---- faults

    def _inject_faults(self) -> None:
        """Draw faults for this moment, and schedule the next draw."""
        if self._calm:
            return
        self._disturb_broker()
        for node in self.nodes:
            self._disturb(node)
        for machine in self.machines.values():
            if self._happens(self.chances.jump):
                most = self.chances.jump_s
                machine.jump(self.rng.uniform(-most, most))
        self.network.after(self.draw_every_s, self._inject_faults)

    def _disturb_broker(self) -> None:
        chances, happens, broker = self.chances, self._happens, self.broker
        if happens(chances.crash + chances.broker_crash) and broker.up:
            self._count("broker killed")
            broker.crash()
        if happens(chances.power):
            broker.crash(power=True)
        if happens(chances.doom):
            broker.loses_power = chances.power > 0 and self.rng.random() < 0.5
            if self.rng.random() < 0.5:
                broker.crash_at_send = self.rng.randrange(3)
            elif self._disk is not None:
                self._disk.crash_at(self._disk.operations + self.rng.randrange(8))
        if happens(chances.pause):
            broker.pause()
            self._later(chances.pause_s, functools.partial(self._end_pause, broker, broker.crash))
        if happens(chances.full) and self._disk is not None:
            self._disk.full = True
            self._later(chances.full_s, self._make_space)
        if not broker.up and not self._restarts:
            self._restarts = True
            self._later(chances.away_s, self._restart_broker)

    def _restart_broker(self) -> None:
        self._restarts = False
        self.broker.start()

    def _make_space(self) -> None:
        if self._disk is not None:
            self._disk.full = False

    def _disturb(self, node: VirtualNode) -> None:
        chances, happens, port = self.chances, self._happens, node.port
        extra = chances.worker_crash if node.hello.role == WORKER else 0.0
        if happens(chances.crash + extra):
            self._count(f"{node.hello.role} killed")
            port.kill()
        elif happens(chances.doom):
            any_frame = self.rng.random() < 0.5
            port.doomed = lambda frame: any_frame or isinstance(frame, Post)
        elif happens(chances.pause):
            seconds, lease_s = self.rng.random() * chances.pause_s, self._lease_s
            port.pause()
            self.network.after(seconds, functools.partial(self._end_pause, port, port.kill))
            if seconds > lease_s:  # its I/O thread is suspended, too, so the connection breaks
                away = functools.partial(self.network.partition, port.name, seconds - lease_s)
                self.network.after(lease_s, away)
        elif happens(chances.cut):
            self.network.cut(port)
        elif happens(chances.partition):
            self.network.partition(port.name, self.rng.random() * chances.partition_s)
        elif isinstance(node, VirtualWorker) and happens(chances.chat):
            for _ in range(self.rng.randint(2, 6)):
                self._chats += 1
                name, sender = f"{node.hello.session}/{self._chats}", node.hello.node
                to = self.rng.choice(_CHAT_TO)
                node.hand_in(Message(kind="chat", id=name, run=self.run_id, sender=sender, to=to))
        elif isinstance(node, VirtualWorker) and happens(chances.availability):
            node.report_one(self.rng)

    def _happens(self, rate: float) -> bool:
        return rate > 0 and self.rng.random() < rate * self.draw_every_s

    def _end_pause(self, process: VirtualBroker | VirtualPort, kill: Callable[[], object]) -> None:
        """Let a suspended process continue, or kill it."""
        if not process.up:
            return
        name = "broker" if process is self.broker else "node"
        if self._calm or self.rng.random() < 0.5:
            self._count(f"{name} suspended and continued")
            process.resume()
        else:
            self._count(f"{name} suspended and killed")
            kill()

    def _count(self, kind: str) -> None:
        self.network.made[kind] += 1

    def _calm_down(self) -> None:
        self._calm = True
        self.network.faults = Faults()
        self.broker.crash_at_send = None
        if self._disk is not None:
            self._disk.rates.clear()
            self._disk.crash_at(-1)
            self._make_space()
        for node in self.nodes:
            node.port.doomed = lambda _: False
            if self.chances.availability and isinstance(node, VirtualWorker):
                node.report(back=node.hello.clients)
        self._keep_broker_up()

    def _keep_broker_up(self) -> None:
        """Start the broker if it is down: a crash that was planned earlier may still come."""
        self.broker.start()
        self.network.after(1.0, self._keep_broker_up)
