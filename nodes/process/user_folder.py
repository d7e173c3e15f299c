"""The user's folder of configuration and keys, ``~/.config/fedmq``."""

from __future__ import annotations

import os
from pathlib import Path


def user_folder() -> Path | None:
    """Return ``$XDG_CONFIG_HOME/fedmq``, by default ``~/.config/fedmq``; it may not exist yet.

    None if the user has no home, as in some containers.
    """
    base = os.environ.get("XDG_CONFIG_HOME", "")
    # The XDG specification requires that relative paths are ignored.
    if Path(base).is_absolute():
        return Path(base) / "fedmq"
    try:
        return Path.home() / ".config" / "fedmq"
    except RuntimeError:
        return None
