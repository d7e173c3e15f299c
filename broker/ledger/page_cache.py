"""Evict old pages of large files from the page cache, so that the kernel reuses them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

_executor = ThreadPoolExecutor(1, thread_name_prefix="page-cache")


def evict(fd: int) -> None:
    """Start writing a file to the device, and evict its written pages from the page cache.

    Called when a segment is full, and again some segments later. So the cache holds the newest
    payload, and its pages are reused: on a virtual machine, writing to new pages took 3.2 ms a MiB,
    to reused ones 0.5 ms. It takes about 20 ms for a segment, so a thread of its own does it.

    Raises:
        OSError: no file descriptor is available.
        RuntimeError: no thread is available.
    """
    if hasattr(os, "posix_fadvise"):
        own = os.dup(fd)
        try:
            _executor.submit(_advise, own)
        except RuntimeError:
            os.close(own)
            raise


def _advise(fd: int) -> None:
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
