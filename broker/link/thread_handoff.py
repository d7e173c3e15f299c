"""Decide which thread runs a link's loop: the node's main thread, or one of the link's own.

While the node waits for a message, its main thread runs the loop, so that a message is handled
where it arrives. While the node computes, a thread of the link runs it: heartbeats,
acknowledgments and blobs continue while torch trains, because torch releases the GIL. The thread
that holds the lock runs the loop. (A loop that always runs on its own thread costs two more thread
switches a message: the aggregator had about 20 in a round of four clients, and has two this way.)
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

_WATCH_S = 0.25
"""Absence of the main thread after which the link's thread takes over without a wake-up."""
_SHORT_S = 0.005
"""After an absence shorter than this, the next one does not wake the link's thread."""


class LoopHandoff:
    """A lock between the main thread, which has priority, and the link's thread.

    The main thread holds it within ``with``, which may be nested.

    Args:
        is_over: returns whether the link's thread must end.

    Attributes:
        wakeup: a file descriptor that the loop polls; readable after `wake`.
    """

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over
        self._lock = threading.RLock()
        self._main_wants = False
        self._away = threading.Event()
        self._absence = _Absence(self._away)
        self.wakeup, self._wakeup_writer = os.pipe()
        os.set_blocking(self.wakeup, False)
        os.set_blocking(self._wakeup_writer, False)

    def __enter__(self) -> None:
        """Acquire the lock for the main thread; makes the link's thread release it."""
        if self._away.is_set():
            self._away.clear()
        if not self._lock.acquire(blocking=False):
            self._main_wants = True
            try:
                self.wake()
                self._lock.acquire()
            finally:  # a signal may have interrupted the wait
                self._main_wants = False

    def __exit__(self, *_: object) -> None:
        """Release the lock, unless it is nested."""
        self._lock.release()

    def away(self) -> contextlib.AbstractContextManager[None]:
        """Return a context for long work of the main thread; the link's thread takes over.

        The context cannot be nested.
        """
        return self._absence

    def release(self) -> None:
        """Let the link's thread end: the main thread does not run the loop any more."""
        self._away.set()

    def run_in_background(self, turn: Callable[[], None]) -> None:
        """On the link's thread: call ``turn`` while the main thread is away, until the end."""
        while not self._is_over():
            self._away.wait(_WATCH_S)
            if not self._lock.acquire(blocking=False):
                continue
            try:
                while not (self._main_wants or self._is_over()):
                    turn()
            finally:
                self._lock.release()

    def wake(self) -> None:
        """Wake the loop; may be called from any thread."""
        with contextlib.suppress(BlockingIOError):  # a wake-up is pending
            os.write(self._wakeup_writer, b"x")

    def clear_wakeup(self) -> None:
        """Clear all pending wake-ups."""
        os.read(self.wakeup, 4096)

    def close(self) -> None:
        """Close the file descriptors."""
        os.close(self.wakeup)
        os.close(self._wakeup_writer)


class _Absence:
    """The context of `LoopHandoff.away`; reusable."""

    def __init__(self, away: threading.Event) -> None:
        self._away = away
        self._began = 0.0
        self._last_s = 1.0

    def __enter__(self) -> None:
        self._began = time.monotonic()
        if self._last_s >= _SHORT_S:
            self._away.set()

    def __exit__(self, *_: object) -> None:
        self._last_s = time.monotonic() - self._began
