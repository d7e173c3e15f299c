"""Cores that check their state after each event, for simulations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar


class Core(Protocol):
    """A core; ``handle(event, ...)`` returns actions."""

    @property
    def handle(self) -> Callable[..., Any]:
        """Handle one event; return the actions to carry out."""
        ...

    def validate_state(self) -> None:
        """Raise AssertionError if the state contradicts itself."""
        ...


C = TypeVar("C", bound=Core)


def validated(core: C) -> C:
    """Make a core check its state after each event; return it.

    Raises:
        AssertionError: from ``handle``, if the state contradicts itself.
    """
    handle = core.handle

    @functools.wraps(handle)
    def checked(*event: Any) -> Any:
        actions = handle(*event)
        core.validate_state()
        return actions

    vars(core)["handle"] = checked  # of this instance only
    return core
