"""Whose turn it is to run a link's loop: the node's main thread, or one of the link's own.

While the node waits for a message, its main thread runs the loop itself, so that a message
is handled where it arrives. While the node computes, a thread of the link runs it: beats,
receipts and blobs go on while torch trains, because torch lets go of the GIL. Whoever holds
the *baton*, a lock, runs the loop. (With a loop that always lives on its own thread, each
message costs two thread switches more: about 20 a round of four clients were counted at the
aggregator, and two with the baton.)
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

_WATCH_S = 0.25
"""The thread takes over by itself when the main thread has been away for this long."""
_SHORT_S = 0.005
"""After an absence shorter than this, the next one is not worth waking the thread for."""


class LoopHandoff:
    """A lock between two threads, of which the main one comes first.

    The main thread has it ``with`` the baton, as often as it likes.

    Args:
        is_over: tells the other thread that there is nothing more to run.

    Attributes:
        bell: a file descriptor that the loop polls: it can be read when somebody has rung.
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
        """Take the baton for the main thread, if it does not have it, and tell the other."""
        if self._away.is_set():
            self._away.clear()
        if not self._lock.acquire(blocking=False):
            self._main_wants = True
            try:
                self.wake()
                self._lock.acquire()
            finally:  # a signal may have ended the waiting
                self._main_wants = False

    def __exit__(self, *_: object) -> None:
        """Let go of it, where it was taken."""
        self._lock.release()

    def away(self) -> contextlib.AbstractContextManager[None]:
        """The main thread does something that may take long; the other takes over.

        Not again before the end of the first.
        """
        return self._absence

    def release(self) -> None:
        """The main thread does not come back: let the other see that it is over."""
        self._away.set()

    def run_in_background(self, turn: Callable[[], None]) -> None:
        """On the other thread: run the loop whenever the main one is away, until it is over.

        At its word, or after a while.
        """
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
        with contextlib.suppress(BlockingIOError):  # a wake-up is waiting already
            os.write(self._wakeup_writer, b"x")

    def clear_wakeup(self) -> None:
        """Take note of all that have rung."""
        os.read(self.wakeup, 4096)

    def close(self) -> None:
        """Close the bell."""
        os.close(self.wakeup)
        os.close(self._wakeup_writer)


class _Absence:
    """A while in which the main thread is away, again and again."""

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
