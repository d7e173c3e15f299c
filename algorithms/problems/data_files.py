"""Reading data files, and fetching those that are not there yet."""

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
"""What reading a damaged file may raise."""
_OFFLINE = (*_BROKEN, http.client.HTTPException, tarfile.TarError, zipfile.BadZipFile)
"""What a failed download may raise."""

_TIMEOUT_S = 10.0
_IDX_TYPES: dict[int, np.dtype[Any]] = {0x08: np.dtype(np.uint8), 0x0C: np.dtype(">i4")}


def data_root() -> Path:
    """Return the folder that holds data sets: ``$FEDMQ_DATA``, or else ``~/.cache/fedmq``.

    Raises:
        DataError: it is not set, and this user has no home.
    """
    try:
        return Path(os.environ.get("FEDMQ_DATA") or "~/.cache/fedmq").expanduser()
    except RuntimeError:
        raise DataError(
            "expected a folder for data sets in FEDMQ_DATA, or a home folder: this user has none"
        ) from None


def read_npz(file: Path | Traversable, *keys: str) -> tuple[Array, ...]:
    """Return arrays of an npz archive; nothing in it is ever unpickled.

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
    """Tell whether the folder holds this idx file, unpacked or as ``.gz``."""
    return (folder / name).is_file() or (folder / f"{name}.gz").is_file()


def read_idx(folder: Path, name: str) -> Array:
    """Return the array in an idx file, the format of MNIST, unpacked or as ``.gz``.

    Reading ``.gz`` directly lets the data folder be read-only; torchvision would first
    unpack it there.

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
            raise ValueError("it does not begin like an idx file")
        shape = struct.unpack_from(f">{dimensions}I", data, 4)
        flat = np.frombuffer(data, _IDX_TYPES[kind], offset=4 + 4 * dimensions)
        return flat.reshape(shape)


@contextlib.contextmanager
def refusing_damage(path: object) -> Iterator[None]:
    """Turn what reading a damaged file raises into one sentence.

    Raises:
        DataError: instead of the original error.
    """
    try:
        yield
    except DataError:
        raise
    except (*_BROKEN, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} cannot be read ({_first_line(error)}): put a good copy in its place"
        ) from error


def download(name: str, root: Path, wanted: str, fetch: Callable[[], object]) -> None:
    """Run a torchvision download quietly, briefly, and in one process at a time.

    Args:
        name: the data set, for the error message.
        root: the data folder, made if need be.
        wanted: what the folder should hold, for the error message.
        fetch: downloads what is not there; it looks again once it has the folder to itself.

    Raises:
        DataError: there is no network, or the folder cannot be written.
    """
    timeout_s = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        # torchvision names no timeout of its own and draws progress bars on stderr.
        socket.setdefaulttimeout(_TIMEOUT_S)
        with _locked(root), contextlib.redirect_stderr(io.StringIO()):
            fetch()
    except _OFFLINE as error:
        raise DataError(
            f"data set {name!r} is not in {root} and cannot be downloaded "
            f"({_first_line(error)}): connect to the network, or set FEDMQ_DATA to a folder "
            f"that holds {wanted}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout_s)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    # The workers of one host all start at once and would write over each other's download.
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
