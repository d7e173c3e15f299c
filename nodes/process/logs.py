"""Structured logs: readable on a terminal, JSON in files; every line says which node.

No line holds a local variable, whose values may be a client's data, and each is of bounded length.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import traceback
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import structlog

from fedmq.nodes.process.exception_text import MAX_TEXT, clip_text, described
from fedmq.nodes.process.streams import reason_of

_MAX_FRAMES, _MAX_CAUSES = 20, 3
"""Of an exception: the innermost frames, and exceptions that led to one another."""
_MAX_KNOWN = 256
"""Kinds of events that are counted; of more, those that came least recently are forgotten."""


class _Lasting(io.TextIOWrapper):
    """A log that a full disk does not turn into a crash: what cannot be written is left out."""

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
        """Nothing is held back."""


class Repeats:
    """Counts equal events, so that a log tells of them once, and then from time to time.

    Args:
        every_s: how long after a line the next one of an equal event is due.
    """

    def __init__(self, every_s: float = 60.0) -> None:
        self._every_s = every_s
        self._seen: dict[object, tuple[int, float]] = {}

    def count(self, event: object, now: float) -> int:
        """Return how often an event has come if a line on it is due, else 0."""
        times, told = self._seen.pop(event, (0, now))
        times += 1
        due = times == 1 or now - told >= self._every_s
        self._seen[event] = times, now if due else told
        if len(self._seen) > _MAX_KNOWN:
            del self._seen[next(iter(self._seen))]
        return times if due else 0


_LEVELS = structlog.make_filtering_bound_logger(logging.INFO)


def append(path: Path, text: str, **bound: str) -> None:
    """Write one line into a log that is not this process's; left out if it cannot be written."""
    with contextlib.suppress(OSError), _Lasting(path.open("ab", buffering=0), None) as stream:
        log = structlog.wrap_logger(
            structlog.PrintLogger(stream),
            processors=[*_processors(), structlog.processors.JSONRenderer()],
            wrapper_class=_LEVELS,
        )
        log.info(text, **bound)


def configure(path: Path | None, lost: Callable[[str], None] | None = None, **bound: str) -> None:
    """Send this process's log to a file as JSON, or to standard error for people.

    Args:
        path: the file; None for standard error.
        lost: called once, with the reason, if the file cannot be written any more.
        bound: what every line holds, such as run, node and session.

    Raises:
        OSError: the file cannot be opened.
    """
    stream: TextIO = sys.stderr
    if path is not None:
        stream = _Lasting(path.open("ab", buffering=0), lost)
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if path is None
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            *_processors(),
            renderer,
        ],
        wrapper_class=_LEVELS,
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**bound)


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
    """Cut what is long: values come from other nodes and from exceptions, too."""
    for name, value in event.items():
        if name == "exc_info":
            continue
        if isinstance(value, str):
            event[name] = clip_text(value)
        elif not isinstance(value, int | float) and len(text := repr(value)) > MAX_TEXT:
            event[name] = clip_text(text)
    return event


def _show_exception(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Put the frames of an exception, and what it says, in place of the exception."""
    error = event.pop("exc_info", None)
    if isinstance(error, tuple):
        error = error[1]
    elif error and not isinstance(error, BaseException):
        error = sys.exception()
    if isinstance(error, BaseException):
        event["exception"] = _frames(error)
    return event


def _frames(error: BaseException) -> str:
    """Return where an exception came from: files, lines and functions, and no values."""
    lines: list[str] = []
    each: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if each is None:
            break
        if lines:
            lines.append("which came from")
        frames = traceback.StackSummary.extract(
            traceback.walk_tb(each.__traceback__), capture_locals=False, lookup_lines=False
        )[-_MAX_FRAMES:]
        lines += [f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]
        lines.append(described(each))
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    return "\n".join(lines)
