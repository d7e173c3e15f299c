"""What a configuration may name to import, and the one place that imports it.

A configuration names problems and algorithms as ``module:attribute``. To import a module runs
its code, and to call what it holds runs more, so `resolve` imports only what is allowed:

- always: Problem and Algorithm classes that are defined in fedmq.algorithms; entry points of
  installed packages; and classes that are defined in torch.optim and torchvision.models, with
  arguments that are numbers or plain words;
- what `Allowed` holds: it is handed down from whoever knows who gave the configuration.

Whatever is not allowed is refused before anything is imported, parent packages included.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint

from fedmq.algorithms.errors import AlgorithmError, NotAllowed
from fedmq.codecs.extensions import entry_points

OWN = "fedmq.algorithms"
LIBRARIES = ("torch.optim", "torchvision.models")
"""Their classes compute, and touch no file and no network with numbers and words alone."""

_WORD = re.compile(r"[\w+-]{0,100}", re.ASCII)
_LONGEST = 200


@dataclass(frozen=True)
class Allowed:
    """What may be imported besides what always may.

    modules: modules, each with what is below it. Of them, one attribute may be named, which is
        a class or a function that is defined in one of these modules.
    names: what the person at this machine named, ``module:attribute`` to the letter; the
        attribute may be anything, such as ``Outer.inner``.
    """

    modules: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()


NOTHING = Allowed()
"""For configurations whose giver is not known: from the wire, or from a recorded run."""


def is_module_name(text: str) -> bool:
    """Tell whether a text can be the name of a module, such as ``package.module``."""
    parts = text.replace("-", "_").split(".")  # a file may be named my-problem.py
    return len(text) <= _LONGEST and all(part.isidentifier() for part in parts)


def installed(group: str, name: str) -> EntryPoint | None:
    """Return the entry point of an installed package by its name.

    Raises:
        AlgorithmError: several packages have one of this name.
    """
    found = [each for each in entry_points(group=group) if each.name == name]
    if len(found) > 1:
        values = ", ".join(each.value for each in found)
        raise AlgorithmError(f"several installed packages have a {name!r} in {group}: {values}")
    return found[0] if found else None


def resolve(
    name: str,
    allowed: Allowed,
    group: str,
    base: type,
    arguments: Mapping[str, object] | None = None,
) -> object:
    """Import what a configuration names, if that is allowed.

    Args:
        name: an entry point of ``group``, or ``module:attribute``.
        allowed: what is, besides what always is.
        group: of entry points.
        base: what a class of fedmq itself must be derived from.
        arguments: what the found object is to be called with.

    Raises:
        NotAllowed: it is not allowed; nothing was imported.
        AlgorithmError: it does not exist, or is none of the things that may be named.
    """
    if name in allowed.names:
        return _attribute(*_split(name))
    if ":" not in name:
        entry = installed(group, name)
        if entry is None:
            raise AlgorithmError(f"no installed package has a {name!r} in {group}")
        return _load(entry)
    module, attribute = _split(name)
    if is_below(module, allowed.modules):
        found = _attribute(module, _single(name, attribute))
        if inspect.isclass(found) or inspect.isfunction(found):
            return _defined(found, name, allowed.modules)
        raise AlgorithmError(
            f"expected a class or a function that is defined in {module!r}, "
            f"{name!r} is of type {type(found).__name__!r}"
        )
    if is_below(module, (OWN,)):
        found = _attribute(module, _single(name, attribute))
        if inspect.isclass(found) and issubclass(found, base) and not inspect.isabstract(found):
            return _defined(found, name, (OWN,))
        raise AlgorithmError(f"of fedmq itself, only a {base.__name__} can be named, not {name!r}")
    for entry in entry_points(group=group):
        if (entry.module, entry.attr) == (module, attribute):
            return _load(entry)
    if is_below(module, LIBRARIES):
        for key, value in (arguments or {}).items():
            _check_plain(key, value, name)
        found = _attribute(module, _single(name, attribute))
        if inspect.isclass(found):
            return _defined(found, name, LIBRARIES)
        raise AlgorithmError(f"of {module}, only classes can be named, not {name!r}")
    raise NotAllowed(name, module)


def is_below(module: str, roots: Iterable[str]) -> bool:
    """Tell whether a module is one of these, or below one of them."""
    return any(module == root or module.startswith(f"{root}.") for root in roots)


def _split(name: str) -> tuple[str, str]:
    module, _, attribute = name.partition(":")
    if not is_module_name(module) or not is_module_name(attribute):
        raise AlgorithmError(f"expected module:attribute, got {name!r:.{_LONGEST}}")
    return module, attribute


def _single(name: str, attribute: str) -> str:
    # What an attribute of a module holds, such as the modules that it imports, is not its own.
    if "." in attribute:
        raise AlgorithmError(f"expected module:attribute with one attribute, got {name!r}")
    return attribute


def _load(entry: EntryPoint) -> object:
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise AlgorithmError(f"cannot load entry point {entry.name!r}: {error}") from error


def _attribute(module: str, attribute: str) -> object:
    try:
        return operator.attrgetter(attribute)(importlib.import_module(module))
    except ImportError as error:
        raise AlgorithmError(
            f"cannot import {module!r} ({error}); is its folder on PYTHONPATH?"
        ) from error
    except AttributeError as error:
        raise AlgorithmError(f"{module}:{attribute} does not exist: {error}") from error


def _defined(found: object, name: str, roots: Iterable[str]) -> object:
    """Return what was found, if it is not merely imported there from elsewhere."""
    home = getattr(found, "__module__", None)
    if not isinstance(home, str) or not is_below(home, roots):
        raise AlgorithmError(
            f"{name!r} is not defined there but in {home!r:.{_LONGEST}}, which is not allowed"
        )
    return found


def _check_plain(key: str, value: object, name: str) -> None:
    """Refuse what could be a path or an address."""
    if isinstance(value, list | tuple):
        for each in value:
            _check_plain(key, each, name)
    elif isinstance(value, str):
        if not _WORD.fullmatch(value):
            raise AlgorithmError(
                f"{key}: expected a number or a word of letters, digits, '_', '+' and '-' for "
                f"{name}, got {value!r:.{_LONGEST}}"
            )
    elif value is not None and not isinstance(value, int | float):
        raise AlgorithmError(
            f"{key}: expected a number or a word for {name}, got a {type(value).__name__}"
        )
