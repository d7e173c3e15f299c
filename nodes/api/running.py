"""Start a run from Python, and wait for its end: the command in a child process."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from fedmq.broker.errors import BrokerError
from fedmq.nodes.api.child_command import ChildCommand
from fedmq.nodes.api.given import Given, GivenConfig, usable_path
from fedmq.nodes.api.run import Run
from fedmq.nodes.cluster.continuing import RUNS, draw_id
from fedmq.nodes.errors import ConfigError, NodeError, RunFailed
from fedmq.nodes.process.signals import INTERRUPTED

Command = Literal["cluster", "simulate"]
"""Command of ``fedmq`` that makes a run."""
_BAD_INPUT = 2
"""Exit code of a command whose input is invalid."""


def run(
    config: GivenConfig = None,
    workers: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Run:
    """Train on this host, as ``fedmq cluster`` does, and return the run when it has ended.

    The processes of the run are children of this one; they can import what this one can. A
    KeyboardInterrupt ends them, and is raised again when the folder is complete. With the folder
    of a run, the run is resumed; if it has already reached its end, nothing is started.

    Args:
        config: tables as in TOML, the path of a TOML file, a `Config`, or None for the defaults.
        workers: number of worker processes; by default that of the configuration.
        folder: of the run; by default ``runs/ID`` in the current folder.
        settings: replaces keys of the configuration, such as ``{"algorithm.lr": 0.1}``.
        progress: whether to print the command's output; by default, in a notebook and if standard
            error is a terminal.

    Raises:
        ConfigError: the configuration is invalid; or the folder has another run or is in use.
        RunFailed: the run failed; the error has its reason, and the run.
    """
    options = [] if workers is None else ["--workers", str(workers)]
    given = Given.of(config, settings)
    return execute("cluster", given, folder, options, printer(progress=progress))


def simulate(
    config: GivenConfig = None,
    clients: int | None = None,
    processes: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    *,
    on: Literal["ray"] | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Run:
    """Train in virtual time, as ``fedmq simulate`` does, and return the run when it has ended.

    Args:
        config: tables as in TOML, the path of a TOML file, a `Config`, or None for the defaults.
        clients: number of clients; by default that of the configuration.
        processes: number of processes that train; by default one for each CPU core.
        folder: of the run; by default ``runs/ID`` in the current folder.
        on: ``"ray"`` trains on a Ray cluster.
        settings: replaces keys of the configuration, such as ``{"algorithm.lr": 0.1}``.
        progress: whether to print the command's output; by default, in a notebook and if standard
            error is a terminal.

    Raises:
        ConfigError: the configuration is invalid; or the folder has another run or is in use.
        RunFailed: the run failed; the error has its reason, and the run.
    """
    options = [] if clients is None else ["--clients", str(clients)]
    options += [] if processes is None else ["--processes", str(processes)]
    options += [] if on is None else ["--on", on]
    given = Given.of(config, settings)
    return execute("simulate", given, folder, options, printer(progress=progress))


def execute(
    command: Command,
    given: Given,
    folder: str | os.PathLike[str] | None,
    options: Sequence[str],
    on_line: Callable[[str], None],
    started: Callable[[ChildCommand], None] = lambda _: None,
) -> Run:
    """Run a command to its end.

    Args:
        command: which command.
        given: configuration of the run.
        folder: of the run; None for a new one.
        options: other options of the command.
        on_line: gets each line that the command prints.
        started: gets the running command, which another thread may interrupt.

    Raises:
        ConfigError, RunFailed: as `run`.
        KeyboardInterrupt: it was interrupted from here, and has ended.
    """
    if folder is None:
        name = given.checked.run.id or draw_id()
        given, folder = Given.of(given.tables, {"run.id": name}), RUNS / name
    path = usable_path(folder, "a folder for the run")
    child = ChildCommand([command, "-", "--run", str(path), *options], given.to_toml(), on_line)
    started(child)
    code = child.wait()
    if code == 0:
        return Run(path)
    if code == _BAD_INPUT:
        raise ConfigError(child.reason)
    made = _readable(path)
    raise RunFailed(_why(child, code, made), made)


def _readable(folder: Path) -> Run | None:
    """Return the run in a folder; None if it had not begun, or its files are damaged."""
    with contextlib.suppress(NodeError, BrokerError):
        run = Run(folder)
        return run if run.status else None
    return None


def _why(child: ChildCommand, code: int, made: Run | None) -> str:
    """Return the reason why a command failed."""
    if made is not None and made.summary["status"] == "failed":
        return str(made.summary["ended"])
    if code == INTERRUPTED:
        return "a signal stopped it"
    if code < 0:
        return f"signal {-code} killed it; the end of its output: {child.reason}"
    return child.reason


def printer(*, progress: bool | None) -> Callable[[str], None]:
    """Return a function that prints a line of progress, or does nothing.

    Args:
        progress: whether to print; None decides by where the output goes.
    """
    notebook = _in_notebook()
    if progress is None:
        progress = notebook or sys.stderr.isatty()
    if not progress:
        return lambda _: None
    # A notebook shows standard error on red ground.
    stream: TextIO = sys.stdout if notebook else sys.stderr

    def show(line: str) -> None:
        text = line.encode(stream.encoding or "utf-8", "backslashreplace")
        print(text.decode(stream.encoding or "utf-8"), file=stream, flush=True)

    return show


def _in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    interactive = sys.modules.get("IPython")
    shell = interactive.get_ipython() if interactive is not None else None
    return getattr(shell, "kernel", None) is not None
