"""The process that the nodes of a local cluster are forked from: it has imported torch already."""

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
    """End the process that nodes are forked from, if it was started; nodes live on."""
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined] # noqa: SLF001 - there is no public way
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def end_forkserver() -> None:
    """End it, and wait for its end."""
    kill_forkserver()
    with contextlib.suppress(OSError):
        forkserver._forkserver._stop()  # type: ignore[attr-defined] # noqa: SLF001 - likewise


@contextlib.contextmanager
def preloading() -> Iterator[None]:
    """Meanwhile, import torch in the process that the nodes are forked from.

    After an error that process is ended at once, not when its import is done.
    """
    give_torch_huge_pages()
    place_sockets()
    # Ctrl-C goes to all processes of a terminal; this one and its forks leave it to us.
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
