"""What runs in the processes of a local cluster: one node each, which ends with its supervisor."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import structlog

from fedmq.algorithms.allowed import Allowed
from fedmq.broker.core.state import Continuation
from fedmq.broker.errors import BrokerFailed
from fedmq.broker.process import tune_process
from fedmq.nodes.errors import ON_PURPOSE, RunFailed
from fedmq.nodes.process import logs, streams
from fedmq.nodes.process.exception_text import explained, reason_of
from fedmq.nodes.process.signals import Stopped, this_process
from fedmq.nodes.run.config import parse

READY = "ready "
"""Begins what a broker reports once it listens: its endpoint follows."""
NOTE = "note "
"""Begins what a node reports that goes on. All else says why it ends."""
_STOP_S = 5.0

BEYOND_HELP = 3
"""Exit code of a process that failed, and that would fail again."""


def child_main(
    name: str, folder: str, report: Connection, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    """Run one node in a process of its own, which ends with its supervisor.

    Before it ends, and when it loses its log, it reports in words; see `READY` and `NOTE`.
    """
    path = Path(folder) / f"{name}.log"
    _log_to(path, name, report)
    tune_process()
    log = structlog.get_logger()
    try:
        this_process.install(watchdog=False)
        this_process.supervised = True
        threading.Thread(target=_end_with_parent, name="parent watch", daemon=True).start()
        target(Path(folder), report, *args)
    except Stopped as stopped:
        log.info("stopped", by=str(stopped))
    except Exception as error:  # whatever ends a node is reported to its supervisor
        if this_process.count:
            # Code that is cut in two by a signal raises what it likes.
            log.info("stopped", by=this_process.name, error=explained(error))
            return
        if not isinstance(error, ON_PURPOSE):
            log.exception("crashed")
            _report(report, f"crashed: {explained(error)}; see {path}")
            sys.exit(1)
        log.warning("failed", reason=str(error), exc_info=error.__cause__)
        _report(report, str(error))
        sys.exit(BEYOND_HELP if isinstance(error, BrokerFailed) else 2)
    finally:
        this_process.finish()


def _log_to(path: Path, name: str, report: Connection) -> None:
    """Send this node's log, and whatever else is printed, to its file.

    Without one, or once it takes nothing more, the node goes on; its supervisor says so.
    """
    told = False

    def lost(what: str) -> None:
        nonlocal told
        if not told:
            told = True
            _report(report, f"{NOTE}{what}; going on without it")

    try:
        with path.open("a") as stray:
            logs.configure(path, lost, node=name, pid=str(os.getpid()))
            os.dup2(stray.fileno(), 1)
            os.dup2(stray.fileno(), 2)
            # A library that crashes leaves files and lines, without values.
            faulthandler.enable(2, all_threads=False)
    except OSError as error:
        logs.configure(None, node=name, pid=str(os.getpid()))
        lost(f"cannot write {path}: {reason_of(error)}")
    streams.set_up()
    streams.go_on_without_output(lost)


def _report(report: Connection, text: str) -> None:
    with contextlib.suppress(OSError):  # the supervisor may have gone
        report.send_bytes(text.encode(errors="backslashreplace"))


def broker_main(
    folder: Path,
    report: Connection,
    text: str,
    bind: str,
    continuation: Continuation | None = None,
) -> None:
    """Run the broker of a local cluster."""
    from fedmq.broker.router import BrokerServer

    table = parse(text).broker
    server = BrokerServer(
        bind, folder / "ledger", table.settings(), table.ledger_settings(), continuation
    )
    server.on_space = _space_reporter(report, folder / "ledger")
    _report(report, f"{READY}{server.endpoint}")
    with this_process.noting(server.stop):
        server.serve()


def _space_reporter(report: Connection, ledger: Path) -> Callable[[str], None]:
    """Return what reports once that a disk is full, and once that there is room again."""
    full = False

    def on_space(reason: str) -> None:
        nonlocal full
        if reason and not full:
            _report(report, f"{NOTE}{reason}; the run waits for room in {ledger}")
        elif full and not reason:
            _report(report, f"{NOTE}there is room again; the run goes on")
        full = bool(reason)

    return on_space


def aggregator_main(
    folder: Path,
    report: Connection,  # noqa: ARG001
    endpoint: str,
    text: str,
    run: str,
    allowed: Allowed,
) -> None:
    """Run the aggregator of a local cluster."""
    from fedmq.nodes.aggregator.program import run_aggregator

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
    from fedmq.nodes.worker.program import run_worker

    name = mp.current_process().name
    ranges = [clients] if clients else []
    # What clients keep belongs to them, not to the worker that hosts them now.
    own, states = folder / "nodes" / name, folder / "clients"
    run_worker(endpoint, name, ranges, role, run, own, states, allowed)


def _end_with_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_STOP_S)  # only a process that ignores SIGTERM comes past this line
        os._exit(1)
