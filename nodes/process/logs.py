"""Structured logs: readable on a terminal, JSON in files; every line names its node.

Lines have bounded length and contain no local variables, which may hold a client's data.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import sys
import time
import traceback
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import structlog

from fedmq.broker.file_modes import private_opener, restrict
from fedmq.broker.log_limit import SUPPRESSED, LogLimit
from fedmq.nodes.process.exception_text import (
    MAX_TEXT,
    RemoteTraceback,
    clip_text,
    described,
    reason_of,
)
from fedmq.nodes.process.terminal import escaped

_MAX_FRAMES, _MAX_CAUSES = 20, 3
"""Limits for an exception: innermost frames of each, and length of the chain of causes."""
LINES_PER_S = 100.0
"""Most lines of one event in a second; the number of the others is logged later."""
_MAX_COUNTED = 256
"""Distinct events that `Repeats` counts; it discards the least recent ones."""


class _LossyLog(io.TextIOWrapper):
    """A log file that drops what it cannot write, so that a full disk does not end the run."""

    def __init__(self, raw: io.FileIO, lost: Callable[[str], None] | None) -> None:
        super().__init__(raw)
        self._lost = lost

    def write(self, text: str) -> int:
        try:
            self.buffer.write(text.encode(errors="backslashreplace"))
        except OSError as error:
            if self._lost is not None:
                lost, self._lost = self._lost, None
                lost(f"cannot write {self.buffer.name}: {reason_of(error)}")
        return len(text)

    def flush(self) -> None:
        """Do nothing: `write` does not buffer."""


class Repeats:
    """Limit repeated log lines: the first of equal events is logged, then at most one a period.

    Args:
        every_s: period, in seconds.
    """

    def __init__(self, every_s: float = 60.0) -> None:
        self._every_s = every_s
        self._seen: dict[object, tuple[int, float]] = {}

    def count(self, event: object, now: float) -> int:
        """Count an event; return its count if it should be logged now, else 0."""
        times, logged_at = self._seen.pop(event, (0, now))
        times += 1
        due = times == 1 or now - logged_at >= self._every_s
        self._seen[event] = times, now if due else logged_at
        if len(self._seen) > _MAX_COUNTED:
            del self._seen[next(iter(self._seen))]
        return times if due else 0


class _Limited:
    """A processor that limits the lines of each event: other nodes cause some of them."""

    def __init__(self) -> None:
        self._limit = LogLimit(LINES_PER_S)

    def __call__(
        self, _logger: object, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        now = time.monotonic()
        if now >= self._limit.due:
            self.report()
        if not self._limit.admits(str(event.get("event", "")), now):
            raise structlog.DropEvent
        return event

    def report(self) -> None:
        """Log how many lines of each event were suppressed, if any were."""
        for kind, lines in self._limit.take_suppressed():
            structlog.get_logger().warning(SUPPRESSED, of=kind, lines=lines)


_LEVELS = structlog.make_filtering_bound_logger(logging.INFO)

SILENT: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
    structlog.ReturnLogger(),
    processors=[],
    wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL),
)
"""The log of simulated and replayed nodes: it drops everything."""


def append(path: Path, text: str, **bound: str) -> None:
    """Append one line to another process's log, if it can be written."""
    with contextlib.suppress(OSError), _LossyLog(_open_log(path), None) as stream:
        log = structlog.wrap_logger(
            structlog.PrintLogger(stream),
            processors=[*_processors(), structlog.processors.JSONRenderer()],
            wrapper_class=_LEVELS,
        )
        log.info(text, **bound)


def configure(path: Path | None, lost: Callable[[str], None] | None = None, **bound: str) -> TextIO:
    """Send this process's log to a file as JSON, or to standard error for people.

    At its end, the process logs how many lines were suppressed. One of `multiprocessing` must call
    `report_suppressed` itself.

    Args:
        path: the file; None for standard error.
        lost: called once, with the reason, when the file can no longer be written.
        bound: fields of every line, such as run, node and session.

    Returns:
        The stream. Before closing it, send the log elsewhere.

    Raises:
        OSError: the file cannot be opened.
    """
    stream: TextIO = sys.stderr
    if path is not None:
        stream = _LossyLog(_open_log(path), lost)
    renderers: Sequence[structlog.types.Processor] = (
        (_escaped_values, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()))
        if path is None
        else (structlog.processors.JSONRenderer(),)
    )
    structlog.configure(
        processors=[
            _Limited(),
            structlog.contextvars.merge_contextvars,
            *_processors(),
            *renderers,
        ],
        wrapper_class=_LEVELS,
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**bound)
    atexit.unregister(report_suppressed)
    atexit.register(report_suppressed)
    return stream


def report_suppressed() -> None:
    """Log how many lines were suppressed and not reported yet: to be called at the end."""
    for each in structlog.get_config()["processors"]:
        if isinstance(each, _Limited):
            with contextlib.suppress(OSError, ValueError):  # standard error may be closed
                each.report()


def _open_log(path: Path) -> io.FileIO:
    """Open a log: its owner's alone, because texts of errors may contain a client's data."""
    raw = io.FileIO(path, "ab", opener=private_opener)
    restrict(path)  # it may be of an older release
    return raw


def _processors() -> Sequence[structlog.types.Processor]:
    return (
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _bound_values,
        _show_exception,
    )


def _bound_values(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Clip long values: some come from other nodes or from exceptions."""
    for name, value in event.items():
        if name == "exc_info":
            continue
        if isinstance(value, str):
            event[name] = clip_text(value)
        elif not isinstance(value, int | float) and len(text := repr(value)) > MAX_TEXT:
            event[name] = clip_text(text)
    return event


def _escaped_values(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Escape what could control the terminal: names and reasons come from other nodes."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[name] = "\n".join(map(escaped, value.split("\n")))
    return event


def _show_exception(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Replace an exception by its frames and text."""
    error = event.pop("exc_info", None)
    if isinstance(error, tuple):
        error = error[1]
    elif error and not isinstance(error, BaseException):
        error = sys.exception()
    if isinstance(error, BaseException):
        event["exception"] = traceback_text(error)
    return event


def traceback_text(error: BaseException) -> str:
    """Return the traceback of an exception and its causes: files, lines, functions, no values."""
    lines: list[str] = []
    each: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if each is None:
            break
        if lines:
            lines.append("caused by")
        if isinstance(each, RemoteTraceback):
            lines.append(str(each))
            break
        frames = traceback.StackSummary.extract(
            traceback.walk_tb(each.__traceback__), capture_locals=False, lookup_lines=False
        )[-_MAX_FRAMES:]
        lines += [f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]
        lines.append(described(each))
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    return "\n".join(lines)
