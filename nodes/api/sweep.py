"""Make the runs of a sweep: one configuration over a grid of values."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal

from fedmq.broker.errors import BrokerError
from fedmq.nodes.api.child_command import ChildCommand
from fedmq.nodes.api.given import Given, GivenConfig, usable_path
from fedmq.nodes.api.run import Run
from fedmq.nodes.api.running import Command, execute, printer
from fedmq.nodes.api.sweep_grid import GridCell, grid
from fedmq.nodes.api.sweep_record import CSV_FILE, SweepRecord
from fedmq.nodes.api.sweep_results import FAILED, IN_USE, INTERRUPTED, INVALID, Sweep, SweepRun
from fedmq.nodes.api.sweep_table import FINISHED, to_csv
from fedmq.nodes.cluster.continuing import RUNS, draw_id
from fedmq.nodes.errors import ConfigError, FolderInUse, NodeError, RunFailed
from fedmq.nodes.process.terminal import plain, plural
from fedmq.nodes.run_folder.folder import held

How = Literal["run", "simulate"]
"""How to make the runs: by `fedmq.run` or by `fedmq.simulate`."""
_NEEDED = {"workers": "run", "processes": "simulate", "on": "simulate"}
"""Value of ``how`` that an option needs."""
_COMMANDS: Mapping[str, Command] = {"run": "cluster", "simulate": "simulate"}


def sweep(
    base: GivenConfig,
    over: Mapping[str, Iterable[Any]],
    how: How = "run",
    folder: str | os.PathLike[str] | None = None,
    *,
    jobs: int = 1,
    workers: int | None = None,
    processes: int | None = None,
    on: Literal["ray"] | None = None,
    progress: bool | None = None,
) -> Sweep:
    """Run a configuration with each combination of some values, and return all the runs.

    A run that fails does not stop the others. With the folder of an earlier sweep, runs that have
    finished are not repeated, and others are resumed (a simulation starts over).

    Args:
        base: the configuration, as in `fedmq.run`.
        over: values by key, such as ``{"algorithm.lr": [0.1, 0.01], "run.seed": range(3)}``; a key
            without a dot, such as ``"schedule"``, has whole tables as values.
        how: ``"run"`` or ``"simulate"``.
        folder: of the sweep, with a folder for each run; by default a new one in ``runs``.
        jobs: number of runs at the same time.
        workers: number of worker processes of each run, for ``how="run"``.
        processes: number of processes that train each run, for ``how="simulate"``.
        on: ``"ray"`` trains on a Ray cluster, for ``how="simulate"``.
        progress: whether to print a line for each run; by default, in a notebook and if standard
            error is a terminal.

    Raises:
        ConfigError: a configuration is invalid; or the folder has a run of another configuration,
            or is in use by another sweep.
        KeyboardInterrupt: it was interrupted, and all runs have ended.
    """
    options = {"workers": workers, "processes": processes, "on": on}
    show = printer(progress=progress)
    made = Sweeper(base, over, how, folder, jobs, options, show=show)
    made.work()
    return made.sweep


class Sweeper:
    """Makes the runs of a sweep.

    Args:
        base, over, how, folder, jobs: see `sweep`.
        options: of each run's command, by name; None for none.
        show: prints a line of progress.

    Attributes:
        sweep: the runs.

    Raises:
        ConfigError: a configuration or an option is invalid.
    """

    def __init__(
        self,
        base: GivenConfig,
        over: Mapping[str, Iterable[Any]],
        how: How,
        folder: str | os.PathLike[str] | None,
        jobs: int = 1,
        options: Mapping[str, int | str | None] = {},
        *,
        show: Callable[[str], None],
    ) -> None:
        if how not in _COMMANDS:
            raise ConfigError(f"how: expected one of {', '.join(_COMMANDS)}, got {how!r}")
        if jobs < 1:
            raise ConfigError(f"jobs: expected at least 1, got {jobs}")
        given = {name: value for name, value in options.items() if value is not None}
        for name in given:
            if how != _NEEDED[name]:
                raise ConfigError(f'{name}: expected how="{_NEEDED[name]}", got {how!r}')
        self._how: How = how
        self._jobs, self._show = jobs, show
        self._options = [text for name in given for text in (f"--{name}", str(given[name]))]
        self._cells = grid(Given.of(base), over)
        folder = RUNS / f"sweep-{draw_id()}" if folder is None else folder
        path = usable_path(folder, "a folder for the sweep").absolute()
        self._others: dict[str, SweepRun] = {}
        self.sweep = Sweep(path, self._cells)
        self._done = 0
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._children: list[ChildCommand] = []

    def work(self) -> None:
        """Make all runs that are not there yet, while no other sweep uses the folder.

        Raises:
            ConfigError: the folder has a run of another configuration, or is in use.
            KeyboardInterrupt: it was interrupted, and all runs have ended.
        """
        with held(self.sweep.folder):
            record = SweepRecord(self.sweep.folder, self._how, self._cells)
            self._others = self._recorded(record)
            self._show(f"{plural(len(self._cells), 'run')} in {self.sweep.folder}")
            self._work(record)

    def _work(self, record: SweepRecord) -> None:
        interrupt: KeyboardInterrupt | None = None
        with ThreadPoolExecutor(self._jobs) as pool:
            waiting: set[Future[None]] = {
                pool.submit(self._make, cell, run, record)
                for cell, run in zip(self._cells, self.sweep.runs, strict=True)
            }
            while waiting:
                try:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                except KeyboardInterrupt as error:
                    interrupt = interrupt or error
                    self.interrupt()
                    continue
                for each in done:
                    each.result()
        if interrupt is not None:
            raise interrupt

    def interrupt(self) -> None:
        """Interrupt the runs that work, and start no others."""
        self._stopping.set()
        for child in list(self._children):
            child.interrupt()

    def _recorded(self, record: SweepRecord) -> dict[str, SweepRun]:
        """Return the runs in the folder that earlier sweeps have made and this one does not."""
        here = {cell.name for cell in self._cells}
        found = {}
        for name, settings in record.settings.items():
            if name in here:
                continue
            found[name] = made = SweepRun(name, settings, self.sweep.folder / name)
            with contextlib.suppress(NodeError, BrokerError):  # it has not begun, or is damaged
                made.run = Run(made.folder)
                made.status = made.run.status
        return found

    def _csv(self, record: SweepRecord) -> str:
        """Return the table of all runs in the folder."""
        runs = self._others | {each.name: each for each in self.sweep}
        return to_csv([runs[name].row() for name in record.settings])

    def _make(self, cell: GridCell, made: SweepRun, record: SweepRecord) -> None:
        """Make one run, if it is not there yet."""
        if self._stopping.is_set():
            return
        try:
            made.run = self._finished(made.folder, extend=cell.name in record.extended)
            made.run = made.run or self._execute(cell, made.folder)
            made.status = made.run.status
        except FolderInUse as error:
            made.status, made.reason = IN_USE, str(error)
        except ConfigError as error:
            made.status, made.reason = INVALID, str(error)
        except RunFailed as error:
            made.run, made.reason = error.run, str(error)
            made.status = INTERRUPTED if self._stopping.is_set() else FAILED
        except (NodeError, BrokerError) as error:
            made.status, made.reason = FAILED, str(error)
        with self._lock:
            self._done += 1
            if made.status == FINISHED:
                record.reached(cell)
            record.write(CSV_FILE, self._csv(record))
            self._show(self._line(made))

    def _line(self, made: SweepRun) -> str:
        accuracy = None if made.run is None else made.run.summary["final_accuracy"]
        facts = [f"{self._done} of {len(self._cells)}", made.name, made.status]
        facts += [] if accuracy is None else [f"accuracy {accuracy:.2%}"]
        return "  ".join([*facts, *([plain(made.reason)] if made.reason else [])])

    def _finished(self, folder: Path, *, extend: bool) -> Run | None:
        """Return the run that is there, if nothing is left to do; make room for one to start over.

        Args:
            folder: of the run.
            extend: resume the run even if it has finished.

        Raises:
            FolderInUse: another process uses the folder.
        """
        if not extend:
            try:
                run = Run(folder)
                if run.status == FINISHED:
                    return run
            except ConfigError:
                pass  # it had not begun
        if folder.exists():
            with held(folder):
                if self._how == "simulate":
                    shutil.rmtree(folder)
        return None

    def _execute(self, cell: GridCell, folder: Path) -> Run:
        child: list[ChildCommand] = []

        def started(command: ChildCommand) -> None:
            child.append(command)
            self._children.append(command)
            if self._stopping.is_set():
                command.interrupt()

        try:
            command = _COMMANDS[self._how]
            return execute(
                *(command, cell.given, folder, self._options),
                on_line=lambda _: None,
                started=started,
            )
        finally:
            for each in child:
                self._children.remove(each)
