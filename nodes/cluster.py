"""The local cluster: broker, aggregator, workers and evaluator as processes of one host.

A process that is killed or crashes is started again: the ledger has what it needs to go on.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import structlog
from rich.console import Console

from fedmq.algorithms.allowed import Allowed
from fedmq.broker.errors import BrokerError
from fedmq.broker.process import give_torch_huge_pages, tune_process
from fedmq.broker.reading import Follower
from fedmq.broker.state import EVALUATOR, WORKER
from fedmq.nodes import logs
from fedmq.nodes.causes import explained
from fedmq.nodes.config import Config, parse
from fedmq.nodes.errors import NodeError, RunFailed
from fedmq.nodes.programs import Stopped, stop_on_signals
from fedmq.nodes.summary import RunFold, write_summary
from fedmq.nodes.trace.text import plain
from fedmq.nodes.view import View, closing_table

_START_S = 30.0
_STOP_S = 5.0
_REFRESH_S = 0.1
_LONGEST = 1000
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

    def may_restart(self, now: float) -> bool:
        """Tell whether it is worth starting again: killed or crashed, and not too often."""
        recent = [each for each in self.restarts if each > now - _RESTARTS_WITHIN_S]
        return self.process.exitcode not in (None, 0, 2) and len(recent) < _RESTARTS

    def complaint(self) -> str:
        """Return what it said before it ended, or how it ended."""
        with contextlib.suppress(EOFError, OSError):
            while self.report.poll():
                said = self.report.recv_bytes().decode()
                if not said.startswith("ready "):
                    return said
        return f"ended with exit code {self.process.exitcode}"


class Cluster:
    """Starts the processes, watches them, and ends every one of them.

    Args:
        config: checked and complete; the processes may run the code that it allows.
        clients: K, which are dealt to the workers in ranges.
        folder: of the run; it must exist.
        started_at: when the command was given, in seconds since 1970.
        console: for the view.
    """

    def __init__(
        self, config: Config, clients: int, folder: Path, started_at: float, console: Console
    ) -> None:
        self._config, self._clients, self._folder = config, clients, folder
        self._started_at, self._console = started_at, console
        self._children: dict[str, _Child] = {}

    def run(self) -> int:
        """Run to the end; return the exit code.

        0: the run reached its end. 1: it failed, or a process did. 2: it could not be started.
        130: interrupted.
        """
        text = self._config.to_toml()
        (self._folder / "config.toml").write_text(text)
        code = 1
        try:
            with stop_on_signals(signal.SIGINT, signal.SIGTERM):
                endpoint = self._start_broker(text)
                self._start_nodes(endpoint, text)
                code = self._watch()
        except Stopped as stopped:
            self._say(f"stopped by {stopped}")
            code = 130
        except NodeError as error:
            self._say(f"fedmq: {error}")
            code = 2
        finally:
            self._stop_all()
        self._close(code)
        return code

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    # ---- starting

    def _start_broker(self, text: str) -> str:
        # A fresh interpreter: the broker imports no torch.
        context = mp.get_context("spawn")
        child = self._start(context, "broker", broker_main, text, self._config.broker.bind)
        if child.report.poll(_START_S):
            word, _, rest = child.report.recv_bytes().decode().partition(" ")
            if word == "ready":
                # Started again, it listens where the nodes know it.
                child.start = lambda: self._start(context, "broker", broker_main, text, rest)
                return rest
            raise NodeError(f"{word} {rest}")
        raise NodeError(f"the broker did not start within {_START_S:g} s")

    def _start_nodes(self, endpoint: str, text: str) -> None:
        context = mp.get_context("forkserver")
        run = self._config.run.id
        # What the person's configuration names; over the wire might come another.
        own = self._config.allowed
        self._start(context, "aggregator", aggregator_main, endpoint, text, run, own)
        total = self._clients
        count = min(self._config.worker.count, total)
        for index in range(count):
            clients = (index * total // count, (index + 1) * total // count - 1)
            self._start(
                context, f"worker-{index}", worker_main, endpoint, clients, WORKER, run, own
            )
        self._start(context, "evaluator", worker_main, endpoint, None, EVALUATOR, run, own)

    def _start(self, context: Any, name: str, target: Callable[..., None], *args: Any) -> _Child:
        def start() -> _Child:
            return self._start(context, name, target, *args)

        ours, theirs = mp.Pipe(duplex=False)
        process = context.Process(
            target=child_main, name=name, args=(name, str(self._folder), theirs, target, args)
        )
        process.start()
        theirs.close()
        child = self._children[name] = _Child(name, start, process, ours)
        return child

    # ---- watching

    def _watch(self) -> int:
        """Follow the ledger until the run is over; return the exit code."""
        fold = RunFold(self._started_at)
        follower = Follower(self._folder / "ledger")
        config = self._config
        title = (
            f"fedmq {config.run.id}: {config.algorithm['name']}, {config.schedule['name']}, "
            f"{config.problem['name']}, {self._clients} clients on "
            f"{len(self._children) - 3} workers"
        )
        with View(self._console, title) as view:
            while True:
                fold.feed(follower.poll())
                view.show(fold)
                if fold.ended is None:
                    self._restart()
                living = [each for each in self._children.values() if each.process.exitcode is None]
                now = time.monotonic()
                ended = [
                    each
                    for each in self._children.values()
                    if each not in living and (fold.ended or not each.may_restart(now))
                ]
                failed = [each for each in ended if each.process.exitcode]
                if fold.ended is not None and all(each.name == "broker" for each in living):
                    if fold.failed:
                        self._say(f"fedmq: the run failed: {plain(fold.ended, _LONGEST)}")
                    return 1 if fold.failed else 0
                if fold.ended is None and self._is_fatal(ended, failed, living):
                    for child in failed:
                        self._say(f"fedmq: {child.name}: {child.complaint()}")
                    return 2 if any(each.process.exitcode == 2 for each in failed) else 1
                wait([each.process.sentinel for each in living], _REFRESH_S)

    def _restart(self) -> None:
        """Start again what was killed or has crashed."""
        now = time.monotonic()
        for child in list(self._children.values()):
            if child.may_restart(now):
                self._say(f"{child.name} {child.complaint()}; starting it again")
                fresh = child.start()
                fresh.start = child.start
                fresh.restarts = [*child.restarts, now]

    def _is_fatal(self, ended: list[_Child], failed: list[_Child], living: list[_Child]) -> bool:
        """Tell whether the run cannot go on; a worker that died is not fatal while others live."""
        essential = {"broker", "aggregator"}
        if any(child.name in essential for child in ended):
            # The aggregator may have ended a moment before its last entry was read here.
            return bool(failed) or "broker" in {child.name for child in ended}
        misconfigured = any(child.process.exitcode == 2 for child in failed)
        return misconfigured or not any(child.name.startswith("worker") for child in living)

    # ---- ending

    def _stop_all(self) -> None:
        """End the nodes first, then the broker, so that goodbyes are still heard."""
        nodes = [child for name, child in self._children.items() if name != "broker"]
        for group in (nodes, [each for each in self._children.values() if each.name == "broker"]):
            for child in group:
                child.process.terminate()
            deadline = time.monotonic() + _STOP_S
            for child in group:
                child.process.join(max(0.0, deadline - time.monotonic()))
                if child.process.exitcode is None:
                    child.process.kill()
                    child.process.join()

    def _close(self, code: int) -> None:
        if not (self._folder / "ledger").is_dir():
            return
        fold_is_empty = next(Follower(self._folder / "ledger").poll(), None) is None
        if fold_is_empty:
            return
        summary = write_summary(self._folder, self._started_at)
        self._console.print(closing_table(summary))
        self._say(f"in {self._folder}")
        if code == 0 and summary["ended"] is None:
            raise NodeError("the ledger does not hold the end of the run")


@contextlib.contextmanager
def preloading() -> Iterator[None]:
    """Meanwhile, import torch in the process that the nodes are forked from.

    After an error that process is ended at once, not when its import is done.
    """
    give_torch_huge_pages()
    mp.get_context("forkserver").set_forkserver_preload(["fedmq.nodes.preload"])
    forkserver.ensure_running()
    try:
        yield
    except BaseException:
        pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined] # noqa: SLF001 - there is no public way
        os.kill(pid, signal.SIGKILL)
        raise


# ---- in the children


def child_main(
    name: str, folder: str, report: Connection, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    """Run one node in a process of its own, which ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
    tune_process()
    path = Path(folder) / f"{name}.log"
    with path.open("a") as stray:
        os.dup2(stray.fileno(), 1)
        os.dup2(stray.fileno(), 2)
    logs.configure(path, node=name, pid=str(os.getpid()))
    log = structlog.get_logger()
    try:
        with stop_on_signals(signal.SIGTERM):
            threading.Thread(target=_end_with_parent, name="parent watch", daemon=True).start()
            target(Path(folder), report, *args)
    except Stopped as stopped:
        log.info("stopped", by=str(stopped))
    except Exception as error:
        known = expected_errors()
        if not isinstance(error, known):
            log.exception("crashed")
            report.send_bytes(f"crashed: {explained(error)}; see {path}".encode())
            sys.exit(1)
        log.warning("failed", reason=str(error), exc_info=error.__cause__)
        report.send_bytes(str(error).encode())
        sys.exit(2)


def broker_main(folder: Path, report: Connection, text: str, bind: str) -> None:
    """Run the broker of a local cluster."""
    from fedmq.broker.router import BrokerServer

    table = parse(text).broker
    server = BrokerServer(bind, folder / "ledger", table.settings(), table.keeping())
    report.send_bytes(f"ready {server.endpoint}".encode())
    server.serve()


def aggregator_main(
    folder: Path,
    report: Connection,  # noqa: ARG001
    endpoint: str,
    text: str,
    run: str,
    allowed: Allowed,
) -> None:
    """Run the aggregator of a local cluster."""
    from fedmq.nodes.aggregator_program import run_aggregator

    with contextlib.suppress(RunFailed):  # the ledger says so, and why
        run_aggregator(endpoint, parse(text), run, folder, allowed)


def worker_main(
    folder: Path,
    report: Connection,  # noqa: ARG001
    endpoint: str,
    clients: tuple[int, int] | None,
    role: str,
    run: str,
    allowed: Allowed,
) -> None:
    """Run a worker or the evaluator of a local cluster."""
    from fedmq.nodes.worker_program import run_worker

    name = mp.current_process().name
    ranges = [clients] if clients else []
    # What clients keep belongs to them, not to the worker that hosts them now.
    own, states = folder / "nodes" / name, folder / "clients"
    run_worker(endpoint, name, ranges, role, run, own, states, allowed)


def expected_errors() -> tuple[type[Exception], ...]:
    """Return the roots of all errors that are raised on purpose, and need no traceback."""
    from fedmq.algorithms.errors import AlgorithmError
    from fedmq.codecs.errors import CodecError

    return (NodeError, BrokerError, AlgorithmError, CodecError)


def _end_with_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_STOP_S)  # only a process that ignores SIGTERM comes past this line
        os._exit(1)
