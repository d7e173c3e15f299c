"""Find the entry points of installed packages."""

from __future__ import annotations

import functools
import sys
from importlib.metadata import EntryPoint, distributions
from pathlib import Path


def entry_points(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group in installed packages.

    Package metadata in the current folder are ignored, even if the folder is on Python's path:
    changing into a folder does not install its contents.
    """
    return _entry_points(group, tuple(each for each in sys.path if _is_elsewhere(each)))


@functools.lru_cache(maxsize=16)
def _entry_points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for each in distributions(path=list(path)):
        # If two distributions have the same name, Python imports the first.
        names = each.metadata.get_all("Name") or [""]
        found.setdefault(names[0], tuple(each.entry_points.select(group=group)))
    return tuple(entry for entries in found.values() for entry in entries)


def _is_elsewhere(folder: str) -> bool:
    try:
        return not Path(folder).samefile(Path())  # "" is also the current folder
    except OSError:
        return False  # a missing folder has no packages
