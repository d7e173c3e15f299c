"""Standard output and error: what is written there may fail without ending a run.

A pipe is closed by `head`, a disk is full, a terminal goes away or is not read any more. For a
command that prints what it was asked for, such as ``fedmq trace ls``, that is the end, as it is
for other Unix tools. A command that runs something goes on, and says once what it lost, on what
still works.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_PATIENCE_S = 1.0
"""For so long a write waits for a reader; while there is none, the next ones do not wait."""
_PAUSE_S = 0.01
_PIECE = 512
"""There is room for so much in a pipe to which the system says one can write."""


class OutputFailed(Exception):
    """Standard output, which was all this command is for, cannot be written.

    Attributes:
        broken_pipe: its reader has closed it.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to standard output: {reason_of(error)}")
        self.broken_pipe = error.errno == errno.EPIPE


class OutputStream(io.RawIOBase):
    """One of the standard streams.

    Args:
        fd: its number.
        name: for people.
        lost: is called once with the sentence that says what was lost, and why.

    Attributes:
        required: raise `OutputFailed` if it cannot be written, instead of leaving it out.
        failed: whether something was left out.
    """

    def __init__(self, fd: int, name: str, lost: Callable[[str], None]) -> None:
        self.required = False
        self.failed = False
        self._fd = fd
        self._name = name
        self._lost = lost
        self._own_fd: int | None = None
        if os.isatty(fd):
            # A terminal that nobody reads would hold a write for ever, whatever poll() says of
            # it; O_NONBLOCK on the shell's own descriptor would be set for the shell, too.
            with contextlib.suppress(OSError):
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self._own_fd = os.open(os.ttyname(fd), flags)
        self._patience_s = _PATIENCE_S

    def fileno(self) -> int:
        """Return its number."""
        return self._fd

    def close(self) -> None:
        """Close what was opened for it; the stream itself stays open."""
        if self._own_fd is not None:
            os.close(self._own_fd)
            self._own_fd = None
        super().close()

    def isatty(self) -> bool:
        """Tell whether it is a terminal."""
        return os.isatty(self._fd)

    def writable(self) -> bool:
        """Tell that it can be written."""
        return True

    def write(self, data: ReadableBuffer) -> int:
        """Write all of it, or leave it out and say so.

        Raises:
            OutputFailed: it is required.
        """
        view = memoryview(data).cast("B")
        if self.required:
            self._write_or_raise(view)
            return len(view)
        fd = self._fd if self._own_fd is None else self._own_fd
        error = write_in_time(fd, view, self._patience_s)
        self._patience_s = 0.0 if isinstance(error, TimeoutError) else _PATIENCE_S
        if error is not None and not self.failed:
            self.failed = True
            self._lost(f"{self._name}: {reason_of(error)}")
        return len(view)

    def _write_or_raise(self, view: memoryview) -> None:
        """Write all; after a failure, drop what buffers above still hold."""
        while view and not self.failed:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                select.select([], [self._fd], [])
            except OSError as error:
                self.failed = True
                raise OutputFailed(error) from None


def write_in_time(
    fd: int, data: bytes | memoryview, patience_s: float = _PATIENCE_S
) -> OSError | None:
    """Write to a pipe, a terminal or a file; return why not all was written, or None."""
    view = memoryview(data)
    until = time.monotonic() + patience_s
    poller = select.poll()
    try:
        poller.register(fd, select.POLLOUT)
        while view:
            written = 0
            if poller.poll(max(0.0, 1000 * (until - time.monotonic()))):
                try:
                    written = os.write(fd, view[:_PIECE])
                except BlockingIOError:
                    time.sleep(_PAUSE_S)  # a terminal has less room than it says
            if not written and time.monotonic() >= until:
                return TimeoutError(errno.ETIMEDOUT, "nobody reads it")
            view = view[written:]
    except OSError as error:
        return error
    return None


def reason_of(error: OSError) -> str:
    """Return why the system did not do something, for people."""
    return (error.strerror or str(error) or type(error).__name__).lower()


class _Streams:
    """The process's two streams, and where the failure of one is reported."""

    def __init__(self) -> None:
        self.out: OutputStream | None = None
        self.err: OutputStream | None = None
        self.lost: Callable[[str], None] = _tell_on_the_other


def _tell_on_the_other(what: str) -> None:
    tell(f"fedmq: {what}; going on without it")


_streams = _Streams()


def tell(text: str) -> None:
    """Write a line on whichever stream works, standard error first."""
    for stream in (_streams.err, _streams.out):
        if stream is not None and not stream.failed and not stream.required:
            stream.write(f"{text}\n".encode(errors="backslashreplace"))
            return


def set_up() -> bool:
    """Take over standard output and error for as long as the process lasts; tell whether.

    Standard output is required; see `go_on_without_output`. Does nothing where something else
    has taken them over, such as a test.
    """
    if _streams.out is not None:
        return True
    if sys.stdout not in (None, sys.__stdout__) or sys.stderr not in (None, sys.__stderr__):
        return False
    _fill_gaps()
    _streams.out = OutputStream(1, "standard output", lambda what: _streams.lost(what))
    _streams.err = OutputStream(2, "standard error", lambda what: _streams.lost(what))
    _streams.out.required = True
    sys.stdout = _text(io.BufferedWriter(_streams.out), sys.stdout, line_buffering=os.isatty(1))
    sys.stderr = _text(_streams.err, sys.stderr, write_through=True)
    return True


def go_on_without_output(lost: Callable[[str], None] | None = None) -> None:
    """From here on this process runs something: what it prints may be lost.

    Args:
        lost: called with what is lost and why; by default the other stream says it.
    """
    if _streams.out is None or sys.stdout is None:
        return
    if lost is not None:
        _streams.lost = lost
    sys.stdout.flush()
    _streams.out.required = False


def tell_elsewhere(text: str) -> None:
    """Write a line to standard error, because standard output has failed."""
    if _streams.out is not None and _streams.out.failed:
        tell(text)


def flush() -> None:
    """Write what is buffered.

    Raises:
        OutputFailed: it is required, and cannot be written.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _text(
    binary: io.BufferedWriter[OutputStream] | OutputStream,
    before: TextIO | None,
    *,
    line_buffering: bool = False,
    write_through: bool = False,
) -> io.TextIOWrapper:
    encoding = getattr(before, "encoding", None) or "utf-8"
    # A terminal of ASCII is no reason to fail: what it does not know is written as its code.
    return io.TextIOWrapper(
        binary,  # type: ignore[arg-type] # a raw stream has what is used without a buffer
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=line_buffering,
        write_through=write_through,
    )


def _fill_gaps() -> None:
    """Open what was closed before this process began, so that no file of a run gets its number.

    Nor one of the processes that this one starts: they inherit what is opened here.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003 - it has no name
