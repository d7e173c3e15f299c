"""Specs: ``name(value, key=value) | name | ...``.

Such a string names a codec, staleness function, partition or slowdown distribution in
configuration files and wire headers.
"""

from __future__ import annotations

import ast
import inspect
import keyword
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from fedmq.codecs.errors import SpecError
from fedmq.codecs.text import unknown

Value = int | float | str | bool | None
T = TypeVar("T")

# Quoted strings with their escapes are one part: they can contain bars.
_PIECE = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\||[^|'"]+|['"]""", re.DOTALL)
_CALL = re.compile(r"\s*([A-Za-z_][\w-]*)\s*(?:\((.*)\))?\s*", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """One ``name(args, key=value)``; a bare word such as ``float16`` is a string value."""

    name: str
    args: tuple[Value, ...] = ()
    kwargs: Mapping[str, Value] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the canonical text, which parses back to an equal call."""
        parts = [_text(a) for a in self.args]
        parts += [f"{k}={_text(v)}" for k, v in self.kwargs.items()]
        return f"{self.name}({', '.join(parts)})" if parts else self.name


_MAX_BITS = 4096


def parse(text: str) -> list[Call]:
    """Read a pipeline of calls.

    Raises:
        SpecError: the text is not of the form ``name(value, key=value) | ...``.
    """
    return [_parse_call(part, text) for part in split(text)]


def split(text: str) -> list[str]:
    """Split a text at its bars, except those in quoted strings."""
    parts = [""]
    for piece in _PIECE.findall(text):
        if piece == "|":
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def parse_one(text: str) -> Call:
    """Read exactly one call.

    Raises:
        SpecError: the text is malformed or has several calls.
    """
    calls = parse(text)
    if len(calls) != 1:
        raise SpecError(f"expected one name(...), got {len(calls)} joined by '|': {text!r}")
    return calls[0]


def build(text: str, choices: Mapping[str, Callable[..., T]], what: str) -> T:
    """Call the factory named by a spec, with the spec's arguments.

    Args:
        text: for example ``"dirichlet(0.5)"``.
        choices: factories by name.
        what: the noun for error messages, for example ``"partition"``.

    Raises:
        SpecError: unknown name, unknown or missing parameter, or a value out of range.
    """
    return build_call(parse_one(text), choices, what)


def build_call(call: Call, choices: Mapping[str, Callable[..., T]], what: str) -> T:
    """Do the same as `build` for a parsed call."""
    if call.name not in choices:
        raise SpecError(unknown(what, call.name, choices))
    factory = choices[call.name]
    signature = inspect.signature(factory)
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        wanted = f"{call.name}({', '.join(signature.parameters)})"
        raise SpecError(f"{what} {str(call)!r}: {error}; expected {wanted}") from None
    try:
        return factory(*call.args, **call.kwargs)
    except SpecError:
        raise
    except (TypeError, ValueError) as error:
        raise SpecError(f"{what} {str(call)!r}: {error}") from None


def _parse_call(part: str, text: str) -> Call:
    match = _CALL.fullmatch(part)
    if not match:
        where = "" if part.strip() == text.strip() else f" in {text!r}"
        raise SpecError(f"expected name(value, key=value), got {part.strip()!r}{where}")
    name, inside = match.groups()
    if inside is None or not inside.strip():
        return Call(name)
    # Python's own grammar reads the arguments; only literals and bare words are accepted.
    try:
        tree = ast.parse(f"f({inside})", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise SpecError(f"cannot read the arguments of {part.strip()!r} in {text!r}") from None
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
        raise SpecError(f"cannot read the arguments of {part.strip()!r} in {text!r}")
    kwargs = {}
    for each in tree.keywords:
        if each.arg is None:
            raise SpecError(f"expected key=value arguments, got '**' in {part.strip()!r}")
        if each.arg in kwargs:
            raise SpecError(f"{each.arg!r} is set twice in {part.strip()!r}")
        kwargs[each.arg] = _value(each.value, part)
    return Call(name, tuple(_value(a, part) for a in tree.args), kwargs)


def _value(node: ast.expr, part: str) -> Value:
    if isinstance(node, ast.Name):
        return node.id
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, node = -1, node.operand
    if isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, int | float) and not isinstance(value, bool):
            if isinstance(value, int) and value.bit_length() > _MAX_BITS:
                raise SpecError(f"expected numbers of at most {_MAX_BITS} bits")
            return sign * value
        if sign == 1 and (value is None or isinstance(value, bool | str)):
            return value
    raise SpecError(f"expected numbers, words, true or false as arguments of {part.strip()!r}")


def _text(value: Value) -> str:
    bare = isinstance(value, str) and value.isascii() and value.isidentifier()
    if isinstance(value, str) and (not bare or keyword.iskeyword(value)):
        return repr(value)
    if isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"  # the word inf would be read as a string
    return str(value)
