"""Import the code that a configuration names, if it is allowed.

A configuration names problems and algorithms as ``module:attribute``. Importing a module runs
its code, and calling what it defines runs more, so `resolve` imports only:

- always: Problem and Algorithm classes that are defined in fedmq.algorithms; entry points of
  installed packages; and classes that are defined in torch.optim and torchvision.models, with
  arguments that are numbers or plain words;
- what an `Allowed` lists. The caller knows who wrote the configuration and passes it.

Anything else is refused before a module is imported, parent packages included.
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
_PERSONAL = "fedmq.algorithms.personal"
MOVED = {
    "fedmq.algorithms.fedper": f"{_PERSONAL}.fedper",
    "fedmq.algorithms.fedrep": f"{_PERSONAL}.fedrep",
    "fedmq.algorithms.finetune": f"{_PERSONAL}.fedavg_finetune",
    "fedmq.algorithms.perfedavg": f"{_PERSONAL}.perfedavg",
    "fedmq.algorithms.reptile": f"{_PERSONAL}.personalised_fedavg",
    "fedmq.algorithms.codistillation": "fedmq.algorithms.distillation.codistillation",
    "fedmq.algorithms.distillation": "fedmq.algorithms.distillation.fd",
    "fedmq.algorithms.faug": "fedmq.algorithms.faug.algorithm",
    "fedmq.algorithms.feddropout": "fedmq.algorithms.feddropout.algorithm",
    "fedmq.algorithms.fedgkt": "fedmq.algorithms.fedgkt.algorithm",
    "fedmq.algorithms.mocha": "fedmq.algorithms.mocha.algorithm",
    "fedmq.algorithms.pfedhn": "fedmq.algorithms.pfedhn.algorithm",
    "fedmq.algorithms.problems.natural": "fedmq.algorithms.problems.federated_datasets",
}
"""Modules of 0.1.0 that runs may name, and where their classes are now: ledgers stay readable."""

LIBRARIES = ("torch.optim", "torchvision.models")
"""With numbers and words as arguments, their classes touch no file and no network."""

_WORD = re.compile(r"[\w+-]{0,100}", re.ASCII)
_LONGEST = 200


@dataclass(frozen=True)
class Allowed:
    """Code that may be imported, besides that which always may.

    modules: modules and all below them. A configuration may name a class or a function that is
        defined in one of them.
    names: exact names, ``module:attribute``, given by the person at this machine; the
        attribute may be any object, such as ``Outer.inner``.
    """

    modules: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()


NOTHING = Allowed()
"""For configurations of unknown origin: from the wire, or from a recorded run."""


def is_module_name(text: str) -> bool:
    """Return whether a text can be the name of a module, such as ``package.module``."""
    parts = text.replace("-", "_").split(".")  # a file may be named my-problem.py
    return len(text) <= _LONGEST and all(part.isidentifier() for part in parts)


def installed(group: str, name: str) -> EntryPoint | None:
    """Return the entry point of an installed package by its name.

    Raises:
        AlgorithmError: several packages register this name.
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
    """Import and return the object that a configuration names, if that is allowed.

    Args:
        name: an entry point of ``group``, or ``module:attribute``.
        allowed: code that may be imported.
        group: group of entry points.
        base: base class that a class of fedmq itself must have.
        arguments: arguments that the object will be called with.

    Raises:
        NotAllowed: the name is not allowed; nothing was imported.
        AlgorithmError: the object does not exist, or is of a kind that may not be named.
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
        module = MOVED.get(module, module)
        found = _attribute(module, _single(name, attribute))
        if inspect.isclass(found) and issubclass(found, base) and not inspect.isabstract(found):
            return _defined(found, name, (OWN,))
        raise AlgorithmError(f"expected a {base.__name__} of fedmq itself, got {name!r}")
    for entry in entry_points(group=group):
        if (entry.module, entry.attr) == (module, attribute):
            return _load(entry)
    if is_below(module, LIBRARIES):
        for key, value in (arguments or {}).items():
            _check_plain(key, value, name)
        found = _attribute(module, _single(name, attribute))
        if inspect.isclass(found):
            return _defined(found, name, LIBRARIES)
        raise AlgorithmError(f"expected a class of {module}, got {name!r}")
    raise NotAllowed(name, module)


def is_below(module: str, roots: Iterable[str]) -> bool:
    """Return whether a module is one of these or below one of them."""
    return any(module == root or module.startswith(f"{root}.") for root in roots)


def _split(name: str) -> tuple[str, str]:
    module, _, attribute = name.partition(":")
    if not is_module_name(module) or not is_module_name(attribute):
        raise AlgorithmError(f"expected module:attribute, got {name!r:.{_LONGEST}}")
    return module, attribute


def _single(name: str, attribute: str) -> str:
    # An attribute of an attribute, such as a module that the module imports, is defined elsewhere.
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
    """Return an object if it is defined in the module that was named, not merely imported there."""
    home = getattr(found, "__module__", None)
    if not isinstance(home, str) or not is_below(home, roots):
        raise AlgorithmError(f"{name!r} is defined in {home!r:.{_LONGEST}}, which is not allowed")
    return found


def _check_plain(key: str, value: object, name: str) -> None:
    """Refuse an argument that could be a path or an address."""
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
