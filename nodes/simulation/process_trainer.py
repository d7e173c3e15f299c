"""A trainer with several processes on this machine.

Each process has a pipe of its own, so that its death is noticed whatever it was doing. (The pool of
`concurrent.futures` waits for ever if a process dies while it writes a result.)
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing as mp
import os
import queue
import signal
import threading
from concurrent.futures import Future
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from fedmq.algorithms.allowed import Allowed
from fedmq.broker.process import tune_process
from fedmq.nodes.cluster.forking import preloading
from fedmq.nodes.errors import NodeError, RunFailed
from fedmq.nodes.process.signals import STOP_SIGNALS, blocked
from fedmq.nodes.run.config import Config
from fedmq.nodes.simulation.trainers import QueuedTrainer
from fedmq.nodes.simulation.training_jobs import Parcel, Recipe, run_job

_AHEAD = 4
"""Tasks for each process that are submitted before their results are asked for."""


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

    Attributes:
        processes: those that have been started; all are with the first job.
    """

    def __init__(self, config: Config, allowed: Allowed, processes: int) -> None:
        super().__init__(_AHEAD * processes)
        self.processes: list[BaseProcess] = []
        self._recipe = Recipe(config.to_toml(), allowed)
        self._wanted = processes
        self._threads: list[threading.Thread] = []
        self._jobs: queue.SimpleQueue[tuple[Parcel, str, Future[Parcel]] | None]
        self._jobs = queue.SimpleQueue()
        self._died: RunFailed | None = None
        with preloading():
            # Processes that nobody has ended would keep the interpreter from ending.
            atexit.register(self.close)

    def close(self) -> None:
        """Give up all tasks and kill the processes."""
        atexit.unregister(self.close)
        self._died = self._died or RunFailed("the training processes have been ended")
        for each in self.processes:
            each.kill()
        self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def submit(self, job: Parcel, who: str) -> Future[Parcel]:
        """Give a job to the processes; see `QueuedTrainer.submit`.

        Raises:
            NodeError: a process cannot be started.
        """
        answer: Future[Parcel] = Future()
        if self._died is not None:
            answer.set_exception(self._died)
            return answer
        while len(self.processes) < self._wanted:
            self._start()
        self._jobs.put((job, who, answer))
        self._fail_jobs()  # if a process has died meanwhile
        return answer

    def _start(self) -> None:
        """Start a process."""
        context = mp.get_context("forkserver")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,))
        try:
            with blocked():
                process.start()
        except (EOFError, OSError) as error:
            # The fork server was killed, or there is no memory.
            raise NodeError(f"cannot start a training process: {error!r}") from None
        finally:
            theirs.close()
        self.give_jobs_to(process, ours)

    def give_jobs_to(self, process: BaseProcess, pipe: Connection) -> None:
        """Start a thread that gives jobs to a process at the other end of a pipe."""
        thread = threading.Thread(target=self._give_jobs, args=(process, pipe), daemon=True)
        self.processes.append(process)
        self._threads.append(thread)
        thread.start()

    def _give_jobs(self, process: BaseProcess, pipe: Connection) -> None:
        """Give a process one job after the other, until it ends."""
        with pipe:
            while (item := self._jobs.get()) is not None:
                job, who, answer = item
                try:
                    pipe.send((self._recipe, job))
                    # A process that the user's code has forked may keep the pipe open.
                    if pipe not in connection.wait([pipe, process.sentinel]):
                        raise EOFError
                    found = pipe.recv()
                except (EOFError, OSError):
                    process.join()
                    self._died = self._died or _died(process.exitcode or 0, who)
                    answer.set_exception(self._died)
                    self._fail_jobs()
                    return
                answer.set_result(found)
                # Only the caller needs them now; this thread may wait long for the next job.
                del item, job, answer, found
        self._jobs.put(None)  # for the next thread
        process.join()

    def _fail_jobs(self) -> None:
        """If a process has died, fail the jobs that no process has begun."""
        if self._died is None:
            return
        with contextlib.suppress(queue.Empty):
            while (item := self._jobs.get_nowait()) is not None:
                item[2].set_exception(self._died)
            self._jobs.put(None)


def _died(code: int, who: str) -> RunFailed:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    hint = "; if memory ran out, use fewer processes" if code == -signal.SIGKILL else ""
    return RunFailed(f"a training process {how} during a task of {who}{hint}")


def _serve(pipe: Connection) -> None:
    """Compute jobs until the parent ends."""
    # Ctrl-C signals every process of a terminal; the parent ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_with_parent, name="parent watch", daemon=True).start()
    tune_process()
    with contextlib.suppress(EOFError, OSError):
        while True:
            recipe, job = pipe.recv()
            pipe.send(run_job(recipe, job))


def _end_with_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
