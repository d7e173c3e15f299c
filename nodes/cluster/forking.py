"""The server process that forks the nodes of a local cluster; it has already imported torch."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import signal
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker

from fedmq.broker.process import give_torch_huge_pages
from fedmq.nodes.cluster.environment import place_sockets
from fedmq.nodes.process.signals import blocked, this_process


def kill_forkserver() -> None:
    """Kill the fork server if it runs; the nodes continue."""
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined] # noqa: SLF001 - there is no public way
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def end_forkserver() -> None:
    """Kill the fork server and wait for its end."""
    kill_forkserver()
    with contextlib.suppress(OSError):
        forkserver._forkserver._stop()  # type: ignore[attr-defined] # noqa: SLF001 - likewise


@contextlib.contextmanager
def preloading() -> Iterator[None]:
    """Import torch in the fork server while the body runs.

    An error in the body kills the fork server at once, even during its import.
    """
    give_torch_huge_pages()
    place_sockets()
    # Ctrl-C signals every process of a terminal; the fork server and its forks ignore it.
    with this_process.noting():
        resource_tracker.ensure_running()
        with blocked():
            mp.get_context("forkserver").set_forkserver_preload(["fedmq.nodes.cluster.preload"])
            forkserver.ensure_running()
    try:
        this_process.check()
        yield
    except BaseException:
        end_forkserver()
        raise
