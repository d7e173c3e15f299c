"""Whose code runs here: ``--allow``, and the user's own configuration file.

What a run's configuration names to import is imported only where the person at this machine
gave that configuration, or allowed the module: see `fedmq.algorithms.allowed`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fedmq.algorithms.allowed import Allowed, is_module_name
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.process.exception_text import reason_of
from fedmq.nodes.run.toml import read_toml

allow_option = click.option(
    "--allow",
    "allow",
    metavar="MODULE",
    multiple=True,
    help="Let the run's configuration name classes and functions of this module, and of those "
    "below it; repeatable.",
)


def user_file() -> Path | None:
    """Return where the user's own configuration is: ``~/.config/fedmq/config.toml``.

    None if this user has no home, as in some containers.
    """
    base = os.environ.get("XDG_CONFIG_HOME", "")
    # As the XDG specification has it, a relative path is ignored.
    if Path(base).is_absolute():
        return Path(base) / "fedmq" / "config.toml"
    try:
        return Path.home() / ".config" / "fedmq" / "config.toml"
    except RuntimeError:
        return None


def allowed_here(options: Sequence[str]) -> Allowed:
    """Return what the person at this machine allows a configuration of another's to name.

    Args:
        options: modules, from ``--allow``.

    Raises:
        ConfigError: one of them is no module, or the user's file cannot be used.
    """
    for each in options:
        if not is_module_name(each):
            raise ConfigError(f"--allow: expected the name of a module, got {each!r}")
    file = user_file()
    return Allowed(modules=frozenset([*options, *(_allowed_in(file) if file else ())]))


def find_own_code(allowed: Allowed) -> None:
    """Look for what is allowed in the current folder, too, as Python does.

    Last, so that no folder of the user's hides a library; and not at all where nothing is
    allowed: the folder may be another's.
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
