"""Which code may run here: ``--allow`` and the user's configuration file.

A module that a run's configuration names is imported only if this user wrote the configuration or
allowed the module, see `fedmq.algorithms.allowed`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmq.algorithms.allowed import Allowed, is_module_name
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.process.exception_text import reason_of
from fedmq.nodes.process.user_folder import user_folder
from fedmq.nodes.run.toml import read_toml


def user_file() -> Path | None:
    """Return the path of the user's configuration; None if the user has no home."""
    folder = user_folder()
    return None if folder is None else folder / "config.toml"


def allowed_here(options: Sequence[str]) -> Allowed:
    """Return the code that this user allows configurations of others to name.

    Args:
        options: modules, from ``--allow``.

    Raises:
        ConfigError: an option is not the name of a module, or the user's file is invalid.
    """
    for each in options:
        if not is_module_name(each):
            raise ConfigError(f"--allow: expected the name of a module, got {each!r}")
    file = user_file()
    return Allowed(modules=frozenset([*options, *(_allowed_in(file) if file else ())]))


def find_own_code(allowed: Allowed) -> None:
    """Add the current folder to the end of Python's search path, if any code is allowed.

    At the end, so that no file in it hides a library. Only if code is allowed, because somebody
    else may have written the folder.
    """
    if allowed.modules or allowed.names:
        sys.path.append(str(Path.cwd()))


def _allowed_in(file: Path) -> list[str]:
    try:
        content = read_toml(file)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {reason_of(error)}") from None
    for key in content:
        if key != "allow":
            raise ConfigError(f"{file}: unknown key {key!r}; choose from allow")
    modules: Any = content.get("allow", [])
    if not isinstance(modules, list):
        raise ConfigError(f"{file}: allow: expected a list of modules, got {modules!r:.200}")
    for each in modules:
        if not isinstance(each, str) or not is_module_name(each):
            raise ConfigError(f"{file}: allow: expected names of modules, got {each!r:.200}")
    return modules
