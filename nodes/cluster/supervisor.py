"""The local cluster: broker, aggregator, workers and evaluator as processes of one host.

A process that was killed or crashed is restarted; it recovers from the ledger.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing as mp
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.console import Console

from fedmq.broker.ledger.reader import LedgerTail
from fedmq.broker.settings import Continuation
from fedmq.broker.wire.addresses import EVALUATOR, WORKER
from fedmq.nodes.cluster.children import (
    BEYOND_HELP,
    ChildReport,
    ReportKind,
    aggregator_main,
    broker_main,
    child_main,
    receive_report,
    worker_main,
)
from fedmq.nodes.cluster.console import SupervisorConsole
from fedmq.nodes.cluster.forking import end_forkserver, kill_forkserver
from fedmq.nodes.cluster.listening import Listening, remove_socket
from fedmq.nodes.cluster.view import LiveView, closing_table
from fedmq.nodes.errors import ConfigError, NodeError
from fedmq.nodes.history.run import RunHistory
from fedmq.nodes.process.signals import ENOUGH, INTERRUPTED, Stopped, blocked, this_process
from fedmq.nodes.process.terminal import plain
from fedmq.nodes.run.config import Config
from fedmq.nodes.run.toml import STDIN
from fedmq.nodes.run_folder.folder import SUPERVISOR_LOG, write_config
from fedmq.nodes.run_folder.summary import summary_of
from fedmq.nodes.run_folder.summary_file import remove_summary, save_summary

_START_S = 30.0
_STOP_S = 5.0
_REFRESH_S = 0.1
_LONGEST = 1000
"""Characters of a reason, at most."""
_RESTARTS = 10
_RESTARTS_WITHIN_S = 60.0
"""Restarts of a process within this many seconds, at most; then it counts as failed."""


@dataclass
class _Child:
    """A process of the cluster and the pipe of its reports."""

    name: str
    start: Callable[[], _Child]
    process: Any
    pipe: Connection
    restarts: list[float] = field(default_factory=list)
    """Times of its restarts, newest last."""
    ending: str = ""
    """The reason that it reported before it ended."""
    gone: bool = False
    """Whether it has ended and will not be restarted."""
    announced: bool = False
    """Whether the user knows that."""

    def may_restart(self, now: float) -> bool:
        """Return whether to restart it: it was killed or crashed, and not too often."""
        recent = [each for each in self.restarts if each > now - _RESTARTS_WITHIN_S]
        return self.process.exitcode not in (None, 0, 2, BEYOND_HELP) and len(recent) < _RESTARTS

    def reports(self) -> Iterator[ChildReport]:
        """Yield the reports that have arrived; keep the reason for which the process ends."""
        with contextlib.suppress(EOFError, OSError):
            while self.pipe.poll():
                report = receive_report(self.pipe)
                if report.kind is ReportKind.ENDING:
                    self.ending = report.text
                else:
                    yield report

    def why_ended(self) -> str:
        """Return the reason that it reported before it ended, or else its signal or exit code."""
        list(self.reports())
        code = self.process.exitcode
        if code is not None and -code in signal.valid_signals():
            return self.ending or f"was killed by {signal.Signals(-code).name}"
        return self.ending or f"ended with exit code {code}"


def worker_names(config: Config, clients: int) -> list[str]:
    """Return the names of a cluster's workers; each of them hosts a client.

    Raises:
        ConfigError: ``worker.nodes`` has settings for another worker.
    """
    names = [f"worker-{index}" for index in range(min(config.worker.count, clients))]
    for name in config.worker.nodes:
        if name not in names:
            some = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            raise ConfigError(f"worker.nodes: expected {some}, got {name!r}")
    return names


class Cluster:
    """Starts the processes, watches and restarts them, and ends all of them.

    Args:
        config: checked and complete; the processes may run the code that it allows.
        clients: K, the number of clients; each worker hosts a range of them.
        folder: of the run; it must exist.
        started_at: start of the run, in seconds since 1970; None if unknown.
        console: for the live view.
        continuation: of a run in the folder that is resumed.
        listening: where the broker listens for other hosts; by default nowhere.
        resume_with: the command that resumes this run if it is stopped; by default the one
            that needs only the folder.
    """

    def __init__(
        self,
        config: Config,
        clients: int,
        folder: Path,
        started_at: float | None,
        console: Console,
        continuation: Continuation | None = None,
        resume_with: str = "",
        listening: Listening | None = None,
    ) -> None:
        self._continuation = continuation
        self._config, self._clients, self._folder = config, clients, folder
        self._started_at = started_at
        self._console = console
        self._listening = listening or Listening()
        self._resume_with = resume_with or resume_command(folder)
        self._children: dict[str, _Child] = {}
        self._history = RunHistory(started_at)
        self._ledger = LedgerTail(folder / "ledger")
        self._output = SupervisorConsole(console, folder / SUPERVISOR_LOG)
        self._say = self._output.say

    def run(self) -> int:
        """Run to the end; return the exit code.

        0: the run reached its end. 1: the run or a process failed, or the summary cannot be
        written. 2: the run could not be started. 130: interrupted.

        Raises:
            LedgerError: the ledger is damaged.
            NodeError: the run has ended, but the ledger does not contain its end.
        """
        text = self._config.to_toml()
        begun = time.time() if self._started_at is None else self._started_at
        code = 1
        # From here on a signal interrupts nothing; every process that was started is ended.
        with this_process.taken(), this_process.noting():
            try:
                write_config(self._folder, self._config, begun)
                remove_summary(self._folder)
                endpoint = self._start_broker(text)
                self._start_nodes(endpoint, text)
                code = self._watch()
            except Stopped as stopped:
                this_process.announced = True
                self._say(f"stopped by {stopped}; ending all processes")
                code = INTERRUPTED
            except NodeError as error:
                self._say(f"fedmq: {error}")
                code = 2
            finally:
                self._stop_all()
            return self._close(code)

    # ---- starting

    def _start_broker(self, text: str) -> str:
        # A new interpreter, so that the broker does not import torch.
        context = mp.get_context("spawn")
        listening, reason = self._listening.chosen(self._folder)
        if reason:
            self._say(f"using loopback, which other users of this host can reach: {reason}")
        child = self._start(context, "broker", broker_main, text, listening, self._continuation)
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            this_process.check()
            for report in child.reports():
                if report.kind is ReportKind.READY:
                    # After a restart it listens at the address that the nodes know.
                    listening = listening.bound(report.text.splitlines())
                    child.start = functools.partial(
                        self._start, context, "broker", broker_main, text, listening
                    )
                    for line in listening.lines():
                        self._say(line)
                    return listening.endpoint
                self._print_note(child, report)
            if child.process.exitcode is not None:
                raise NodeError(child.ending or f"the broker {child.why_ended()}")
            wait([child.pipe, child.process.sentinel], _REFRESH_S)
        raise NodeError(f"the broker did not start within {_START_S:g} s")

    def _start_nodes(self, endpoint: str, text: str) -> None:
        context = mp.get_context("forkserver")
        # Only the code that the user's own configuration names, not one from the wire.
        run, allowed = self._config.run.id, self._config.allowed
        # The first fork waits until the fork server has imported torch; a signal kills the
        # server, which ends the wait.
        with this_process.noting(kill_forkserver):
            self._start(context, "aggregator", aggregator_main, endpoint, text, run, allowed)
        total = self._clients
        names = worker_names(self._config, total)
        for index, name in enumerate(names):
            clients = (index * total // len(names), (index + 1) * total // len(names) - 1)
            self._start(context, name, worker_main, endpoint, clients, WORKER, run, allowed)
        self._start(context, "evaluator", worker_main, endpoint, None, EVALUATOR, run, allowed)

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
            # The fork server was killed, or there is no memory.
            raise NodeError(f"cannot start {name}: {error!r}") from None
        finally:
            theirs.close()
        child = self._children[name] = _Child(name, start, process, ours)
        return child

    # ---- watching

    def _watch(self) -> int:
        """Follow the ledger until the run is over; return the exit code."""
        history, config = self._history, self._config
        title = (
            f"fedmq {config.run.id}: {config.algorithm['name']}, {config.schedule['name']}, "
            f"{config.problem['name']}, {self._clients} clients on "
            f"{len(self._children) - 3} workers"
        )
        with LiveView(self._console, title, self._say) as view:
            while True:
                this_process.check()
                self._catch_up()
                view.show(history)
                for child in self._children.values():
                    for report in child.reports():
                        self._print_note(child, report)
                if history.ended is None:
                    self._restart()
                living = [each for each in self._children.values() if each.process.exitcode is None]
                ended = [each for each in self._children.values() if each not in living]
                if history.ended is None:
                    ended = [each for each in ended if not each.may_restart(time.monotonic())]
                # A process that ended after the ledger was read may have ended with the run.
                gone = [each for each in ended if each.gone]
                failed = [each for each in gone if each.process.exitcode]
                if history.ended is None and self._is_fatal(gone, failed):
                    this_process.check()  # a signal to the process group ends the nodes, too
                    for child in failed or gone:
                        self._say(f"fedmq: {child.name}: {child.why_ended()}")
                    return 2 if any(each.process.exitcode == 2 for each in failed) else 1
                self._announce_gone(ended)
                if history.ended is not None and all(each.name == "broker" for each in living):
                    if history.failed:
                        self._say(f"fedmq: the run failed: {plain(history.ended, _LONGEST)}")
                    return 1 if history.failed else 0
                wait([each.process.sentinel for each in living], _REFRESH_S)

    def _catch_up(self) -> None:
        for entry in self._ledger.poll():
            self._history.feed(entry)

    def _print_note(self, child: _Child, report: ChildReport) -> None:
        if report.kind is ReportKind.NOTE:
            self._say(f"fedmq: {child.name}: {report.text}")

    def _restart(self) -> None:
        """Restart the processes that were killed or crashed."""
        now = time.monotonic()
        for child in list(self._children.values()):
            if child.may_restart(now):
                this_process.check()
                self._say(f"{child.name} {child.why_ended()}; restarting it")
                child.restarts.append(now)
                try:
                    fresh = child.start()
                except NodeError as error:
                    self._say(f"fedmq: {error}")  # the next turn tries again
                    continue
                fresh.start, fresh.restarts = child.start, child.restarts

    def _announce_gone(self, ended: list[_Child]) -> None:
        """Print once which nodes have ended for good before the run did."""
        over = self._history.ended is not None
        for child in ended:
            if not child.announced and (child.process.exitcode if over else child.gone):
                child.announced, effect = True, "" if over else "; going on without it"
                self._say(f"fedmq: {child.name}: {child.why_ended()}{effect}")
            child.gone = True

    def _is_fatal(self, gone: list[_Child], failed: list[_Child]) -> bool:
        """Return whether the run cannot continue: it needs broker, aggregator and a worker."""
        names = {child.name for child in gone}
        works = any(name.startswith("worker") for name in self._children.keys() - names)
        misconfigured = any(child.process.exitcode == 2 for child in failed)
        return misconfigured or not works or not names.isdisjoint(("broker", "aggregator"))

    # ---- ending

    def _stop_all(self) -> None:
        """End the broker first, then the nodes, so that no goodbye reaches the ledger.

        After a goodbye, the resumed run would close a round without that worker's tasks; without
        one it resumes as after a power failure. A process that does not end in time is killed;
        the third signal kills all at once.
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
                    self._say(f"fedmq: cannot end {child.name}, process {child.process.pid}")
        remove_socket(self._folder)
        if this_process.count:
            end_forkserver()

    def _close(self, code: int) -> int:
        """Write the summary, then print it; return the exit code."""
        begun = (self._folder / "ledger").is_dir()
        if begun:
            self._catch_up()
        stopped = code == INTERRUPTED and self._history.ended is None
        if begun and (stopped or self._history.now is not None):
            code = self._write_summary(code)
        if stopped:
            self._say(f"resume with: {self._resume_with}")
        return code

    def _write_summary(self, code: int) -> int:
        summary = summary_of(self._history)
        try:
            save_summary(self._folder, summary)
        except NodeError as error:
            self._say(f"fedmq: {error}")
            code = code or 1
        self._output.show(lambda: closing_table(summary))
        self._say(f"in {self._folder}")
        if code == 0 and summary["ended"] is None:
            raise NodeError("expected the end of the run in the ledger, it is missing")
        return code


def resume_command(folder: Path, config: Path | None = None, options: Sequence[str] = ()) -> str:
    """Return the command that resumes a stopped run."""
    given = [str(config)] if config not in (None, STDIN) else []
    return shlex.join(["fedmq", "cluster", "--run", str(folder), *options, *given])
