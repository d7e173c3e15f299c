"""Short texts of values and names for error messages."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping


def shorten(value: object) -> str:
    """Return a short text of a value from a message, whatever its size and depth."""
    return reprlib.repr(value)


def unknown(what: str, name: str, choices: Mapping[str, object]) -> str:
    """Return the sentence for an unknown name: what stood there, a guess, the choices."""
    close = difflib.get_close_matches(name, choices, n=1)
    guess = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown {what} {name!r}{guess}; choose from {', '.join(sorted(choices))}"
