"""The processes of a local cluster: each runs one node and ends with its supervisor."""

from __future__ import annotations

import contextlib
import enum
import faulthandler
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import structlog

from fedmq.algorithms.allowed import Allowed
from fedmq.broker.errors import BrokerFailed
from fedmq.broker.file_modes import open_private
from fedmq.broker.process import tune_process
from fedmq.broker.settings import Continuation
from fedmq.nodes.cluster.listening import Listening
from fedmq.nodes.errors import ON_PURPOSE, RunFailed
from fedmq.nodes.process import logs, streams
from fedmq.nodes.process.exception_text import explained, reason_of
from fedmq.nodes.process.signals import Stopped, this_process
from fedmq.nodes.run.config import parse

_STOP_S = 5.0

BEYOND_HELP = 3
"""Exit code of a process that failed and would fail again."""


class ReportKind(enum.Enum):
    """What a process reports to its supervisor."""

    READY = "ready"
    """The broker listens; the text has its tcp endpoints, one a line."""
    NOTE = "note"
    """The process continues; the text is a sentence for people."""
    ENDING = "ending"
    """The process ends; the text is the reason."""


class ChildReport(msgspec.Struct):
    """One message from a process to its supervisor."""

    kind: ReportKind
    text: str


def receive_report(pipe: Connection) -> ChildReport:
    """Return the next report of a process.

    Raises:
        EOFError: the process has closed its end.
        OSError: the pipe cannot be read.
    """
    return msgspec.json.decode(pipe.recv_bytes(), type=ChildReport)


def child_main(
    name: str, folder: str, pipe: Connection, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    """Run one node in this process until the node or the supervisor ends.

    Args:
        name: of the node.
        folder: of the run.
        pipe: to the supervisor, for reports.
        target: runs the node; called with the folder, the pipe and ``args``.
        args: other arguments of ``target``.
    """
    path = Path(folder) / f"{name}.log"
    _log_to(path, name, pipe)
    tune_process()
    log = structlog.get_logger()
    try:
        this_process.install(watchdog=False)
        this_process.supervised = True
        threading.Thread(target=_end_with_parent, name="parent watch", daemon=True).start()
        target(Path(folder), pipe, *args)
    except Stopped as stopped:
        log.info("stopped", by=str(stopped))
    except Exception as error:  # the supervisor gets the reason, whatever it is
        if this_process.count:
            # A signal may interrupt a library anywhere: it may raise any error.
            log.info("stopped", by=this_process.name, error=explained(error))
            return
        if not isinstance(error, ON_PURPOSE):
            log.exception("crashed")
            _report(pipe, ReportKind.ENDING, f"crashed: {explained(error)}; see {path}")
            sys.exit(1)
        log.warning("failed", reason=str(error), exc_info=error.__cause__)
        _report(pipe, ReportKind.ENDING, str(error))
        sys.exit(BEYOND_HELP if isinstance(error, BrokerFailed) else 2)
    finally:
        logs.report_suppressed()
        this_process.finish()


def _log_to(path: Path, name: str, pipe: Connection) -> None:
    """Write the log and both standard streams of this process to a file.

    If the file cannot be opened or written, the node continues and reports that once.
    """
    reported = False

    def lost(what: str) -> None:
        nonlocal reported
        if not reported:
            reported = True
            _report(pipe, ReportKind.NOTE, f"{what}; going on without it")

    try:
        with open_private(path, "ab") as file:
            logs.configure(path, lost, node=name, pid=str(os.getpid()))
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            # After a crash in C, the log has files and lines, but no values.
            faulthandler.enable(2, all_threads=False)
    except OSError as error:
        logs.configure(None, node=name, pid=str(os.getpid()))
        lost(f"cannot write {path}: {reason_of(error)}")
    streams.set_up()
    streams.go_on_without_output(lost)


def _report(pipe: Connection, kind: ReportKind, text: str) -> None:
    printable = text.encode(errors="backslashreplace").decode()  # it may name any file
    with contextlib.suppress(OSError):  # the supervisor may have ended
        pipe.send_bytes(msgspec.json.encode(ChildReport(kind, printable)))


def broker_main(
    folder: Path,
    pipe: Connection,
    text: str,
    listening: Listening,
    continuation: Continuation | None = None,
) -> None:
    """Run the broker of a local cluster."""
    from fedmq.broker.router import BrokerServer

    config = parse(text)
    table = config.broker
    settings = replace(table.settings(), only_run=config.run.id)
    server = BrokerServer(
        *(listening.endpoints, folder / "ledger", settings, table.ledger_settings()),
        continuation,
        keys=listening.keys(),
        insecure=listening.insecure,
    )
    server.on_space = _space_reporter(pipe, folder / "ledger")
    tcp = [each for each in server.endpoints if each.startswith("tcp://")]
    _report(pipe, ReportKind.READY, "\n".join(tcp))
    with this_process.noting(server.stop):
        server.serve()


def _space_reporter(pipe: Connection, ledger: Path) -> Callable[[str], None]:
    """Return a function that reports once that the disk is full, and once that it has space.

    Its argument is why the disk takes nothing; empty if it has space.
    """
    full = False

    def on_space(reason: str) -> None:
        nonlocal full
        if reason and not full:
            text = f"{reason}; the run waits for disk space in {ledger}"
            _report(pipe, ReportKind.NOTE, text)
        elif full and not reason:
            _report(pipe, ReportKind.NOTE, "disk space is available again; the run continues")
        full = bool(reason)

    return on_space


def aggregator_main(
    folder: Path,
    pipe: Connection,  # noqa: ARG001 - `child_main` passes it to every node
    endpoint: str,
    text: str,
    run: str,
    allowed: Allowed,
) -> None:
    """Run the aggregator of a local cluster."""
    from fedmq.nodes.aggregator.program import run_aggregator

    with contextlib.suppress(RunFailed):  # the supervisor reads it, with the reason, in the ledger
        run_aggregator(endpoint, parse(text), run, folder, allowed)


def worker_main(
    folder: Path,
    pipe: Connection,  # noqa: ARG001 - `child_main` passes it to every node
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
    # A client's local state moves with the client to another worker.
    node_folder, client_states = folder / "nodes" / name, folder / "clients"
    run_worker(endpoint, name, ranges, role, run, node_folder, client_states, allowed)


def _end_with_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_STOP_S)  # a process that handles SIGTERM ends during this
        os._exit(1)
