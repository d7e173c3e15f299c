"""The supervisor's output: on the terminal and in its own log, whichever can be written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, RenderableType

from fedmq.nodes.process import logs, streams


def output_console() -> Console:
    """Return the console of a command; it draws nothing into a pipe or a file.

    Rich alone would take a pipe for a terminal if FORCE_COLOR or TTY_COMPATIBLE is set.
    """
    return Console(force_terminal=None if streams.is_terminal() else False)


class SupervisorConsole:
    """Prints and logs; no error in here ends a run.

    Args:
        console: the terminal or another standard output.
        path: of the log.
        node: name in the log's lines.
    """

    def __init__(self, console: Console, path: Path, node: str = "cluster") -> None:
        self._console = console
        self._path, self._node = path, node
        streams.go_on_without_output(self._lost)

    def say(self, text: str) -> None:
        """Print and log one sentence."""
        self._log(text)
        with contextlib.suppress(Exception):  # the log has it
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)
        streams.tell_elsewhere(text)

    def show(self, draw: Callable[[], RenderableType]) -> None:
        """Print what ``draw`` returns; if that fails, print why."""
        try:
            self._console.print(draw(), soft_wrap=True)
        except Exception as error:  # noqa: BLE001 - summary.json has the same content
            self.say(f"fedmq: cannot print the summary: {error!r}; see summary.json")

    def _lost(self, what: str) -> None:
        self._log(f"{what}; going on without it")
        streams.tell(f"fedmq: {what}; going on without it")

    def _log(self, text: str) -> None:
        logs.append(self._path, text, node=self._node)
