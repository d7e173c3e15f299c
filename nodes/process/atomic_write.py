"""Atomic replacement of files: a reader finds the old file or the new one, never a part."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fedmq.broker.file_modes import open_private


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file; at the end of the block, rename it to ``path``, and sync both.

    The file is empty, and its owner's alone. An error before the renaming leaves the old file
    unchanged.

    Raises:
        OSError: the new file cannot be opened, synced or renamed.
    """
    fresh = path.with_name(f"{path.name}.new")
    try:
        fresh.unlink(missing_ok=True)  # of a process that was killed
        open_private(fresh, "xb").close()
        yield fresh
        with fresh.open("rb+") as file:
            os.fsync(file.fileno())
        fresh.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise
