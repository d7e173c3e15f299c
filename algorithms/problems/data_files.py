"""Read data files, and download missing ones."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import os
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmq.algorithms.errors import DataError

Array = NDArray[Any]

_BROKEN = (OSError, EOFError, RuntimeError, ValueError, KeyError, struct.error, zlib.error)
"""Errors of reading a damaged file."""
_OFFLINE = (*_BROKEN, http.client.HTTPException, tarfile.TarError, zipfile.BadZipFile)
"""Errors of a failed download."""

_TIMEOUT_S = 10.0
_IDX_TYPES: dict[int, np.dtype[Any]] = {0x08: np.dtype(np.uint8), 0x0C: np.dtype(">i4")}


def data_root() -> Path:
    """Return the folder of data sets: ``$FEDMQ_DATA``, or else ``~/.cache/fedmq``.

    Raises:
        DataError: the variable is not set, and this user has no home folder.
    """
    try:
        return Path(os.environ.get("FEDMQ_DATA") or "~/.cache/fedmq").expanduser()
    except RuntimeError:
        raise DataError(
            "expected a folder for data sets in FEDMQ_DATA, because this user has no home folder"
        ) from None


def read_npz(file: Path | Traversable, *keys: str) -> tuple[Array, ...]:
    """Return arrays of an npz archive, without unpickling.

    Raises:
        DataError: the file is damaged or lacks one of the arrays.
    """
    with (
        refusing_damage(file),
        file.open("rb") as stream,
        np.load(stream, allow_pickle=False) as archive,
    ):
        return tuple(archive[key] for key in keys)


def has_idx(folder: Path, name: str) -> bool:
    """Return whether the folder holds this idx file, unpacked or as ``.gz``."""
    return (folder / name).is_file() or (folder / f"{name}.gz").is_file()


def read_idx(folder: Path, name: str) -> Array:
    """Return the array in an idx file, the format of MNIST, unpacked or as ``.gz``.

    Reading ``.gz`` directly works in a read-only data folder; torchvision would first unpack it.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / name
    if not path.is_file():
        path = folder / f"{name}.gz"
    with refusing_damage(path):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, dimensions = struct.unpack_from(">HBB", data)
        if zeros or kind not in _IDX_TYPES:
            raise ValueError("no idx header")
        shape = struct.unpack_from(f">{dimensions}I", data, 4)
        flat = np.frombuffer(data, _IDX_TYPES[kind], offset=4 + 4 * dimensions)
        return flat.reshape(shape)


@contextlib.contextmanager
def refusing_damage(path: object) -> Iterator[None]:
    """Convert errors of reading a damaged file to `DataError`.

    Raises:
        DataError: instead of the original error.
    """
    try:
        yield
    except DataError:
        raise
    except (*_BROKEN, zipfile.BadZipFile) as error:
        raise DataError(
            f"cannot read {path} ({_first_line(error)}): replace it with a good copy"
        ) from error


def download(name: str, root: Path, wanted: str, fetch: Callable[[], object]) -> None:
    """Run a torchvision download without output, with a timeout, in one process at a time.

    Args:
        name: data set, for the error message.
        root: data folder, created if missing.
        wanted: expected content of the folder, for the error message.
        fetch: downloads missing files; it is called with the folder locked and checks again.

    Raises:
        DataError: there is no network, or the folder cannot be written.
    """
    timeout_s = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        # torchvision sets no timeout and draws progress bars on stderr.
        socket.setdefaulttimeout(_TIMEOUT_S)
        with _locked(root), contextlib.redirect_stderr(io.StringIO()):
            fetch()
    except _OFFLINE as error:
        raise DataError(
            f"cannot find data set {name!r} in {root} or download it ({_first_line(error)}): "
            f"connect to the network, or set FEDMQ_DATA to a folder that holds {wanted}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout_s)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    # Workers of one host start together and would overwrite each other's download.
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    with (root / ".fedmq-download.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(":. ") if lines else type(error).__name__
