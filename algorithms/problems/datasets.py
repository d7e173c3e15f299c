"""Labelled images as uint8 arrays, from local or downloaded files."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmq.algorithms.errors import DataError, ProblemError
from fedmq.algorithms.problems.data_files import (
    Array,
    data_root,
    download,
    has_idx,
    read_idx,
    read_npz,
    refusing_damage,
)
from fedmq.codecs.text import unknown

Arrays = tuple[Array, Array, Array, Array]
"""x_train, y_train, x_test, y_test; images as [n, H, W] or [n, C, H, W]."""

_KEYS = ("x_train", "y_train", "x_test", "y_test")
_IDX_ENDS = ("images-idx3-ubyte", "labels-idx1-ubyte")


@dataclass(frozen=True)
class Source:
    """Metadata of a data set, and the functions that read it."""

    about: str
    """One-line description."""
    shape: tuple[int, int, int]
    """Channels, height and width."""
    classes: int
    examples: int
    """Number of training examples."""
    mean: tuple[float, ...]
    """Mean of each channel of the training images, of pixels in 0 to 1."""
    std: tuple[float, ...]
    model: str
    """Default model of a problem on these data."""
    read: Callable[[Path], Arrays]
    """Reads it from a data folder; raises DataError."""
    read_writers: Callable[[Path], Array | None] | None = None
    """Reads the writer of each training example, if known."""


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set in memory; its arrays are shared and read-only.

    x_*: uint8 [n, C, H, W]; y_*: int64 [n]; writers: int64 [n] of the training examples.
    """

    name: str
    x_train: NDArray[np.uint8]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.int64]
    writers: NDArray[np.int64] | None
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, images: NDArray[np.uint8]) -> Tensor:
        """Return images as float32 of zero mean and unit variance per channel."""
        x = torch.tensor(images, dtype=torch.float32).div_(255)
        per_channel = (1, -1, 1, 1)
        return x.sub_(torch.tensor(self.mean).view(per_channel)).div_(
            torch.tensor(self.std).view(per_channel)
        )


def load_dataset(name: str, root: Path | None = None) -> DataSet:
    """Return a data set by name, read once per process.

    Args:
        name: a key of `DATASETS`.
        root: data folder; by default ``$FEDMQ_DATA`` or ``~/.cache/fedmq``.

    Raises:
        ProblemError: there is no data set of this name.
        DataError: its files are missing and cannot be downloaded, or are damaged.
    """
    if name not in DATASETS:
        raise ProblemError(unknown("data set", name, DATASETS))
    if root is None:
        # An embedded data set needs no folder, and so no home folder either.
        root = Path() if DATASETS[name].read is _read_embedded else data_root()
    return _load(name, root)


@functools.cache
def _load(name: str, root: Path) -> DataSet:
    source = DATASETS[name]
    x_train, y_train, x_test, y_test = source.read(root)
    writers = source.read_writers(root) if source.read_writers else None
    if writers is not None and writers.shape != (len(x_train),):
        raise DataError(
            f"data set {name!r} in {root}: expected the writers of {len(x_train)} training "
            f"examples, got an array of shape {writers.shape}"
        )
    return DataSet(
        name,
        *_checked(name, root, x_train, y_train),
        *_checked(name, root, x_test, y_test),
        writers=None if writers is None else _frozen(writers.astype(np.int64)),
        classes=source.classes,
        mean=source.mean,
        std=source.std,
    )


def _checked(
    name: str, root: Path, x: Array, y: Array
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    source = DATASETS[name]
    if x.ndim == 3:
        x = x[:, np.newaxis]
    if x.dtype != np.uint8 or x.shape[1:] != source.shape or y.shape != (len(x),) or not len(x):
        raise DataError(
            f"data set {name!r} in {root}: expected uint8 images of shape {source.shape} and as "
            f"many labels, got {x.dtype} {x.shape[1:]}, {len(x)} images and {len(y)} labels"
        )
    if y.min() < 0 or y.max() >= source.classes:
        raise DataError(
            f"data set {name!r} in {root}: expected labels from 0 to {source.classes - 1}, "
            f"got {y.min()} to {y.max()}"
        )
    return _frozen(np.ascontiguousarray(x)), _frozen(y.astype(np.int64))


def _frozen(array: Array) -> Array:
    array.flags.writeable = False
    return array


def _read_embedded(_root: Path) -> Arrays:
    file = resources.files("fedmq.algorithms.problems") / "mnist-mini-5k-deflate.npz"
    return _four(*read_npz(file, *_KEYS))


def _read_cifar10_6k(root: Path) -> Arrays:
    path = root / "cifar10-6k.npz"
    if not path.is_file():
        raise DataError(
            f"cannot find data set 'cifar10-6k' at {path}: set FEDMQ_DATA to a folder that holds "
            "cifar10-6k.npz, or use data set 'cifar10'"
        )
    return _four(*read_npz(path, *_KEYS))


def _read_idx_files(
    root: Path, name: str, kind: str, train: str = "train", test: str = "t10k", **options: Any
) -> Arrays:
    raw = root / kind / "raw"
    files = [f"{part}-{what}" for part in (train, test) for what in _IDX_ENDS]
    if not all(has_idx(raw, file) for file in files):

        def fetch() -> None:
            import torchvision

            getattr(torchvision.datasets, kind)(root, download=True, **options)

        download(name, root, f"{kind}/raw/{files[0]}.gz and its three companions", fetch)
    return _four(*(read_idx(raw, file) for file in files))


def _read_emnist(root: Path) -> Arrays:
    prefix = "emnist-byclass"
    arrays = _read_idx_files(
        root, "emnist", "EMNIST", f"{prefix}-train", f"{prefix}-test", split="byclass"
    )
    x_train, y_train, x_test, y_test = arrays
    # NIST's files hold every image mirrored along its diagonal.
    return x_train.swapaxes(1, 2), y_train, x_test.swapaxes(1, 2), y_test


def _read_cifar(root: Path, name: str, kind: str, folder: str) -> Arrays:
    import torchvision

    constructor = getattr(torchvision.datasets, kind)
    if not (root / folder).is_dir():
        wanted = f"{folder}/, unpacked"
        download(name, root, wanted, lambda: constructor(root, download=True))
    arrays = []
    with refusing_damage(root / folder), warnings.catch_warnings():
        # CIFAR's files were pickled by Python 2, of which NumPy 2.4.0 to 2.4.4 warns. torchvision
        # verifies their MD5 sums before it unpickles them.
        warnings.simplefilter("ignore")
        for train in (True, False):
            part = constructor(root, train=train)
            arrays += [part.data.transpose(0, 3, 1, 2), np.asarray(part.targets)]
    return _four(*arrays)


def _read_cinic10(root: Path) -> Arrays:
    folder = root / "cinic10"
    if not all((folder / part).is_dir() for part in ("train", "test")):
        raise DataError(
            f"cannot find data set 'cinic10' at {folder}: unpack CINIC-10.tar.gz of "
            "https://github.com/BayesWatch/cinic-10 there, so that it holds train/ and test/"
        )
    import torchvision

    arrays = []
    with refusing_damage(folder):
        for part in ("train", "test"):
            images = torchvision.datasets.ImageFolder(folder / part)
            x = np.stack([np.asarray(image) for image, _ in images])
            arrays += [x.transpose(0, 3, 1, 2), np.asarray(images.targets)]
    return _four(*arrays)


def _read_mnist_writers(root: Path) -> Array | None:
    path = root / "mnist-writers.npz"
    if path.is_file():
        (writers,) = read_npz(path, "writer_train")
        return writers
    # QMNIST lists the NIST writer of each MNIST image, in MNIST's order, in column 2.
    raw, name = root / "QMNIST" / "raw", "qmnist-train-labels-idx2-int"
    return read_idx(raw, name)[:, 2] if has_idx(raw, name) else None


def _four(*arrays: Array) -> Arrays:
    x_train, y_train, x_test, y_test = arrays
    return x_train, y_train, x_test, y_test


_MNIST_MEAN_STD = ((0.1307,), (0.3081,))
_CIFAR10_MEAN_STD = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

DATASETS: Mapping[str, Source] = {
    "mnist-mini": Source(
        "5,000 + 1,000 digits of MNIST, embedded in the package",
        (1, 28, 28), 10, 5_000, *_MNIST_MEAN_STD, "cnn-mnist", _read_embedded,
    ),
    "mnist": Source(
        "60,000 + 10,000 handwritten digits, 28x28 (LeCun et al. 1998)",
        (1, 28, 28), 10, 60_000, *_MNIST_MEAN_STD, "2nn",
        lambda root: _read_idx_files(root, "mnist", "MNIST"), _read_mnist_writers,
    ),
    "fashion-mnist": Source(
        "60,000 + 10,000 articles of clothing, 28x28 (Xiao et al. 2017)",
        (1, 28, 28), 10, 60_000, (0.2860,), (0.3530,), "2nn",
        lambda root: _read_idx_files(root, "fashion-mnist", "FashionMNIST"),
    ),
    "emnist": Source(
        "697,932 + 116,323 handwritten letters and digits, 28x28 (Cohen et al. 2017, by class)",
        (1, 28, 28), 62, 697_932, (0.1736,), (0.3317,), "cnn", _read_emnist,
    ),
    "cifar10": Source(
        "50,000 + 10,000 colour photographs, 32x32 (Krizhevsky 2009)",
        (3, 32, 32), 10, 50_000, *_CIFAR10_MEAN_STD, "cnn-cifar",
        lambda root: _read_cifar(root, "cifar10", "CIFAR10", "cifar-10-batches-py"),
    ),
    "cifar10-6k": Source(
        "5,000 + 1,000 photographs of CIFAR-10, from cifar10-6k.npz in the data folder",
        (3, 32, 32), 10, 5_000, *_CIFAR10_MEAN_STD, "cnn-cifar", _read_cifar10_6k,
    ),
    "cifar100": Source(
        "50,000 + 10,000 colour photographs of 100 classes, 32x32 (Krizhevsky 2009)",
        (3, 32, 32), 100, 50_000, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "cnn-cifar",
        lambda root: _read_cifar(root, "cifar100", "CIFAR100", "cifar-100-python"),
    ),
    # The paper's three parts are equal; its validation part is left for choosing parameters.
    "cinic10": Source(
        "90,000 + 90,000 colour photographs, 32x32, without the validation part (Darlow 2018)",
        (3, 32, 32), 10, 90_000, (0.4789, 0.4723, 0.4305), (0.2421, 0.2383, 0.2587), "cnn-cifar",
        _read_cinic10,
    ),
}  # fmt: skip
"""Data sets by name."""
