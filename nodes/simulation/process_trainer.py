"""A trainer with several processes on this machine."""

from __future__ import annotations

import functools
import multiprocessing as mp
import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from fedmq.algorithms.allowed import Allowed
from fedmq.broker.process import tune_process
from fedmq.nodes.cluster.forking import preloading
from fedmq.nodes.errors import RunFailed
from fedmq.nodes.process.signals import STOP_SIGNALS
from fedmq.nodes.run.config import Config
from fedmq.nodes.simulation.trainers import QueuedTrainer
from fedmq.nodes.simulation.training_jobs import Parcel, Recipe, run_job

_AHEAD = 4
"""Tasks for each process that are submitted before their results are asked for."""
_CHECK_S = 5.0


class ProcessTrainer(QueuedTrainer):
    """Computes tasks in processes of this machine, in parallel.

    The processes are forked from a server that has already imported torch. They ignore Ctrl-C,
    and end with this process, however it ends. Several of them can share a GPU.

    Args:
        config: of the run.
        allowed: user code that it may name.
        processes: number of processes.

    Raises:
        NodeError: no folder can hold the sockets of the processes.
    """

    def __init__(self, config: Config, allowed: Allowed, processes: int) -> None:
        super().__init__(_AHEAD * processes)
        self._run = functools.partial(run_job, Recipe(config.to_toml(), allowed))
        self._processes, self._context = processes, _Context()
        with preloading():
            self._pool = ProcessPoolExecutor(processes, self._context, _begin)

    def close(self) -> None:
        """Give up all tasks and kill the processes."""
        for each in self._context.started:
            each.kill()
        self._pool.shutdown()

    def submit(self, job: Parcel) -> Future[Parcel]:
        """Give a job to the pool; see `QueuedTrainer.submit`."""
        try:
            return self._pool.submit(self._run, job)
        except BrokenProcessPool:
            raise self._died() from None

    def answer(self, future: Future[Parcel]) -> Parcel:
        """Wait for an answer; see `QueuedTrainer.answer`."""
        while True:
            try:
                return future.result(_CHECK_S)
            except BrokenProcessPool:
                raise self._died() from None
            except TimeoutError:
                # If a process dies while it writes an answer, the pool waits for the rest of it.
                if connection.wait([each.sentinel for each in self._context.started], 0):
                    raise self._died() from None

    def _died(self) -> RunFailed:
        codes = [each.exitcode or 0 for each in self._context.started]
        # The pool terminates the other processes.
        code = next((each for each in codes if each not in (0, -signal.SIGTERM)), 0)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        hint = "; if memory ran out, use fewer processes" if code == -signal.SIGKILL else ""
        tasks = " or ".join(self.unfinished()[: self._processes])
        return RunFailed(f"a training process {how}; it worked on a task of {tasks}{hint}")


class _Context(ForkServerContext):
    """Creates processes and keeps them in a list."""

    def __init__(self) -> None:
        self.started: list[ForkServerProcess] = []

    def Process(self, *args: Any, **options: Any) -> ForkServerProcess:  # type: ignore[override] # noqa: N802 - the name of multiprocessing's attribute
        """Create a process."""
        process = ForkServerProcess(*args, **options)
        self.started.append(process)
        return process


def _begin() -> None:
    """Prepare a process of the pool."""
    # Ctrl-C signals every process of a terminal; the parent ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_with_parent, name="parent watch", daemon=True).start()
    tune_process()


def _end_with_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
