"""The environment of a process: current folder, TMPDIR, home, names of folders."""

import os
import subprocess
import sys
import tempfile
from multiprocessing import util
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedmq.algorithms.errors import DataError
from fedmq.algorithms.problems import data_files
from fedmq.algorithms.problems.datasets import load_dataset
from fedmq.nodes.cli.main import main
from fedmq.nodes.cluster import environment
from fedmq.nodes.cluster.environment import place_sockets
from fedmq.nodes.errors import NodeError


@pytest.fixture
def no_temporary_folder_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """multiprocessing, and tempfile, remember theirs."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setitem(util.process.current_process()._config, "tempdir", None)  # type: ignore[attr-defined] # multiprocessing has no public way


@pytest.mark.parametrize("command", [["list", "schedules"], ["broker", "--run", "x"], ["cluster"]])
def test_a_current_folder_that_is_gone_is_one_sentence(
    tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert result.output == (
        "fedmq: cannot find the current folder: No such file or directory; change to one that "
        "exists\n"
    )


@pytest.mark.usefixtures("no_temporary_folder_yet")
def test_sockets_get_a_short_place_where_tmpdir_is_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("d" * 140)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    place_sockets()
    made = util.get_temp_dir()
    assert len(os.fsencode(f"{made}/listener-12345678")) <= 107
    assert tempfile.gettempdir() == str(long), "for all else it is where the user said"


@pytest.mark.usefixtures("no_temporary_folder_yet")
def test_no_short_folder_for_sockets_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("d" * 140)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(environment, "_SHORT", ())
    with pytest.raises(NodeError, match="TMPDIR: expected a path of at most 75"):
        place_sockets()


def test_no_folder_for_temporary_files_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/nowhere']")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(NodeError, match="cannot find a folder for temporary files: No usable"):
        place_sockets()


def test_without_a_home_the_embedded_data_are_there_and_others_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def homeless(_self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FEDMQ_DATA", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert len(load_dataset("mnist-mini").y_train) == 5000
    for reading in (data_files.data_root, lambda: load_dataset("mnist")):
        with pytest.raises(DataError, match="FEDMQ_DATA, because this user has no home folder"):
            reading()


@pytest.mark.parametrize(
    "command",
    [
        ["broker", "--bind", "tcp://127.0.0.1:0", "--run"],
        ["cluster", "--run"],
        ["aggregator", "--run"],
        ["trace", "ls"],
        ["ledger", "check"],
    ],
)
def test_a_name_that_no_file_system_takes_is_one_sentence(command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "n" * 300])
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert result.output.lower().endswith("file name too long\n")


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", [b"by\xfftes", b"two\nlines", b"long" * 30])
def test_a_run_may_lie_in_a_folder_of_any_name(tmp_path: Path, name: bytes) -> None:
    """Local blobs need a name in UTF-8; without, the run uses the socket.

    A socket file needs a path of few bytes; where it is longer, the run uses loopback.
    """
    folder = os.fsencode(tmp_path) + b"/" + name
    settings = ["run.versions=1", "problem.clients=2", "schedule.size=1", "schedule.concurrency=1"]
    words = [word for each in settings for word in ("--set", each)]
    command = [
        sys.executable,
        "-P",
        "-m",
        "fedmq.nodes",
        "cluster",
        "--workers",
        "1",
        *words,
    ]
    done = subprocess.run(
        [*command, "--run", folder], cwd=tmp_path, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout
    log = Path(os.fsdecode(folder), "broker.log").read_text()
    assert ("is not UTF-8" in log) == (name == b"by\xfftes")
    loopback = b"using loopback, which other users of this host can reach: "
    assert (loopback in done.stdout) == (name == b"long" * 30)
    assert not Path(os.fsdecode(folder), "socket").exists()
