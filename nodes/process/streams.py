"""Standard output and error: a failed write does not end a run.

Writes fail when `head` closes a pipe, a disk is full, or a terminal goes away or is no longer
read. A command whose purpose is its output, such as ``fedmq trace ls``, then ends like other Unix
tools. A command that runs something continues, and reports the loss once on the other stream.
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

from fedmq.nodes.process.exception_text import reason_of

_WRITE_TIMEOUT_S = 1.0
"""A write waits this long for a reader; after a timeout, later writes do not wait."""
_PAUSE_S = 0.01
_CHUNK_BYTES = 512
"""A pipe that poll() reports as writable has room for this much: POSIX's least PIPE_BUF."""


def is_terminal() -> bool:
    """Return whether standard output is a terminal, whatever variables such as FORCE_COLOR say."""
    return sys.stdout is not None and sys.stdout.isatty()


class OutputFailed(Exception):
    """Standard output, the purpose of this command, cannot be written.

    Attributes:
        broken_pipe: whether the reader has closed it.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to standard output: {reason_of(error)}")
        self.broken_pipe = error.errno == errno.EPIPE


class OutputStream(io.RawIOBase):
    """One of the standard streams.

    Args:
        fd: file descriptor.
        name: name for messages, such as "standard output".
        lost: called once, with the name and the reason, when a write fails.

    Attributes:
        required: raise `OutputFailed` when a write fails, instead of dropping the data.
        failed: whether a write has failed.
    """

    def __init__(self, fd: int, name: str, lost: Callable[[str], None]) -> None:
        self.required = False
        self.failed = False
        self._fd = fd
        self._name = name
        self._lost = lost
        self._own_fd: int | None = None
        if os.isatty(fd):
            # A write to a terminal that nobody reads blocks for ever, even after poll(), so it
            # needs O_NONBLOCK: on a descriptor of our own, as the shell shares the standard ones.
            with contextlib.suppress(OSError):
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self._own_fd = os.open(os.ttyname(fd), flags)
        self._timeout_s = _WRITE_TIMEOUT_S

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._fd

    def close(self) -> None:
        """Close this object's own descriptor; the standard one stays open."""
        if self._own_fd is not None:
            os.close(self._own_fd)
            self._own_fd = None
        super().close()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return os.isatty(self._fd)

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: ReadableBuffer) -> int:
        """Write all data; if that fails, drop the rest and report it once.

        Raises:
            OutputFailed: the write failed and the stream is required.
        """
        view = memoryview(data).cast("B")
        if self.required:
            self._write_or_raise(view)
            return len(view)
        fd = self._fd if self._own_fd is None else self._own_fd
        error = write_in_time(fd, view, self._timeout_s)
        self._timeout_s = 0.0 if isinstance(error, TimeoutError) else _WRITE_TIMEOUT_S
        if error is not None and not self.failed:
            self.failed = True
            self._lost(f"{self._name}: {reason_of(error)}")
        return len(view)

    def _write_or_raise(self, view: memoryview) -> None:
        """Write all data; after a failure, drop it: buffers above are flushed again at exit."""
        while view and not self.failed:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                select.select([], [self._fd], [])
            except OSError as error:
                self.failed = True
                raise OutputFailed(error) from None


def write_in_time(
    fd: int, data: bytes | memoryview, timeout_s: float = _WRITE_TIMEOUT_S
) -> OSError | None:
    """Write to a pipe, a terminal or a file; return the error if not all was written."""
    view = memoryview(data)
    until = time.monotonic() + timeout_s
    poller = select.poll()
    try:
        poller.register(fd, select.POLLOUT)
        while view:
            written = 0
            if poller.poll(max(0.0, 1000 * (until - time.monotonic()))):
                try:
                    written = os.write(fd, view[:_CHUNK_BYTES])
                except BlockingIOError:
                    time.sleep(_PAUSE_S)  # a terminal can be full although poll() succeeded
            if not written and time.monotonic() >= until:
                return TimeoutError(errno.ETIMEDOUT, "nobody reads it")
            view = view[written:]
    except OSError as error:
        return error
    return None


class _Streams:
    """The process's two streams, and the function that reports the failure of one."""

    def __init__(self) -> None:
        self.out: OutputStream | None = None
        self.err: OutputStream | None = None
        self.lost: Callable[[str], None] = _report_on_the_other


def _report_on_the_other(what: str) -> None:
    tell(f"fedmq: {what}; going on without it")


_streams = _Streams()


def tell(text: str) -> None:
    """Write a line to standard error, or to standard output if that has failed."""
    for stream in (_streams.err, _streams.out):
        if stream is not None and not stream.failed and not stream.required:
            stream.write(f"{text}\n".encode(errors="backslashreplace"))
            return


def set_up() -> bool:
    """Replace standard output and error until the process ends; return whether that was done.

    Standard output is required until `go_on_without_output` is called. If something else, such
    as a test, has replaced the streams, this does nothing.
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
    """Let the process continue when standard output fails from now on.

    Args:
        lost: called with the stream's name and the reason; by default the other stream reports it.
    """
    if _streams.out is None or sys.stdout is None:
        return
    if lost is not None:
        _streams.lost = lost
    sys.stdout.flush()
    _streams.out.required = False


def tell_elsewhere(text: str) -> None:
    """Write a line to standard error if standard output has failed."""
    if _streams.out is not None and _streams.out.failed:
        tell(text)


def flush() -> None:
    """Write buffered output.

    Raises:
        OutputFailed: standard output is required and cannot be written.
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
    # An ASCII terminal shows escapes for other characters, rather than raising an error.
    return io.TextIOWrapper(
        binary,  # type: ignore[arg-type] # a raw stream has what is used without a buffer
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=line_buffering,
        write_through=write_through,
    )


def _fill_gaps() -> None:
    """Open standard descriptors that are closed, so that no file of a run gets their numbers.

    Child processes inherit them, for the same reason.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003 - it has no name
