"""What ``fedmq simulate`` does: a whole run in virtual time, with a run folder like any other's."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog
import torch
from rich.console import Console

from fedmq.broker.ledger.reader import LedgerTail
from fedmq.broker.process import tune_process
from fedmq.nodes.cluster.console import SupervisorConsole
from fedmq.nodes.cluster.view import LiveView, closing_table
from fedmq.nodes.errors import ON_PURPOSE, ConfigError, NodeError, OwnCodeError, own_code
from fedmq.nodes.history.run import RunHistory
from fedmq.nodes.population.population import Population
from fedmq.nodes.population.table import SimulationTable
from fedmq.nodes.process import logs
from fedmq.nodes.process.exception_text import explained, reason_of
from fedmq.nodes.process.signals import ENOUGH, INTERRUPTED, Stopped, this_process
from fedmq.nodes.process.terminal import plain, plural
from fedmq.nodes.run.setup import Setup
from fedmq.nodes.run_folder.folder import LEDGER, SIMULATION_LOG, write_config
from fedmq.nodes.run_folder.summary import summary_of
from fedmq.nodes.run_folder.summary_file import SIMULATED_IN_S, remove_summary, save_summary
from fedmq.nodes.simulation.chances import chances_of
from fedmq.nodes.simulation.population_run import PopulationRun
from fedmq.nodes.simulation.trainers import InlineTrainer, Trainer, Wait
from fedmq.nodes.simulation.view import SimulationView
from fedmq.nodes.worker.core import Evaluate, Evaluated, Train, Trained

_REFRESH_S = 0.1
"""Real time between two looks at the ledger."""
_LONGEST = 1000
"""Characters of a reason, at most."""


class SimulationCommand:
    """Simulates a run, shows its progress, and writes its folder.

    Args:
        setup: objects of the run.
        folder: of the run; it must exist, and have no ledger with a run.
        begun: start of the run in virtual time, in seconds since 1970.
        console: for the live view.
        population: of all clients.
        make_trainer: makes the trainer.
        trained_by: names the trainer in the title.
    """

    def __init__(
        self,
        setup: Setup,
        folder: Path,
        begun: float,
        console: Console,
        population: Population,
        make_trainer: Callable[[], Trainer],
        trained_by: str,
    ) -> None:
        self._setup, self._folder, self._begun = setup, folder, begun
        self._console, self._population = console, population
        self._make_trainer, self._trained_by = make_trainer, trained_by
        self._history = RunHistory(begun)
        self._ledger = LedgerTail(folder / LEDGER)
        self._output = SupervisorConsole(console, folder / SIMULATION_LOG, "simulation")
        self._say = self._output.say
        self._began_at, self._look_at = time.monotonic(), 0.0
        self._trainer: _InterruptibleTrainer | None = None
        self._run: PopulationRun | None = None
        self._failure = ""

    def run(self) -> int:
        """Run to the end; return the exit code.

        0: the run reached its goal. 1: the run failed, or the summary cannot be written. 2: the
        run could not be started. 130: interrupted.

        Raises:
            LedgerError: the ledger is damaged.
        """
        code = 1
        with (
            self._logging(),
            this_process.taken(),
            this_process.noting(self._on_signal, watched=True),
        ):
            try:
                self._start()
                code = self._simulate()
            except Stopped as stopped:
                this_process.announced = True
                self._say(f"stopped by {stopped}")
                code = INTERRUPTED
            except (ConfigError, OwnCodeError) as error:
                self._say(f"fedmq: {error}")
                self._failure, code = str(error), 2
            except ON_PURPOSE as error:
                self._failure = str(error)
                self._catch_up()
                if self._history.ended is None:
                    self._say(f"fedmq: the run failed: {plain(error, _LONGEST)}")
            except Exception as error:  # noqa: BLE001 - the folder is completed, whatever it is
                if this_process.count:  # a signal may interrupt a library anywhere
                    code = INTERRUPTED
                else:
                    structlog.get_logger().exception("crashed")
                    self._failure = f"crashed: {explained(error)}; see {self._log_file}"
                    self._say(f"fedmq: {self._failure}")
            finally:
                # From here on, only the third signal interrupts.
                with this_process.noting(_end_at_third):
                    self._end()
                    code = self._close(code)
        return code

    # ---- the run

    @contextlib.contextmanager
    def _logging(self) -> Iterator[None]:
        """Send the log of all nodes to a file; if it cannot be opened, to standard error."""
        run = self._setup.config.run.id
        try:
            file = logs.configure(self._log_file, self._lost, node="simulation", run=run)
        except OSError as error:
            logs.configure(None, node="simulation", run=run)
            self._lost(f"cannot write {self._log_file}: {reason_of(error)}")
            yield
            return
        try:
            yield
        finally:
            logs.configure(None, node="simulation", run=run)
            file.close()

    def _lost(self, what: str) -> None:
        self._say(f"fedmq: {what}; going on without it")

    def _start(self) -> None:
        this_process.check()
        setup = self._setup
        write_config(self._folder, setup.config, self._begun, simulated=True)
        remove_summary(self._folder)
        torch.set_num_threads(setup.config.worker.threads)
        tune_process()
        trainer = self._trainer = _InterruptibleTrainer(self._make_trainer())
        table = setup.config.simulation or SimulationTable()
        with own_code("algorithm.name"):
            self._run = PopulationRun(
                setup,
                self._folder / LEDGER,
                self._population,
                trainer,
                nodes=table.nodes or 1,
                chances=chances_of(table.faults),
                model_folder=self._folder,
                log=structlog.get_logger(),
            )

    def _simulate(self) -> int:
        """Simulate to the end of the run; return the exit code."""
        if self._run is None:
            raise ValueError("expected a run that has started")
        config, history = self._setup.config, self._history
        clients = plural(self._setup.problem.clients, "simulated client")
        title = (
            f"fedmq {config.run.id}: {config.algorithm['name']}, {config.schedule['name']}, "
            f"{config.problem['name']}, {clients}, {self._trained_by}"
        )
        with SimulationView(self._console, title, self._say) as view:
            this_process.check()  # from here on, `stop` ends it
            self._run.run_to_end(functools.partial(self._look, view))
            this_process.check()
            self._catch_up()
            view.show(history)
        return 1 if history.failed else 0

    def _look(self, view: LiveView) -> None:
        """Show the progress, at most each `_REFRESH_S`."""
        if time.monotonic() >= self._look_at:
            self._catch_up()
            view.show(self._history)
            self._look_at = time.monotonic() + _REFRESH_S

    def _catch_up(self) -> None:
        for entry in self._ledger.poll():
            self._history.feed(entry)

    def _on_signal(self) -> None:
        if self._run is not None:
            self._run.stop()
        if self._trainer is not None and self._trainer.waiting:
            raise Stopped(this_process.name)

    # ---- ending

    def _end(self) -> None:
        """End the training, and close the ledger."""
        if self._trainer is not None:
            self._trainer.close()
        if self._run is not None:
            self._run.close()

    def _close(self, code: int) -> int:
        """Write the summary, then print it; return the exit code."""
        if self._run is None:
            return code
        self._catch_up()
        history = self._history
        if history.failed:
            self._say(f"fedmq: the run failed: {plain(history.ended, _LONGEST)}")
        summary = summary_of(history)
        if self._failure and history.ended is None:  # what failed could not record it
            wall_s = max(history.wall_s, self._run.now_s)
            summary |= {"status": "failed", "ended": plain(self._failure, _LONGEST)}
            summary["wall_s"] = round(wall_s, 3)
        summary[SIMULATED_IN_S] = round(time.monotonic() - self._began_at, 3)
        try:
            save_summary(self._folder, summary)
        except NodeError as error:
            self._say(f"fedmq: {error}")
            code = code or 1
        self._output.show(lambda: closing_table(summary))
        self._say(f"in {self._folder}")
        if code == INTERRUPTED:
            self._say("a simulation cannot be resumed: to start over, use another folder")
        return code

    @property
    def _log_file(self) -> Path:
        return self._folder / SIMULATION_LOG


class _InterruptibleTrainer:
    """A trainer whose waits a signal may end.

    Attributes:
        waiting: whether the simulation waits for a result, or computes one.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.close = trainer.close
        self.waiting = False

    def start(self, action: Train | Evaluate, due: float = 0.0) -> Wait:
        """Begin to train or evaluate, see `Trainer.start`."""
        return functools.partial(self._wait, self._trainer.start(action, due))

    def _wait(self, wait: Wait) -> Trained | Evaluated:
        this_process.check()
        self.waiting = True
        try:
            return wait()
        finally:
            self.waiting = False


def trainer_of(
    setup: Setup, device: str, processes: int, cluster: str | None
) -> tuple[Callable[[], Trainer], str]:
    """Return a function that makes the trainer, and the trainer's name for people.

    Args:
        setup: objects of the run.
        device: torch device.
        processes: number of training processes; 0 trains in this process.
        cluster: ``ray`` for a Ray cluster.
    """
    if cluster == "ray":
        from fedmq.nodes.simulation.ray_trainer import RayTrainer

        return functools.partial(RayTrainer, setup.config, setup.config.allowed), "trained on Ray"
    if not processes:
        return functools.partial(InlineTrainer, setup, device), "trained in this process"
    from fedmq.nodes.simulation.process_trainer import ProcessTrainer

    make = functools.partial(ProcessTrainer, setup.config, setup.config.allowed, processes)
    return make, f"{processes} training process{'' if processes == 1 else 'es'}"


def _end_at_third() -> None:
    if this_process.count >= ENOUGH:
        os._exit(INTERRUPTED)
