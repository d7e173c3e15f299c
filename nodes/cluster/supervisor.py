"""The local cluster: broker, aggregator, workers and evaluator as processes of one host.

A process that is killed or crashes is started again: the ledger has what it needs to go on.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing as mp
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.console import Console

from fedmq.broker.core.state import Continuation
from fedmq.broker.ledger.reader import LedgerTail
from fedmq.broker.wire.addresses import EVALUATOR, WORKER
from fedmq.nodes.cluster.children import (
    BEYOND_HELP,
    NOTE,
    READY,
    aggregator_main,
    broker_main,
    child_main,
    worker_main,
)
from fedmq.nodes.cluster.console import SupervisorConsole
from fedmq.nodes.cluster.forking import end_forkserver, kill_forkserver
from fedmq.nodes.cluster.view import LiveView, closing_table
from fedmq.nodes.errors import ConfigError, NodeError
from fedmq.nodes.process.signals import ENOUGH, INTERRUPTED, Stopped, blocked, this_process
from fedmq.nodes.process.terminal import plain
from fedmq.nodes.run.config import Config
from fedmq.nodes.run_folder.folder import SUPERVISOR_LOG, write_config
from fedmq.nodes.run_folder.summary import RunFold
from fedmq.nodes.run_folder.summary_file import remove_summary, save_summary

_START_S = 30.0
_STOP_S = 5.0
_REFRESH_S = 0.1
_LONGEST = 1000
"""Characters of a reason that is shown."""
_RESTARTS = 10
_RESTARTS_WITHIN_S = 60.0
"""A process that ended more often than that within this time is beyond help."""


@dataclass
class _Child:
    """A process of the cluster and the pipe on which it says what went wrong."""

    name: str
    start: Callable[[], _Child]
    process: Any
    report: Connection
    restarts: list[float] = field(default_factory=list)
    """When it was started again, newest last."""
    last_words: str = ""
    """What it said before it ended."""
    gone: bool = False
    """It has ended for good."""
    told: bool = False
    """That was said."""

    def may_restart(self, now: float) -> bool:
        """Tell whether it is worth starting again: killed or crashed, and not too often."""
        recent = [each for each in self.restarts if each > now - _RESTARTS_WITHIN_S]
        return self.process.exitcode not in (None, 0, 2, BEYOND_HELP) and len(recent) < _RESTARTS

    def reports(self) -> Iterator[str]:
        """Yield what it reports and goes on; keep what it says before it ends."""
        with contextlib.suppress(EOFError, OSError):
            while self.report.poll():
                said = self.report.recv_bytes().decode()
                if said.startswith((READY, NOTE)):
                    yield said
                else:
                    self.last_words = said

    def complaint(self) -> str:
        """Return what it said before it ended, or how it ended."""
        list(self.reports())
        code = self.process.exitcode
        if code is not None and -code in signal.valid_signals():
            return self.last_words or f"was ended by {signal.Signals(-code).name}"
        return self.last_words or f"ended with exit code {code}"


def worker_names(config: Config, clients: int) -> list[str]:
    """Return the names of a cluster's workers; none is without a client.

    Raises:
        ConfigError: there are other values for a worker that there is not.
    """
    names = [f"worker-{index}" for index in range(min(config.worker.count, clients))]
    for name in config.worker.nodes:
        if name not in names:
            some = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            raise ConfigError(f"worker.nodes: this cluster has {some}, got {name!r}")
    return names


class Cluster:
    """Starts the processes, watches them, and ends every one of them.

    Args:
        config: checked and complete; the processes may run the code that it allows.
        clients: K, which are dealt to the workers in ranges.
        folder: of the run; it must exist.
        started_at: when the run was begun, in seconds since 1970; None if nobody knows.
        console: for the view.
        continuation: of a run in the folder that is taken up again.
        go_on: the command that takes up this run if it is stopped; by default the one that
            needs nothing but the folder.
    """

    def __init__(
        self,
        config: Config,
        clients: int,
        folder: Path,
        started_at: float | None,
        console: Console,
        continuation: Continuation | None = None,
        go_on: str = "",
    ) -> None:
        self._continuation = continuation
        self._config, self._clients, self._folder = config, clients, folder
        self._started_at = started_at
        self._console = console
        self._go_on = go_on or go_on_command(folder)
        self._children: dict[str, _Child] = {}
        self._fold = RunFold(started_at)
        self._follower = LedgerTail(folder / "ledger")
        self._speaker = SupervisorConsole(console, folder / SUPERVISOR_LOG)
        self._say = self._speaker.say

    def run(self) -> int:
        """Run to the end; return the exit code.

        0: the run reached its end. 1: it failed, a process did, or the summary cannot be written.
        2: the run could not be started. 130: interrupted.

        Raises:
            LedgerError: the ledger is damaged.
            NodeError: the ledger does not hold the end of a run that has ended.
        """
        text = self._config.to_toml()
        begun = time.time() if self._started_at is None else self._started_at
        code = 1
        # From here on nothing is cut in two by a signal: what has been started is ended.
        with this_process.taken(), this_process.noting():
            try:
                write_config(self._folder, self._config, begun)
                remove_summary(self._folder)
                endpoint = self._start_broker(text)
                self._start_nodes(endpoint, text)
                code = self._watch()
            except Stopped as stopped:
                this_process.announced = True
                self._say(f"stopped by {stopped}; ending the nodes")
                code = INTERRUPTED
            except NodeError as error:
                self._say(f"fedmq: {error}")
                code = 2
            finally:
                self._stop_all()
            return self._close(code)

    # ---- starting

    def _start_broker(self, text: str) -> str:
        # A fresh interpreter: the broker imports no torch.
        context = mp.get_context("spawn")
        bind, going_on = self._config.broker.bind, self._continuation
        child = self._start(context, "broker", broker_main, text, bind, going_on)
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            this_process.check()
            for said in child.reports():
                if said.startswith(READY):
                    where = said.removeprefix(READY)
                    # Started again, it listens where the nodes know it.
                    child.start = functools.partial(
                        self._start, context, "broker", broker_main, text, where
                    )
                    return where
                self._note(child, said)
            if child.process.exitcode is not None:
                raise NodeError(child.last_words or f"the broker {child.complaint()}")
            wait([child.report, child.process.sentinel], _REFRESH_S)
        raise NodeError(f"the broker did not start within {_START_S:g} s")

    def _start_nodes(self, endpoint: str, text: str) -> None:
        context = mp.get_context("forkserver")
        # What the person's configuration names; over the wire might come another.
        run, own = self._config.run.id, self._config.allowed
        # The first waits until torch is imported in the process that it is forked from, which
        # a signal ends; then there is nothing to wait for.
        with this_process.noting(kill_forkserver):
            self._start(context, "aggregator", aggregator_main, endpoint, text, run, own)
        total = self._clients
        names = worker_names(self._config, total)
        for index, name in enumerate(names):
            clients = (index * total // len(names), (index + 1) * total // len(names) - 1)
            self._start(context, name, worker_main, endpoint, clients, WORKER, run, own)
        self._start(context, "evaluator", worker_main, endpoint, None, EVALUATOR, run, own)

    def _start(self, context: Any, name: str, target: Callable[..., None], *args: Any) -> _Child:
        def start() -> _Child:
            return self._start(context, name, target, *args)

        ours, theirs = mp.Pipe(duplex=False)
        process = context.Process(
            target=child_main, name=name, args=(name, str(self._folder), theirs, target, args)
        )
        try:
            with blocked():
                process.start()
        except (EOFError, OSError) as error:
            ours.close()
            this_process.check()
            # What nodes are forked from may have been killed, or there is no memory.
            raise NodeError(f"cannot start {name}: {error!r}") from None
        finally:
            theirs.close()
        child = self._children[name] = _Child(name, start, process, ours)
        return child

    # ---- watching

    def _watch(self) -> int:
        """Follow the ledger until the run is over; return the exit code."""
        fold, config = self._fold, self._config
        title = (
            f"fedmq {config.run.id}: {config.algorithm['name']}, {config.schedule['name']}, "
            f"{config.problem['name']}, {self._clients} clients on "
            f"{len(self._children) - 3} workers"
        )
        with LiveView(self._console, title, self._say) as view:
            while True:
                this_process.check()
                fold.feed(self._follower.poll())
                view.show(fold)
                for child in self._children.values():
                    for said in child.reports():
                        self._note(child, said)
                if fold.ended is None:
                    self._restart()
                living = [each for each in self._children.values() if each.process.exitcode is None]
                ended = [each for each in self._children.values() if each not in living]
                if fold.ended is None:
                    ended = [each for each in ended if not each.may_restart(time.monotonic())]
                # What ended after the ledger was read may have ended with the run.
                gone = [each for each in ended if each.gone]
                failed = [each for each in gone if each.process.exitcode]
                if fold.ended is None and self._is_fatal(gone, failed):
                    this_process.check()  # a signal to all of them ends the nodes, too
                    for child in failed or gone:
                        self._say(f"fedmq: {child.name}: {child.complaint()}")
                    return 2 if any(each.process.exitcode == 2 for each in failed) else 1
                self._tell_gone(ended)
                if fold.ended is not None and all(each.name == "broker" for each in living):
                    if fold.failed:
                        self._say(f"fedmq: the run failed: {plain(fold.ended, _LONGEST)}")
                    return 1 if fold.failed else 0
                wait([each.process.sentinel for each in living], _REFRESH_S)

    def _note(self, child: _Child, said: str) -> None:
        """Say what a node reports that goes on."""
        if said.startswith(NOTE):
            self._say(f"fedmq: {child.name}: {said.removeprefix(NOTE)}")

    def _restart(self) -> None:
        """Start again what was killed or has crashed."""
        now = time.monotonic()
        for child in list(self._children.values()):
            if child.may_restart(now):
                this_process.check()
                self._say(f"{child.name} {child.complaint()}; starting it again")
                child.restarts.append(now)
                try:
                    fresh = child.start()
                except NodeError as error:
                    self._say(f"fedmq: {error}")  # and tried again, not for ever
                    continue
                fresh.start, fresh.restarts = child.start, child.restarts

    def _tell_gone(self, ended: list[_Child]) -> None:
        """Say once which nodes have ended by themselves, and not with the run."""
        over = self._fold.ended is not None
        for child in ended:
            if not child.told and (child.process.exitcode if over else child.gone):
                child.told, so = True, "" if over else "; going on without it"
                self._say(f"fedmq: {child.name}: {child.complaint()}{so}")
            child.gone = True

    def _is_fatal(self, gone: list[_Child], failed: list[_Child]) -> bool:
        """Tell whether the run cannot go on; a worker that died is not fatal while others live."""
        names = {child.name for child in gone}
        works = any(name.startswith("worker") for name in self._children.keys() - names)
        misconfigured = any(child.process.exitcode == 2 for child in failed)
        return misconfigured or not works or not names.isdisjoint(("broker", "aggregator"))

    # ---- ending

    def _stop_all(self) -> None:
        """End the broker first, then the nodes, so that no goodbye is heard.

        A run that goes on would take a worker that has said goodbye for one that is gone, and
        close its round without what it was at; as it is, it goes on as after a power cut. What
        has not ended in time is killed; with the third signal, everything at once.
        """
        nodes = [child for name, child in self._children.items() if name != "broker"]
        for group in ([each for each in self._children.values() if each.name == "broker"], nodes):
            for child in group:
                child.process.terminate()
            deadline = time.monotonic() + _STOP_S
            while living := [each for each in group if each.process.exitcode is None]:
                if this_process.count >= ENOUGH or time.monotonic() > deadline:
                    break
                wait([each.process.sentinel for each in living], _REFRESH_S)
            if living:
                self._say(f"killing {', '.join(each.name for each in living)}")
            for child in living:
                child.process.kill()
            for child in living:
                child.process.join(_STOP_S)
                if child.process.exitcode is None:
                    self._say(f"fedmq: {child.name} does not end: process {child.process.pid}")
        if this_process.count:
            end_forkserver()

    def _close(self, code: int) -> int:
        """Write what the run has come to, and only then print it; return the exit code."""
        begun = (self._folder / "ledger").is_dir()
        if begun:
            self._fold.feed(self._follower.poll())
        stopped = code == INTERRUPTED and self._fold.ended is None
        if begun and (stopped or self._fold.now is not None):
            code = self._sum_up(code)
        if stopped:
            self._say(f"go on with: {self._go_on}")
        return code

    def _sum_up(self, code: int) -> int:
        summary = self._fold.summary()
        try:
            save_summary(self._folder, summary)
        except NodeError as error:
            self._say(f"fedmq: {error}")
            code = code or 1
        self._speaker.show(lambda: closing_table(summary))
        self._say(f"in {self._folder}")
        if code == 0 and summary["ended"] is None:
            raise NodeError("the ledger does not hold the end of the run")
        return code


def go_on_command(folder: Path, config: Path | None = None) -> str:
    """Return the command that takes up a run which was stopped."""
    given = [str(config)] if config is not None else []
    return shlex.join(["fedmq", "cluster", "--run", str(folder), *given])
