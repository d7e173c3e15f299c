"""Set up the process of a node or a broker: memory, open files, the interpreter."""

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
"""The largest value that glibc accepts. (Messages of 7 MB: 709 MB/s with 32 MiB, 582 with 4 MiB;
medians of ten alternating runs.)"""


def tune_process() -> None:
    """Tune the process of a node or a broker; called once, at its start.

    A step that the system does not allow is skipped: the node works without it, only slower.
    """
    for step in (keep_freed_memory, allow_many_files, _spare_the_collector):
        try:
            step()
        except Exception as error:  # noqa: BLE001 - a system may fail in any way
            log = structlog.get_logger()
            log.warning("skipped a tuning step", step=step.__name__.strip("_"), reason=repr(error))


def _spare_the_collector() -> None:
    """Exclude existing objects from garbage collection, and switch threads within a millisecond.

    Torch's many objects live as long as the process. The switch interval bounds how long a link's
    thread waits for the interpreter.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    sys.setswitchinterval(0.001)


def give_torch_huge_pages() -> None:
    """Make torch map large tensors in huge pages, in this process and its children.

    Call it before torch is imported: torch reads the setting once.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def allow_many_files() -> None:
    """Raise the limit of open files to the hard limit.

    Each node's connection is an open file of the broker: with the usual limit of 1,024, further
    nodes would wait.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems refuse their own hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def keep_freed_memory() -> None:
    """Make malloc reuse freed memory instead of returning it to the system.

    By default glibc maps new pages for each large block, which the kernel must clear: measured, a
    quarter of a broker's time. Each arena keeps at most 64 MiB of freed memory, and blocks of
    more than 32 MiB are still mapped. Does nothing with other C libraries.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)
