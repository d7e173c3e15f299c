"""Parts of error messages."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping


def shorten(value: object) -> str:
    """Return a text of bounded length for a value of any size and depth."""
    return reprlib.repr(value)


def unknown(what: str, name: str, choices: Mapping[str, object]) -> str:
    """Return the message for an unknown name: the name, a similar choice, all choices."""
    close = difflib.get_close_matches(name, choices, n=1)
    guess = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown {what} {name!r}{guess}; choose from {', '.join(sorted(choices))}"
