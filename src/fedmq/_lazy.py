"""Public names that are imported on first use.

The package and each of its rooms export names from many modules. Importing these at once would
load torch and ZeroMQ into commands that need neither.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from sys import modules


def lazily(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` for a package.

    A package uses them where type checkers do not look, ``if not TYPE_CHECKING``: a visible
    ``__getattr__`` makes them accept any name.

    Args:
        package: its ``__name__``.
        homes: public names by their module, separated by spaces.
    """
    home = {name: module for module, names in homes.items() for name in names.split()}

    def getattr_(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(home[name]), name)
        setattr(modules[package], name, value)
        return value

    def dir_() -> list[str]:
        return sorted({*vars(modules[package]), *home})

    return getattr_, dir_
