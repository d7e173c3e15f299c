"""Text of exceptions for logs, messages and terminals.

An exception's text comes from a user, or from a library that handled the user's data: it can have
any length and contain data. What leaves the process is one line of bounded length, in which
printed tensors and lists of numbers are elided.
"""

from __future__ import annotations

import errno
import re
import sys
import sysconfig
import traceback
from collections.abc import Collection
from pathlib import Path

MAX_TEXT = 500
"""Characters of one text in a log line or message."""
_MAX_PLACE = 120
_MAX_READ = 20_000
"""Characters of a text that are read: a printed tensor can have millions."""
_MAX_INTEGERS = 8
"""A longer list of integers is data; a shorter one is a shape."""

_PRINTED = re.compile(r"\b(tensor|array|Parameter|Tensor|ndarray)\(\s*\[")
_LIST = re.compile(r"\[[^\[\]]*\]")
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d[\d_]*\.?\d*(?:e[-+]?\d+)?|\.\d+|nan|inf)(?![\w])", re.I)
_NESTED = re.compile(r"\[\s*(?:\[\.\.\.\][\s,]*|\.\.\.[\s,]*)+\]")
_TRANSIENT = frozenset(
    getattr(errno, name)
    for name in ("EAGAIN", "EINTR", "EIO", "EMFILE", "ENFILE", "ENOMEM", "ENOSPC", "ESTALE")
)
_STDLIB = sysconfig.get_path("stdlib")


class RemoteTraceback(Exception):
    """The traceback of an exception in another process, as the cause of the exception here.

    Its text is what `fedmq.nodes.process.logs.traceback_text` returned there.
    """


def clip_text(text: str, longest: int = MAX_TEXT) -> str:
    """Return a text as one line of bounded length, without the values of tensors and lists.

    The line is valid UTF-8, even if the text contains a file name that is not.
    """
    head = text[:_MAX_READ].encode(errors="backslashreplace").decode()
    line = " ".join(without_values(head).split())
    return line if len(line) <= longest else line[: longest - 3] + "..."


def without_values(text: str) -> str:
    """Elide printed tensors, arrays and lists of numbers in a text.

    Short lists of integers stay: they are shapes.
    """
    out, at = [], 0
    while found := _PRINTED.search(text, at):
        out.append(text[at : found.start()] + f"{found[1]}(...)")
        at = _closing(text, found.end(1) + 1)
    text = "".join([*out, text[at:]])
    text = _LIST.sub(_elided, text)
    while (nested := _NESTED.sub("[...]", text)) != text:
        text = nested
    return text


def described(error: BaseException, longest: int = MAX_TEXT) -> str:
    """Return an exception's type and text, clipped by `clip_text`."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - `__str__` of a user's exception can raise anything
        text = ""
    name = type(error).__name__
    return clip_text(f"{name}: {text}" if text else name, longest)


def place_in(error: BaseException, own: Collection[str] = ()) -> str:
    """Return the file and line of the innermost frame in a user's code.

    Without such a frame, return the layer of the model that raised the error, or "".

    Args:
        error: a caught exception, with its traceback.
        own: names of the user's top-level modules, wherever they are installed.
    """
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        path = frame.f_code.co_filename
        if _is_own(path, str(frame.f_globals.get("__name__", "")), own):
            found = f"{_short(path)}:{line}"
    return found or _layer_in(error)


def explained(error: BaseException, own: Collection[str] = ()) -> str:
    """Return an exception's type and text, and where in the user's code it was raised."""
    place = place_in(error, own)
    return f"{described(error)} ({place})" if place else described(error)


def modules_of(*objects: object) -> frozenset[str]:
    """Return the top-level modules of the objects' classes, without fedmq's."""
    named = {type(each).__module__.partition(".")[0] for each in objects}
    return frozenset(named - {"fedmq", "builtins"})


def may_pass(error: BaseException) -> bool:
    """Return whether a restart may cure an error: out of memory, files, networks."""
    if isinstance(error, OSError):
        return isinstance(error, ConnectionError | TimeoutError) or error.errno in _TRANSIENT
    # torch's OutOfMemoryError, by name: some callers run without torch.
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def reason_of(error: OSError) -> str:
    """Return the reason of a system error in lower case, such as "no space left on device"."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def _layer_in(error: BaseException) -> str:
    """Return the innermost running layer, if it is one of torch's, with its name in the model."""
    torch = sys.modules.get("torch")
    selves = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [each for each in selves if torch and isinstance(each, torch.nn.Module)]
    if not modules or not type(modules[-1]).__module__.startswith("torch."):
        return ""
    model, layer = modules[0], modules[-1]
    name = next((name for name, each in model.named_modules() if each is layer), "")
    what = type(layer).__name__ if any(layer.children()) else str(layer)
    return clip_text(f"layer {name!r}, {what}" if name else what, _MAX_PLACE)


def _closing(text: str, at: int) -> int:
    """Return the index after the bracket that closes the one before ``at``."""
    depth = 1
    while at < len(text) and depth:
        depth += (text[at] in "([{") - (text[at] in ")]}")
        at += 1
    return at


def _elided(match: re.Match[str]) -> str:
    numbers = _NUMBER.findall(match[0])
    whole = all(each.lstrip("+-").isdigit() for each in numbers)
    few = len(numbers) <= (_MAX_INTEGERS if whole else 1)
    return match[0] if few else "[...]"


def _is_own(path: str, module: str, own: Collection[str]) -> bool:
    top = module.partition(".")[0]
    if top == "fedmq" or not path.endswith(".py"):
        return False
    if top in own:
        return True
    parts = Path(path).parts
    installed = "site-packages" in parts or "dist-packages" in parts
    return not installed and not path.startswith(_STDLIB) and not path.startswith("<")


def _short(path: str) -> str:
    """Return a file's path relative to the folder that Python imported it from."""
    parents = [each for each in sys.path if each and path.startswith(each.rstrip("/") + "/")]
    shown = path[len(max(parents, key=len).rstrip("/")) + 1 :] if parents else path
    shown = shown if parents else "/".join(Path(path).parts[-2:])
    return shown if len(shown) <= _MAX_PLACE else "..." + shown[3 - _MAX_PLACE :]
