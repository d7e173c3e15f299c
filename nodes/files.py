"""Writing what a run leaves in its folder: an error is a sentence with the file's name."""

from __future__ import annotations

from pathlib import Path

from fedmq.nodes.errors import StorageError


def write_text(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        StorageError: the operating system refused.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None


def remove(path: Path) -> None:
    """Remove a file, if it is there.

    Raises:
        StorageError: the operating system refused.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot remove {path}: {error.strerror}") from None
