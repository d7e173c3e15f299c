"""Text for a terminal or a pipe: escaped, aligned, wrapped rather than cut.

Names, reasons and bodies come from other nodes: characters that are not printable, such as
controls of the terminal and of the writing direction, are shown as escapes.
"""

from __future__ import annotations

import difflib
import math
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

WIDTH = 80
"""Columns that every table and sentence fits into."""
_LONGEST = 300
_ESCAPE = re.compile(r"[^ -~]")


def plain(value: object, longest: int = _LONGEST) -> str:
    """Return a value as one line, with control characters escaped."""
    text = str(value)
    if len(text) > longest:
        text = text[: longest - 3] + "..."
    return escaped(text)


def escaped(text: str) -> str:
    """Return a text with its control characters escaped."""
    return text if text.isascii() and text.isprintable() else _ESCAPE.sub(_escaped, text)


def word(value: object) -> str:
    """Return a value as one word, with spaces escaped, so that it fills one column."""
    return plain(value).replace(" ", "\\x20")


def literal(value: object, longest: int = _LONGEST) -> str:
    """Return a value from a message as a Python literal, in one line."""
    if isinstance(value, bytes):
        shown = value[: longest // 2].hex()
        return f"{len(value)} bytes {shown}{'...' if len(value) > longest // 2 else ''}"
    return plain(repr(value), longest)


def count(number: int) -> str:
    """Return an integer with thousands separators."""
    return f"{number:,}"


def seconds(value: float) -> str:
    """Return a time in seconds with three decimals."""
    return f"{value:.3f}"


def duration(value: float) -> str:
    """Return a time in its two largest units: ``12.3 s``, ``2 min 5 s``, ``3 d 4 h``."""
    if value < 60:
        return f"{value:.1f} s"
    whole = round(value)
    for size, unit, smaller, its_unit in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {its_unit}"
    return f"{whole // 60} min {whole % 60} s"


def plural(number: int, noun: str) -> str:
    """Return a number and its noun, in the plural unless the number is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size_text(nbytes: float | None) -> str:
    """Return a size with its unit, such as ``65.9 MB``; "-" for None."""
    if nbytes is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, width: int = WIDTH
) -> list[str]:
    """Return the lines of a table; the first ``left`` columns align left, the others right.

    If the table is wider than ``width``, the longest cells of the first column get lines of their
    own.
    """
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    others = sum(widths[1:]) + 2 * (len(widths) - 1)
    if widths[0] + others > width:
        widths[0] = max(len(head[0]), min(widths[0], width - others))
    found: list[str] = []
    for line in lines:
        if len(line[0]) > widths[0]:
            found.append(line[0])
            line = ("", *line[1:])
        cells = (
            cell.ljust(size) if index < left else cell.rjust(size)
            for index, (cell, size) in enumerate(zip(line, widths, strict=True))
        )
        found.append("  ".join(cells).rstrip())
    return found


def fitted(text: str, indent: str = "  ", width: int = WIDTH) -> list[str]:
    """Wrap a sentence to lines of at most ``width`` columns; words are not broken."""
    return textwrap.wrap(
        text,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def guess(name: str, choices: Collection[str]) -> str:
    """Return `` (did you mean 'x'?)`` with the nearest choice; empty if none is near."""
    close = difflib.get_close_matches(name, choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def renaming_notice(old: str, new: str) -> str:
    """Return the line on an option or a key whose old name was used."""
    return f"fedmq: {old} is now {new}; the old name works in this release only"


def spans(numbers: Iterable[int]) -> str:
    """Return ascending numbers with ranges joined: ``3-5 9``."""
    return " ".join(map(_span, _joined(numbers)))


def clients_in_words(clients: Iterable[int], longest: int = _LONGEST) -> str:
    """Return the clients, in ascending order, as text: ``clients 3, 7-9``."""
    return ranges_in_words(_joined(clients), longest)


def ranges_in_words(ranges: Sequence[tuple[int, int]], longest: int = _LONGEST) -> str:
    """Return ranges of clients, with both ends, as text: ``clients 3, 7-9``."""
    text = ", ".join(map(_span, ranges[: longest + 1]))  # each takes a character or more
    one = len(ranges) == 1 and ranges[0][0] == ranges[0][1]
    return f"client{'' if one else 's'} {plain(text, longest)}"


def _joined(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return the ranges of ascending numbers, both ends included."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return found


def _span(ends: tuple[int, int]) -> str:
    low, high = ends
    return f"{low}" if low == high else f"{low}-{high}"


def fields(value: Mapping[Any, Any], name: str = "") -> list[tuple[str, str]]:
    """Return the leaves of a map from a message as (path, value).

    In a map with integer keys, such as client numbers, keys with equal values share a line.
    """
    found: list[tuple[str, str]] = []
    if len(value) > 1 and all(type(key) is int for key in value):
        shown = {key: literal(each) for key, each in value.items()}
        for one in dict.fromkeys(shown.values()):
            numbers = [key for key, each in shown.items() if each == one]
            found.append((f"{name}[{spans(numbers)}]", one))
        return found
    for key, each in value.items():
        path = f"{name}.{plain(key)}" if name else plain(key)
        if isinstance(each, Mapping) and each:
            found += fields(each, path)
        elif isinstance(each, str) and "\n" in each:
            found += [(path if not n else "", plain(line)) for n, line in enumerate(_lines(each))]
        else:
            found.append((path, literal(each)))
    return found


def pairs(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Return aligned, indented lines of names and values."""
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name.ljust(width)}  {value}".rstrip() for name, value in rows]


def figure(value: float) -> str:
    """Return a measured value with six significant digits."""
    return f"{value:.6g}" if math.isfinite(value) else str(value)


def _lines(text: str) -> list[str]:
    return text.strip("\n").split("\n")


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    return character if character.isprintable() else character.encode("unicode_escape").decode()
