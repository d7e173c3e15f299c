"""What an exception says, fit for a log, a message and a terminal.

The text of an exception is a user's, or a library's about a user's data: it may be of any length
and hold any value. What leaves the process is one line of bounded length, in which printed
tensors and lists of numbers are elided.
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
"""Of a text, before it is shortened: a printed tensor may have millions of characters."""
_MAX_INTEGERS = 8
"""In a list: more are data, fewer are a shape."""

_PRINTED = re.compile(r"\b(tensor|array|Parameter|Tensor|ndarray)\(\s*\[")
_LIST = re.compile(r"\[[^\[\]]*\]")
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d[\d_]*\.?\d*(?:e[-+]?\d+)?|\.\d+|nan|inf)(?![\w])", re.I)
_NESTED = re.compile(r"\[\s*(?:\[\.\.\.\][\s,]*|\.\.\.[\s,]*)+\]")
_PASSING = frozenset(
    getattr(errno, name)
    for name in ("EAGAIN", "EINTR", "EIO", "EMFILE", "ENFILE", "ENOMEM", "ENOSPC", "ESTALE")
)
_STDLIB = sysconfig.get_path("stdlib")


def clip_text(text: str, longest: int = MAX_TEXT) -> str:
    """Return a text as one line of bounded length, without the values of tensors and lists.

    It can be sent: a file's name in an error need not be UTF-8.
    """
    known = text[:_MAX_READ].encode(errors="backslashreplace").decode()
    line = " ".join(without_values(known).split())
    return line if len(line) <= longest else line[: longest - 3] + "..."


def without_values(text: str) -> str:
    """Return a text in which printed tensors, arrays and lists of numbers are elided.

    Short lists of whole numbers stay: they are shapes.
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
    """Return an exception's type and what it says, as `shorten` does."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - a user's own exception; its type is still known
        text = ""
    name = type(error).__name__
    return clip_text(f"{name}: {text}" if text else name, longest)


def place_in(error: BaseException, own: Collection[str] = ()) -> str:
    """Return file and line of the innermost frame of a user's own code.

    Where there is none, the layer of a model that raised it; "" if it was no layer.

    Args:
        error: as it was caught.
        own: top-level modules of the user's, wherever they are installed.
    """
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        path = frame.f_code.co_filename
        if _is_own(path, str(frame.f_globals.get("__name__", "")), own):
            found = f"{_short(path)}:{line}"
    return found or _layer_in(error)


def explained(error: BaseException, own: Collection[str] = ()) -> str:
    """Return what an exception says, and where in the user's own code it was raised."""
    place = place_in(error, own)
    return f"{described(error)} ({place})" if place else described(error)


def modules_of(*objects: object) -> frozenset[str]:
    """Return the top-level modules of these objects' classes that are not this package's."""
    named = {type(each).__module__.partition(".")[0] for each in objects}
    return frozenset(named - {"fedmq", "builtins"})


def may_pass(error: BaseException) -> bool:
    """Tell whether an error may be gone after a restart: memory, files, networks."""
    if isinstance(error, OSError):
        passing = isinstance(error, ConnectionError | TimeoutError)
        return passing or error.errno in _PASSING
    # torch's is a RuntimeError, and not everyone who asks has imported torch.
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _layer_in(error: BaseException) -> str:
    """Return the innermost of torch's own layers that was at work, with its name in the model."""
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
    """Return the place after the bracket that closes the one before ``at``."""
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
    """Return a file as it is imported: from the folder in which Python found it."""
    parents = [each for each in sys.path if each and path.startswith(each.rstrip("/") + "/")]
    shown = path[len(max(parents, key=len).rstrip("/")) + 1 :] if parents else path
    shown = shown if parents else "/".join(Path(path).parts[-2:])
    return shown if len(shown) <= _MAX_PLACE else "..." + shown[3 - _MAX_PLACE :]
