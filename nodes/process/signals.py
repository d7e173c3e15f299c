"""Handling of stop signals, for all commands and for the nodes of a cluster.

By default the first signal raises `Stopped` in the main thread, wherever that is: in an import,
in a user's code, in training. Code that must not be interrupted (a supervisor that watches and
ends its nodes, a broker between two turns) uses `StopSignals.noting`, which only counts signals,
and checks the count. A watchdog ends the process where the exception has no effect (a long call
in C, user code that catches everything, an exit handler that waits): some seconds after the first
signal, or with the third.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from fedmq.nodes.process import streams

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130
"""Exit code of a process that a stop signal ended."""
ENOUGH = 3
"""Number of signals after which a process that is still ending is ended at once."""
_GRACE_S = 5.0
_SHORT_GRACE_S = 0.3
"""Grace after the third signal: the main thread may be about to end, or to hold the watchdog."""
_TICK_MS = 100
_REDELIVER_S = 0.01


class Stopped(BaseException):
    """A signal asked this process to stop; not an `Exception`, so that training passes it on."""


def _nothing() -> None:
    """Do nothing on a signal but count it."""


class StopSignals:
    """Count of the stop signals that this process received; the one instance is `this_process`.

    Attributes:
        count: number of signals received.
        name: name of the first signal; "" before it.
        hint: line for the user, printed after "stopped by SIGNAL".
        announced: whether "stopped by SIGNAL" has been printed.
        supervised: whether the process is a node of a cluster, whose run can be resumed.
    """

    def __init__(self) -> None:
        self.count = 0
        self.name = ""
        self.hint = ""
        self.announced = False
        self.supervised = False
        self._note: Callable[[], None] | None = None
        self._lost = False
        self._before: dict[signal.Signals, Any] = {}
        self._watchdog: _Watchdog | None = None
        self._unraisable_before: Callable[[sys.UnraisableHookArgs], Any] | None = None

    @property
    def installed(self) -> bool:
        """Return whether the handlers are installed."""
        return bool(self._before)

    def check(self) -> None:
        """Raise `Stopped` if a signal was received."""
        if self.count:
            raise Stopped(self.name)

    @contextlib.contextmanager
    def taken(self, *, watchdog: bool = True) -> Iterator[None]:
        """Handle stop signals inside the block; restore the previous handlers after it.

        Inside another such block, or outside of the main thread, this does nothing.

        Args:
            watchdog: end this process if it does not end by itself. A node of a cluster needs no
                watchdog: its supervisor ends it, and handles SIGINT and SIGHUP for it.
        """
        if self.installed or threading.current_thread() is not threading.main_thread():
            yield
            return
        try:
            self.install(watchdog=watchdog)
            yield
        finally:
            self._uninstall()

    def install(self, *, watchdog: bool = True) -> None:
        """Handle stop signals until the process ends; see `taken`.

        Raises:
            Stopped: a signal arrived in the meantime.
        """
        if self.installed:
            return
        note, self._note = self._note, _nothing
        # The first registered handler is called last. After it the interpreter restores the
        # default handlers and takes a while to end; a signal would kill it then.
        atexit.register(self._ignore)
        for each in STOP_SIGNALS if watchdog else (signal.SIGTERM,):
            # nohup ignores SIGHUP on purpose. A script's `&` ignores SIGINT, but a SIGINT sent
            # to that process is intended.
            if each == signal.SIGHUP and signal.getsignal(each) == signal.SIG_IGN:
                continue
            self._before[each] = signal.signal(each, self._handle)
        if watchdog:
            self._watchdog = _Watchdog(self)
        else:
            self._before |= {
                each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGHUP)
            }
        # A supervisor blocks the signals while it starts a node.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        self._unraisable_before, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self._note = note
        if note is None:
            self.check()

    @contextlib.contextmanager
    def noting(
        self, note: Callable[[], None] = _nothing, *, watched: bool = False
    ) -> Iterator[None]:
        """Inside the block, call ``note`` for each signal instead of raising `Stopped`.

        It is also called at once if a signal was received before.

        Args:
            note: may itself raise `Stopped`.
            watched: whether the watchdog ends the process inside the block, too.
        """
        before, self._note = self._note, note
        if self._watchdog is not None and not watched:
            self._watchdog.hold()
        if self.count:
            note()
        try:
            yield
        finally:
            self._note = before
            if self._watchdog is not None and before is None:
                self._watchdog.resume(armed=self.count > 0)

    @contextlib.contextmanager
    def prompting(self) -> Iterator[None]:
        """Inside the block, SIGINT raises KeyboardInterrupt: at a prompt it cancels the line."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._watchdog is not None:
            self._watchdog.watched = frozenset(STOP_SIGNALS) - {signal.SIGINT}
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            if self._watchdog is not None:
                self._watchdog.watched = frozenset(STOP_SIGNALS)

    def finish(self) -> None:
        """Raise nothing from now on: the interpreter is about to end."""
        self._note = _nothing
        if self._watchdog is not None:
            self._watchdog.resume(armed=self.count > 0)

    def announce(self) -> None:
        """Print "stopped by SIGNAL" once."""
        if not self.announced:
            self.announced = True
            lines = [f"fedmq: stopped by {self.name}", *([self.hint] if self.hint else [])]
            text = "".join(f"{each}\n" for each in lines)
            streams.write_in_time(2, text.encode(errors="backslashreplace"))

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._lost:
            self._lost = False
            raise Stopped(self.name)
        self.count += 1
        self.name = self.name or signal.Signals(number).name
        if self._note is not None:
            self._note()
        elif self.count == 1:
            raise Stopped(self.name)

    def _unraisable(self, what: sys.UnraisableHookArgs) -> None:
        """Raise `Stopped` again if it was lost in code that cannot raise, such as a finalizer."""
        if isinstance(what.exc_value, Stopped):
            self._lost = True
            _thread.start_new_thread(self._redeliver, ())
        elif self._unraisable_before is not None:
            self._unraisable_before(what)

    def _redeliver(self) -> None:
        time.sleep(_REDELIVER_S)  # until the main thread has left the finalizer
        if self._watchdog is not None:
            self._watchdog.ignore_one()
        _thread.interrupt_main(signal.SIGTERM)

    def _uninstall(self) -> None:
        self._restore()
        atexit.unregister(self._ignore)
        if self._unraisable_before is not None:
            sys.unraisablehook = self._unraisable_before
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None
        self.count, self.name, self.hint, self.announced, self._note = 0, "", "", False, None

    def _in_fork(self) -> None:
        """Restore the default handlers in a process that user code has forked."""
        if self._watchdog is not None:
            signal.set_wakeup_fd(-1)
            self._watchdog = None
        self._restore()

    def _ignore(self) -> None:
        for each in self._before:
            signal.signal(each, signal.SIG_IGN)

    def _restore(self) -> None:
        for each, handler in self._before.items():
            # None: the handler was not set from Python.
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
        self._before.clear()


class _Watchdog:
    """A thread that ends the process if a signal does not.

    Python calls a signal handler only between two steps of the main thread. The signal's number is
    written to this thread's pipe at once, whatever the main thread does.
    """

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals
        self.watched = frozenset(STOP_SIGNALS)
        self._came = 0
        self._held = False
        self._until: float | None = None
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="stop watchdog", daemon=True)
        self._thread.start()

    def hold(self) -> None:
        """Do not end the process until `resume` is called."""
        self._held, self._until = True, None

    def resume(self, *, armed: bool) -> None:
        """Watch again; ``armed``: a signal was received, so the grace period starts now."""
        self._held = False
        if armed:
            with contextlib.suppress(BlockingIOError):  # a full pipe wakes the thread, too
                os.write(self._writer, b"\0")

    def ignore_one(self) -> None:
        """Do not count the next signal: it is delivered a second time."""
        self._came -= 1

    def close(self) -> None:
        """Stop the thread."""
        signal.set_wakeup_fd(-1)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._reader, select.POLLIN)
        while True:
            if poller.poll(None if self._until is None else _TICK_MS):
                numbers = os.read(self._reader, 256)
                if not numbers:
                    return
                for number in numbers:
                    self._take(number)
            if self._until is not None and time.monotonic() >= self._until:
                self._end()

    def _take(self, number: int) -> None:
        if number in self.watched:
            self._came += 1
            self._signals.name = self._signals.name or signal.Signals(number).name
        if (number == 0 or number in self.watched) and not self._held:
            grace = _SHORT_GRACE_S if number and self._came >= ENOUGH else _GRACE_S
            until = time.monotonic() + grace
            self._until = until if self._until is None else min(self._until, until)

    def _end(self) -> None:
        self._signals.announce()
        os._exit(INTERRUPTED)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Inside the block, start child processes with stop signals blocked, until they handle them.

    So a Ctrl-C, which the terminal sends to all processes, does not kill a child at its start.
    Use it inside `StopSignals.noting`: signals still reach this process.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


this_process = StopSignals()
# Registered once for all: such a callback cannot be removed.
os.register_at_fork(after_in_child=this_process._in_fork)  # noqa: SLF001 - of this module
