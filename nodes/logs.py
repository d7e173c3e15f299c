"""Structured logs: readable on a terminal, JSON in files; every line says which node."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from pathlib import Path
from typing import TextIO

import structlog


class _Lasting(io.TextIOWrapper):
    """A log that a full disk does not turn into a crash: what cannot be written is left out."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.buffer.write(text.encode())
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


def configure(path: Path | None, **bound: str) -> None:
    """Send this process's log to a file as JSON, or to standard error for people.

    Args:
        path: the file; None for standard error.
        bound: what every line holds, such as run, node and session.
    """
    stream: TextIO = sys.stderr if path is None else _Lasting(path.open("ab", buffering=0))
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if path is None
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.dict_tracebacks if path else structlog.dev.set_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**bound)
