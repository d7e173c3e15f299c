"""A whole run in virtual time over a population of clients, as `fedmq simulate` runs it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

from structlog.typing import FilteringBoundLogger

from fedmq.broker.errors import Rejected
from fedmq.broker.settings import BrokerSettings, LedgerSettings
from fedmq.broker.virtual.machine import Machine
from fedmq.broker.virtual.network import NO_FAULTS, START_S, Faults
from fedmq.broker.virtual.node import VirtualPort
from fedmq.broker.wire.addresses import EVALUATOR
from fedmq.broker.wire.schema import Hello
from fedmq.nodes.errors import NodeError, RunFailed
from fedmq.nodes.population.population import Population
from fedmq.nodes.population.table import STARTS_AT
from fedmq.nodes.process.logs import SILENT
from fedmq.nodes.process.terminal import ranges_in_words
from fedmq.nodes.run.setup import Setup
from fedmq.nodes.run.version_zero import version_zero
from fedmq.nodes.simulation.chances import Chances
from fedmq.nodes.simulation.population_node import PopulationNode
from fedmq.nodes.simulation.trainers import Trainer
from fedmq.nodes.simulation.virtual_node import VirtualAggregator, VirtualNode, VirtualWorker
from fedmq.nodes.simulation.virtual_run import Simulation
from fedmq.nodes.worker.client_state import ClientStateStore
from fedmq.nodes.worker.core import Evaluate, Evaluated, Train, Trained

_CALM_LEASE_S = 10 * 86_400.0
"""Lease of a run without faults: heartbeats of many virtual days would take most of the time."""
_LEASE_S = 600.0
"""Shortest lease of a run with faults, for the same reason."""
_DELIVERIES = 1_000_000
"""Sessions that may end during a task: no task is the cause of a crash here."""
_FAULTS_A_DRAW = 0.05
"""Mean number of faults between two draws: so few that two of a kind hardly ever coincide."""
_STEPS = 64
"""Events of the network between two reports of progress."""
_VERSION_STEPS, _CLIENT_STEPS = 1_000_000, 20
"""Most events of the network in a version, beside those for each client; a result takes ten."""
_IDLE_S = 30 * 86_400.0
"""Virtual time without any message after which a run has failed: nothing will happen any more."""


class PopulationRun(Simulation):
    """One run: a broker, an aggregator, an evaluator, and few nodes that host all clients.

    Commits and evaluations take no virtual time, and neither does the network: all of a task's
    time is that of its client. The run depends only on its arguments: its ledger is the same to
    the byte each time.

    Args:
        setup: objects of the run.
        folder: new folder for the broker's ledger.
        devices: of the clients.
        trainer: trains and evaluates; the caller closes it.
        run: id of the run; by default the one in the configuration.
        nodes: number of population nodes. One is enough for a million clients: it takes each task
            at once, so the broker's limits for nodes that do not read never hold it back. With
            several, the crash of a node takes away only a part of the clients.
        chances: fault rates; by default there are no faults.
        settings: of the broker; by default those of the configuration, with a lease of at least 10
            minutes (10 days if nothing can break) and without a limit of deliveries.
        ledger_settings: of the broker, by default those of the configuration; nodes always read
            its files.
        model_folder: where the aggregator saves the final model; None to save none.
        log: of all nodes.
        checked: whether all processes validate their states, for tests.
    """

    wall_s = STARTS_AT - START_S
    host_name = "population"

    def __init__(
        self,
        setup: Setup,
        folder: Path,
        devices: Population,
        trainer: Trainer,
        *,
        run: str = "",
        nodes: int = 1,
        chances: Chances | None = None,
        settings: BrokerSettings | None = None,
        ledger_settings: LedgerSettings | None = None,
        model_folder: Path | None = None,
        log: FilteringBoundLogger = SILENT,
        checked: bool = False,
    ) -> None:
        chances = chances or Chances()
        if chances.faults == Faults():
            chances = dataclasses.replace(chances, faults=NO_FAULTS)
        if settings is None:
            settings = setup.config.broker.settings()
            calm = chances.faults is NO_FAULTS and not (chances.any_faults or chances.hurts_disk)
            lease_s = _CALM_LEASE_S if calm else max(settings.lease_s, _LEASE_S)
            settings = dataclasses.replace(
                settings, lease_s=lease_s, beat_s=lease_s / 10, deliveries=_DELIVERIES
            )
        if chances.any_faults:
            mean_s = 1.0 / (chances.total * (nodes + 3))
            self.draw_every_s = min(max(1.0, _FAULTS_A_DRAW * mean_s), 600.0)
        most = max(settings.limits.clients, setup.problem.clients)
        limits = dataclasses.replace(settings.limits, clients=most)
        self._devices, self._trainer = devices, trainer
        self._model_folder, self._log = model_folder, log
        self._version_0 = version_zero(setup.problem)
        self._stopped = False
        super().__init__(
            setup,
            nodes,
            folder,
            setup.config.run.seed,
            dataclasses.replace(chances, share_files=True),
            dataclasses.replace(settings, limits=limits),
            ledger_settings or setup.config.broker.ledger_settings(),
            run=run or setup.config.run.id,
            checked=checked,
        )
        self._watch_availability()

    @property
    def now_s(self) -> float:
        """Virtual time since the start, in seconds."""
        return self.network.now - self.began

    def run_to_end(
        self, on_progress: Callable[[], object] = lambda: None, limit_s: float = math.inf
    ) -> str:
        """Simulate until the run is over.

        Args:
            on_progress: called many times a second of real time.
            limit_s: virtual time after which the run stops.

        Returns:
            Why the run ended; "" if it was stopped, or has reached the limit.

        Raises:
            RunFailed: the run ended without reaching its goal.
            Rejected: the broker did not admit a node.
            NodeError: the final model cannot be written; or nothing happens any more.
            ReturnedError: as in `run_worker`.
        """
        network, end = self.network, self.began + limit_s
        steps, version, version_steps = 0, -1, 0
        most_steps = _VERSION_STEPS + _CLIENT_STEPS * self.setup.problem.clients
        accepted, accepted_at = -1, network.now
        while not self._stopped and network.now < end and network.step():
            broker = self.broker
            if broker.up and broker.core.idle:
                return self._reason()
            steps += 1
            if steps % _STEPS:
                continue
            on_progress()
            if broker.up and broker.core.next_seq != accepted:
                accepted, accepted_at = broker.core.next_seq, network.now
            elif network.now > accepted_at + _IDLE_S and not self._at_work:
                raise NodeError(self._idle())
            if self.aggregator.core.version != version:
                version, version_steps = self.aggregator.core.version, steps
            elif steps > version_steps + most_steps and self.chances.any_faults:
                raise NodeError(
                    f"the simulation makes no progress: {most_steps:,} events without a new "
                    "version; check [simulation.faults]"
                )
            if broker.no_space and not self.chances.full:  # no virtual time makes room
                raise NodeError(f"the ledger cannot be written: {broker.no_space}")
        return ""

    @property
    def _at_work(self) -> bool:
        """Return whether a client has work that ends at some time."""
        return any(each.port.tasks.busy for each in self.nodes)

    def _reason(self) -> str:
        """Return why the run has ended: the session that ended it may have been killed since."""
        ended = [each for each in self.sessions if isinstance(each, VirtualAggregator)]
        last = [each for each in ended if each.finished][-1]
        if last.core.failed:
            raise RunFailed(last.finished)
        return last.finished

    def _idle(self) -> str:
        missing = self.aggregator.core.missing_clients()
        away = f", but {ranges_in_words(missing)} are away" if missing else ""
        return (
            f"nothing has happened for {_IDLE_S / 86_400:g} virtual days: expected a result "
            f"or a free client{away}; check [simulation] availability and [schedule]"
        )

    def stop(self) -> None:
        """Make `run_to_end` return soon; may be called from a signal handler."""
        self._stopped = True

    def close(self) -> None:
        """End all processes, and close the ledger."""
        for node in self.nodes:
            node.port.kill()
        self.broker.close()

    def aggregator_at(self, port: VirtualPort, machine: Machine, hello: Hello) -> VirtualAggregator:
        """Return a new session of the aggregator."""
        return VirtualAggregator(
            port,
            machine,
            hello,
            _no_time,
            self.setup,
            self._model_folder,
            self._log.bind(node=hello.node),
            self._version_0,
            quiet_s=math.inf,  # the clients would be named every few virtual seconds
            checked=self._checked,
        )

    def worker_at(
        self, port: VirtualPort, machine: Machine, hello: Hello, store: ClientStateStore
    ) -> VirtualNode:
        """Return a new session of a population node or the evaluator."""
        about, checked = (port, machine, hello), self._checked
        if hello.role == EVALUATOR:
            return VirtualWorker(
                *about,
                _no_time,
                self.setup,
                store,
                self._compute,
                self._log.bind(node=hello.node),
                self._version_0,
                checked=checked,
            )
        return PopulationNode(
            *about,
            self.setup,
            store,
            self._devices,
            self._trainer,
            self.began,
            self._log.bind(node=hello.node),
            self._version_0,
            checked=checked,
        )

    def exited(self, node: VirtualNode, again: Callable[[], VirtualNode]) -> None:
        """Handle the end of a session.

        Raises:
            Rejected: the broker did not admit it.
        """
        if isinstance(node.ended, Rejected):
            raise node.ended
        if node.ended is None and node is not self.aggregator:
            self.sessions.remove(node)  # of many crashes, only the aggregators' sessions are needed
        super().exited(node, again)

    def _compute(self, action: Train | Evaluate) -> Trained | Evaluated:
        return self._trainer.start(action, self.now_s)()

    def _watch_availability(self) -> None:
        """Schedule the next change of the clients' availability."""
        availability = self._devices.availability
        if availability is not None and (at := availability.next_change) < math.inf:
            self.network.at(self.began + at, functools.partial(self._change_availability, at))

    def _change_availability(self, at: float) -> None:
        availability = self._devices.availability
        if availability is None:
            return
        back, away = availability.advance(at)
        for node in self.nodes:
            if isinstance(node, PopulationNode):
                node.report(back, away)
        self._watch_availability()


def _no_time() -> float:
    return 0.0
