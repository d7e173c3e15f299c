"""Signals that ask a process to stop: one place for all commands and for the nodes of a cluster.

Two ways to take them. By default the first signal raises `Stopped` in the main thread, wherever
it is: in an import, in a user's code, in training. Where the work must not be cut in two (a
supervisor that watches and ends its nodes, a broker between two turns), `StopSignals.noting`
only counts them, and the code there asks. What raises nothing (a library's long call in C, user
code that catches everything, an exit handler that waits) is ended by a watchdog: some seconds
after the first signal, or with the third.
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
"""The exit code of whatever was stopped by one of them."""
ENOUGH = 3
"""The signal that ends at once what is still ending."""
_GRACE_S = 5.0
_SHORT_GRACE_S = 0.3
"""After the third: the main thread may be about to end, or to say that it needs its time."""
_TICK_MS = 100
_AGAIN_S = 0.01


class Stopped(BaseException):
    """A signal asked this process to stop; not an Exception, so that training lets it through."""


def _nothing() -> None:
    """Do no more than count."""


class StopSignals:
    """The signals that have asked this process to stop. There is one: `this_process`.

    Attributes:
        count: how many have come.
        name: of the first; empty before it.
        hint: a line for the user, to go with the sentence that says so.
        announced: whether the user has been told that the process was stopped, and by what.
        supervised: whether the process is of a cluster, whose supervisor may go on with the run.
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
        """Return whether this process takes the signals."""
        return bool(self._before)

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if self.count:
            raise Stopped(self.name)

    @contextlib.contextmanager
    def taken(self, *, watchdog: bool = True) -> Iterator[None]:
        """Take the signals from now on; once the block is left, they do what they did before.

        Inside another such block, or outside of the main thread, this does nothing.

        Args:
            watchdog: end this process if it does not end itself. A node of a cluster is ended
                by its supervisor, which also takes SIGINT and SIGHUP for it.
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
        """Take the signals until the process ends; see `taken`.

        Raises:
            Stopped: one has come already.
        """
        if self.installed:
            return
        note, self._note = self._note, _nothing
        # The first that is registered is called last. After it the interpreter gives the
        # signals back to the system, takes a while to end, and would be killed by one.
        atexit.register(self._ignore)
        for each in STOP_SIGNALS if watchdog else (signal.SIGTERM,):
            # nohup has SIGHUP ignored. SIGINT is ignored in whatever a script starts with `&`,
            # and yet whoever sends it there means it.
            if each == signal.SIGHUP and signal.getsignal(each) == signal.SIG_IGN:
                continue
            self._before[each] = signal.signal(each, self._handle)
        if watchdog:
            self._watchdog = _Watchdog(self)
        else:
            self._before |= {
                each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGHUP)
            }
        # A supervisor blocks them while it starts a node, which takes them from here on.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        self._unraisable_before, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self._note = note
        if note is None:
            self.check()

    @contextlib.contextmanager
    def noting(self, note: Callable[[], None] = _nothing) -> Iterator[None]:
        """Meanwhile, call ``note`` for each signal, and for those that have come, instead.

        Nothing is raised, and the watchdog lets this block take its time.
        """
        before, self._note = self._note, note
        if self._watchdog is not None:
            self._watchdog.hold()
        if self.count:
            note()
        try:
            yield
        finally:
            self._note = before
            if self._watchdog is not None and before is None:
                self._watchdog.let_go(armed=self.count > 0)

    @contextlib.contextmanager
    def prompting(self) -> Iterator[None]:
        """Meanwhile, SIGINT is KeyboardInterrupt: at a prompt it cancels the line."""
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
        """The work is done: raise nothing while the interpreter ends."""
        self._note = _nothing
        if self._watchdog is not None:
            self._watchdog.let_go(armed=self.count > 0)

    def announce(self) -> None:
        """Tell the user once that a signal has stopped this process."""
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
        """Raise `Stopped` again where it met code that cannot raise, such as a finalizer."""
        if isinstance(what.exc_value, Stopped):
            self._lost = True
            _thread.start_new_thread(self._again, ())
        elif self._unraisable_before is not None:
            self._unraisable_before(what)

    def _again(self) -> None:
        time.sleep(_AGAIN_S)  # by then the main thread has left where it is
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
        """In a process that user code has forked, signals do what they do by default."""
        if self._watchdog is not None:
            signal.set_wakeup_fd(-1)
            self._watchdog = None
        self._restore()

    def _ignore(self) -> None:
        for each in self._before:
            signal.signal(each, signal.SIG_IGN)

    def _restore(self) -> None:
        for each, handler in self._before.items():
            # None: it was not set from Python.
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
        self._before.clear()


class _Watchdog:
    """Ends the process if a signal does not: a thread, which also sees what Python does not.

    Python calls a handler between two steps of the main thread. The number of the signal is
    written to this thread's pipe as it comes, whatever the main thread does.
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
        """Let the main thread take its time."""
        self._held, self._until = True, None

    def let_go(self, *, armed: bool) -> None:
        """Watch again; ``armed``: a signal has come, and the time runs from now on."""
        self._held = False
        if armed:
            with contextlib.suppress(BlockingIOError):  # it is awake
                os.write(self._writer, b"\0")

    def ignore_one(self) -> None:
        """Do not count the next: it is the one before, taken again."""
        self._came -= 1

    def close(self) -> None:
        """Watch no more."""
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
    """Meanwhile, what this thread starts begins with the signals blocked, until it takes them.

    So a Ctrl-C, which the terminal sends to all, does not end a process that has only begun.
    Must be inside `StopSignals.noting`: signals still reach this process.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


this_process = StopSignals()
# A callback that is registered cannot be taken back: there is one, which looks.
os.register_at_fork(after_in_child=this_process._in_fork)  # noqa: SLF001 - of this module
