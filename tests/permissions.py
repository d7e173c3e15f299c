"""Which files and folders other users can read."""

import os
import stat
from pathlib import Path


def readable_by_others(folder: Path) -> list[str]:
    """The folder and what is in it that has permissions for other users than its owner."""
    paths = [folder]
    for at, folders, files in os.walk(folder):
        paths += [Path(at, name) for name in (*folders, *files)]
    modes = {path: path.lstat().st_mode for path in paths}
    return [
        f"{path} {stat.filemode(mode)}"
        for path, mode in modes.items()
        if mode & 0o077 and not stat.S_ISLNK(mode)
    ]
