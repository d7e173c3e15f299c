"""How the process of a node, or of a broker, is set up: memory, files, the interpreter."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import sys

import structlog

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD_BYTES = 32 << 20
"""The most that glibc takes. (Messages of 7 MB: 709 MB/s with 32 MiB, 582 with 4 MiB; medians of
ten runs each, in turn.)"""


def tune_process() -> None:
    """Set a node's, or a broker's, process up; called once, before it begins.

    Whatever this system does not grant is left as it is: a node works without, only slower.
    """
    for step in (keep_freed_memory, allow_many_files, _spare_the_collector):
        try:
            step()
        except Exception as error:  # noqa: BLE001 - what a system does not have, it may say in any way
            log = structlog.get_logger()
            log.warning("goes on without", step=step.__name__.strip("_"), reason=repr(error))


def _spare_the_collector() -> None:
    """Let Python's garbage collector leave alone what is there already.

    Torch's many objects are here to stay. And a link's thread waits for the interpreter at most
    a millisecond.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    sys.setswitchinterval(0.001)


def give_torch_huge_pages() -> None:
    """Let torch, in this process and those that it starts, map large tensors in huge pages.

    To be called before torch is imported: it looks only once.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def allow_many_files() -> None:
    """Open as many files as the system's administrator allows, not as many as is usual.

    Each node is a connection, and so a file, of the broker's: the usual 1,024 would keep
    every further node waiting.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # not every system grants what it names
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def keep_freed_memory() -> None:
    """Let malloc hand out again what was freed, instead of returning it to the system.

    By default glibc maps each large block freshly, so every chunk, and every model that is
    fetched, lands in pages that the kernel must clear and map first: measured, a quarter of
    a broker's time. At most 64 MiB of freed memory are kept in each arena, and blocks of
    more than 32 MiB are mapped as ever. Does nothing on other C libraries.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)
