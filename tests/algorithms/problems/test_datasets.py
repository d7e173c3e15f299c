import gzip
import struct
import types
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from fedmq.algorithms.errors import DataError, ProblemError
from fedmq.algorithms.problems import DATASETS, load_dataset
from fedmq.algorithms.problems.data_files import data_root, read_idx

RNG = np.random.default_rng(0)


def write_idx(path, array):
    """Write an array as the idx files of MNIST are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    code, dtype = (0x08, "u1") if array.dtype == np.uint8 else (0x0C, ">i4")
    head = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    data = head + array.astype(dtype).tobytes()
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)


def images(*shape):
    """Return random pixels."""
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def labels(n, classes=10):
    """Return every class in turn."""
    return (np.arange(n) % classes).astype(np.uint8)


def write_mnist(root, kind="MNIST", suffix=".gz", names=("train", "t10k")):
    """Write a tiny data set in the four files of MNIST; return their folder."""
    raw = root / kind / "raw"
    for name, n in zip(names, (20, 10), strict=True):
        write_idx(raw / f"{name}-images-idx3-ubyte{suffix}", images(n, 28, 28))
        write_idx(raw / f"{name}-labels-idx1-ubyte{suffix}", labels(n))
    return raw


@pytest.fixture
def offline(monkeypatch):
    """No test reaches for the network, whether or not there is one."""

    def refuse(*args, **kwargs):
        raise URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_the_embedded_digits_are_balanced():
    """The data set that needs no file has equally many of every digit."""
    data = load_dataset("mnist-mini")
    assert data.x_train.shape == (5000, 1, 28, 28)
    assert data.x_test.shape == (1000, 1, 28, 28)
    assert np.bincount(data.y_train).tolist() == [500] * 10
    assert np.bincount(data.y_test).tolist() == [100] * 10
    assert data.writers is None
    assert (data.x_train.dtype, data.y_train.dtype) == (np.uint8, np.int64)


def test_normalised_images_have_zero_mean_and_unit_variance():
    """The constants in the table are those of the data."""
    data = load_dataset("mnist-mini")
    x = data.normalise(data.x_train)
    assert x.dtype == torch.float32
    assert abs(x.mean().item()) < 0.05
    assert abs(x.std().item() - 1) < 0.05


def test_a_data_set_is_read_once_and_cannot_be_changed():
    """All problems of a process share one copy."""
    data = load_dataset("mnist-mini")
    assert load_dataset("mnist-mini") is data
    with pytest.raises(ValueError, match="read-only"):
        data.x_train[0] = 0


def test_the_data_folder_is_named_by_the_environment(monkeypatch):
    """An empty variable counts as none."""
    monkeypatch.setenv("FEDMQ_DATA", "~/elsewhere")
    assert data_root() == Path.home() / "elsewhere"
    for unset in (lambda: monkeypatch.setenv("FEDMQ_DATA", ""), monkeypatch.undo):
        unset()
        monkeypatch.delenv("FEDMQ_DATA", raising=False)
        assert data_root() == Path.home() / ".cache" / "fedmq"


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_idx_files_are_read_packed_or_unpacked_and_nothing_is_written(
    tmp_path, offline, name, kind, suffix
):
    """The data folder may be read-only, and torchvision is not needed."""
    raw = write_mnist(tmp_path, kind, suffix)
    before = sorted(tmp_path.rglob("*"))
    data = load_dataset(name, tmp_path)
    expected = read_idx(raw, "train-images-idx3-ubyte")
    np.testing.assert_array_equal(data.x_train[:, 0], expected)
    assert data.y_test.tolist() == list(range(10))
    assert data.writers is None
    assert sorted(tmp_path.rglob("*")) == before


def test_emnist_images_are_turned_upright(tmp_path, offline):
    """The files of EMNIST hold transposed images."""
    names = ("emnist-byclass-train", "emnist-byclass-test")
    raw = write_mnist(tmp_path, "EMNIST", names=names)
    data = load_dataset("emnist", tmp_path)
    stored = read_idx(raw, f"{names[1]}-images-idx3-ubyte")
    np.testing.assert_array_equal(data.x_test[3, 0], stored[3].T)
    assert data.classes == 62


@pytest.mark.parametrize("source", ["mnist-writers.npz", "QMNIST"])
def test_the_writers_of_mnist_come_from_either_file(tmp_path, offline, source):
    """QMNIST is what the public can get; the npz holds the same numbers."""
    write_mnist(tmp_path)
    writers = np.arange(20) // 3 + 2100
    if source == "QMNIST":
        table = np.zeros((20, 8), dtype=np.int32)
        table[:, 2] = writers
        write_idx(tmp_path / "QMNIST/raw/qmnist-train-labels-idx2-int.gz", table)
    else:
        np.savez(tmp_path / source, writer_train=writers.astype(np.uint16))
    data = load_dataset("mnist", tmp_path)
    assert data.writers is not None
    assert data.writers.dtype == np.int64
    np.testing.assert_array_equal(data.writers, writers)


def test_writers_of_other_images_are_refused(tmp_path, offline):
    """A list of another length would deal the wrong images to the wrong clients."""
    write_mnist(tmp_path)
    np.savez(tmp_path / "mnist-writers.npz", writer_train=np.arange(3))
    with pytest.raises(DataError, match=r"writers of 20 training examples, got .* \(3,\)"):
        load_dataset("mnist", tmp_path)


def test_cifar10_6k_is_read_from_the_data_folder(tmp_path):
    """It is stored with channels first and read as it is."""
    x = images(20, 3, 32, 32)
    arrays = {"x_train": x, "y_train": labels(20), "x_test": x[:10], "y_test": labels(10)}
    np.savez(tmp_path / "cifar10-6k.npz", **arrays)
    np.testing.assert_array_equal(load_dataset("cifar10-6k", tmp_path).x_train, x)


@pytest.mark.parametrize(
    ("name", "kind", "folder"),
    [
        ("cifar10", "CIFAR10", "cifar-10-batches-py"),
        ("cifar100", "CIFAR100", "cifar-100-python"),
    ],
)
def test_cifar_images_become_channels_first(tmp_path, monkeypatch, name, kind, folder):
    """In torchvision the channels come last; files that are there are not downloaded."""
    import torchvision

    x = images(20, 32, 32, 3)

    def fake(root, *, train=True, download=False):
        assert Path(root) == tmp_path
        assert not download
        return types.SimpleNamespace(data=x, targets=labels(20).tolist())

    monkeypatch.setattr(torchvision.datasets, kind, fake)
    (tmp_path / folder).mkdir()
    data = load_dataset(name, tmp_path)
    np.testing.assert_array_equal(data.x_train[4, 2], x[4, :, :, 2])
    assert data.y_test.tolist() == labels(20).tolist()


def test_cinic10_is_read_from_folders_of_images(tmp_path):
    """Folders in alphabetical order are the classes."""
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "test", "valid"):
        for label in range(10):
            folder = tmp_path / "cinic10" / part / f"class{label}"
            folder.mkdir(parents=True)
            pixels = np.full((32, 32, 3), (label, 100, 200), dtype=np.uint8)
            image.fromarray(pixels).save(folder / "one.png")
    data = load_dataset("cinic10", tmp_path)
    assert len(data.y_train) == 10, "the validation part is not for training"
    assert data.y_train.tolist() == list(range(10))
    assert data.x_test[:, 0, 5, 5].tolist() == list(range(10))
    assert data.x_test[0, :, 0, 0].tolist() == [0, 100, 200]


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"mnist-mini"}))
def test_what_is_not_there_is_said_with_the_place_and_the_remedy(tmp_path, offline, capfd, name):
    """One sentence, and no progress bars around it."""
    with pytest.raises(DataError, match=r"FEDMQ_DATA|unpack") as caught:
        load_dataset(name, tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_cannot_be_made_is_a_data_error(tmp_path, offline):
    """The data folder itself may be impossible."""
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="or download it"):
        load_dataset("mnist", tmp_path / "file" / "data")


@pytest.mark.parametrize("damage", ["cut", "not gzip", "not idx", "wrong shape", "wrong labels"])
def test_a_damaged_file_is_named(tmp_path, offline, damage):
    """Whatever is wrong with a file, the message says which."""
    raw = write_mnist(tmp_path)
    path = raw / "train-images-idx3-ubyte.gz"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "not gzip":
        path.write_bytes(b"<html>")
    elif damage == "not idx":
        path.write_bytes(gzip.compress(b"something else"))
    elif damage == "wrong shape":
        write_idx(path, images(20, 28, 27))
    else:
        write_idx(raw / "train-labels-idx1-ubyte.gz", labels(20, 11))
    with pytest.raises(DataError, match=r"train-images|'mnist' in") as caught:
        load_dataset("mnist", tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut"])
def test_a_damaged_archive_is_named(tmp_path, content):
    """NumPy raises a different error for each of these."""
    (tmp_path / "cifar10-6k.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*cifar10-6k\.npz"):
        load_dataset("cifar10-6k", tmp_path)


def test_an_archive_without_labels_is_named(tmp_path):
    """A foreign archive of the same name is not ours."""
    np.savez(tmp_path / "cifar10-6k.npz", x_train=images(2, 3, 32, 32))
    with pytest.raises(DataError, match=r"cannot read .*cifar10-6k\.npz .*y_train"):
        load_dataset("cifar10-6k", tmp_path)


def test_an_archive_is_never_unpickled(tmp_path):
    """An array of objects would run code when it is read."""
    arrays = dict.fromkeys(("x_train", "y_train", "x_test", "y_test"), np.array([{}], dtype=object))
    np.savez(tmp_path / "cifar10-6k.npz", **arrays)
    with pytest.raises(DataError, match="allow_pickle=False"):
        load_dataset("cifar10-6k", tmp_path)


def test_an_unknown_name_is_answered_with_the_choices():
    """A slip of the pen is guessed."""
    with pytest.raises(
        ProblemError, match=r"'minst' \(did you mean 'mnist'\?\); choose from cifar"
    ):
        load_dataset("minst")


@pytest.mark.parametrize("name", ["mnist", "cifar10-6k"])
def test_the_real_files_if_they_are_there(name, offline):
    """The constants of the table fit the real test images too."""
    root = data_root()
    wanted = {"mnist": "MNIST/raw/train-images-idx3-ubyte.gz", "cifar10-6k": "cifar10-6k.npz"}
    if not (root / wanted[name]).is_file():
        pytest.skip(f"no {root / wanted[name]}")
    data = load_dataset(name)
    x = data.normalise(data.x_test)
    assert x.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert (x.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1
    assert len(np.unique(data.y_train)) == data.classes
