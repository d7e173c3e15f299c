"""Structured logs: readable on a terminal, JSON in files; every line says which node."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import structlog

from fedmq.nodes.streams import reason_of


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


_STAMPS: Sequence[structlog.types.Processor] = (
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
)
_LEVELS = structlog.make_filtering_bound_logger(logging.INFO)


def append(path: Path, text: str, **bound: str) -> None:
    """Write one line into a log that is not this process's; left out if it cannot be written."""
    with contextlib.suppress(OSError), _Lasting(path.open("ab", buffering=0), None) as stream:
        log = structlog.wrap_logger(
            structlog.PrintLogger(stream),
            processors=[*_STAMPS, structlog.processors.JSONRenderer()],
            wrapper_class=_LEVELS,
        )
        log.info(text, **bound)


def configure(path: Path | None, lost: Callable[[str], None] | None = None, **bound: str) -> None:
    """Send this process's log to a file as JSON, or to standard error for people.

    Args:
        path: the file; None for standard error.
        lost: is told once if the file cannot be written any more, and why.
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
            *_STAMPS,
            structlog.processors.dict_tracebacks if path else structlog.dev.set_exc_info,
            renderer,
        ],
        wrapper_class=_LEVELS,
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**bound)
