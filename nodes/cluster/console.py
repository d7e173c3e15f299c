"""What a supervisor says: on its terminal, and in a log of its own, whichever still works."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, RenderableType

from fedmq.nodes.process import logs, streams


class SupervisorConsole:
    """Says things to people; nothing that fails there ends a run.

    Args:
        console: the terminal, or wherever standard output goes.
        path: of the log.
    """

    def __init__(self, console: Console, path: Path) -> None:
        self._console = console
        self._path = path
        streams.go_on_without_output(self._lost)

    def say(self, text: str) -> None:
        """Say one sentence."""
        self._note(text)
        with contextlib.suppress(Exception):  # it is in the log
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)
        streams.tell_elsewhere(text)

    def show(self, draw: Callable[[], RenderableType]) -> None:
        """Show something; if that cannot be drawn, say why."""
        try:
            self._console.print(draw())
        except Exception as error:  # noqa: BLE001 - what is shown is in summary.json
            self.say(f"fedmq: cannot show how the run ended: {error!r}; see summary.json")

    def _lost(self, what: str) -> None:
        self._note(f"{what}; going on without it")
        streams.tell(f"fedmq: {what}; going on without it")

    def _note(self, text: str) -> None:
        logs.append(self._path, text, node="cluster")
