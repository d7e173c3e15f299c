"""Check a core's state after each event, in tests and simulations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar


class Core(Protocol):
    """A state machine that can check itself."""

    @property
    def handle(self) -> Callable[..., Any]:
        """Handles an event, and returns actions."""

    def validate_state(self) -> None:
        """Raise AssertionError, with what is wrong, if parts of the state contradict each other."""


C = TypeVar("C", bound=Core)


def validated(core: C) -> C:
    """Make a core check its state after each event that it handles, and return it."""
    handle = core.handle

    def checked(*event: Any) -> Any:
        actions = handle(*event)
        core.validate_state()
        return actions

    vars(core)["handle"] = checked
    return core
