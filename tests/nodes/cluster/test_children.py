"""The processes of a cluster: a log that cannot be written is reported, and the node continues."""

import ctypes
import json
import multiprocessing as mp
import os
import re
import signal
import time
from pathlib import Path

import pytest

from fedmq.nodes.cluster import children
from fedmq.nodes.cluster.children import ChildReport, ReportKind, child_main, receive_report

pytestmark = pytest.mark.end_to_end


def work(folder: Path, pipe, lines: int) -> None:
    for number in range(lines):
        print("printed", number, flush=True)  # noqa: T201 - what user code does
    children.structlog.get_logger().info("worked")


def fail(folder: Path, pipe) -> None:
    raise ValueError("a bug")


def crash_in_c(folder: Path, pipe) -> None:
    ctypes.string_at(0)


def wait_for_a_signal(folder: Path, pipe) -> None:
    children._report(pipe, ReportKind.READY, "x")
    while True:
        try:
            time.sleep(60)
        finally:
            # As code of a library that is cut in two by a signal.
            raise OSError("half done")


@pytest.fixture(autouse=True)
def _importable(monkeypatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[3])


def start(folder: Path, target, *args):
    ours, theirs = mp.Pipe(duplex=False)
    context = mp.get_context("spawn")
    process = context.Process(
        target=child_main, name="w", args=("w", str(folder), theirs, target, args)
    )
    process.start()
    theirs.close()
    return process, ours


def note(text: str) -> ChildReport:
    return ChildReport(ReportKind.NOTE, text)


def reports(pipe) -> list[ChildReport]:
    found = []
    while True:
        try:
            found.append(receive_report(pipe))
        except EOFError:
            return found


def test_what_a_node_prints_is_in_its_log(tmp_path: Path) -> None:
    process, pipe = start(tmp_path, work, 2)
    assert reports(pipe) == []
    process.join(30)
    assert process.exitcode == 0
    lines = (tmp_path / "w.log").read_text().splitlines()
    assert lines[:2] == ["printed 0", "printed 1"]
    assert json.loads(lines[2])["event"] == "worked"


def test_a_log_that_cannot_be_opened_is_reported_and_the_node_works(tmp_path: Path, capfd) -> None:
    (tmp_path / "w.log").mkdir()
    process, pipe = start(tmp_path, work, 1)
    path = tmp_path / "w.log"
    assert reports(pipe) == [note(f"cannot write {path}: is a directory; going on without it")]
    process.join(30)
    assert process.exitcode == 0
    assert "worked" in capfd.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_log_that_finds_no_room_is_reported_once_and_the_node_works(tmp_path: Path) -> None:
    (tmp_path / "w.log").symlink_to("/dev/full")
    process, pipe = start(tmp_path, work, 100)
    found = reports(pipe)
    process.join(30)
    assert process.exitcode == 0
    assert found == [note("standard output: no space left on device; going on without it")]


def test_a_crash_is_reported_even_if_the_log_takes_nothing(tmp_path: Path) -> None:
    process, pipe = start(tmp_path, fail)
    (report,) = reports(pipe)
    assert report.kind is ReportKind.ENDING
    assert re.fullmatch(r"crashed: ValueError.*a bug.*; see .*/w\.log", report.text)
    process.join(30)
    assert process.exitcode == 1


def test_a_crash_in_a_library_leaves_file_and_line_in_the_log(tmp_path: Path) -> None:
    process, pipe = start(tmp_path, crash_in_c)
    assert reports(pipe) == []
    process.join(30)
    assert process.exitcode == -signal.SIGSEGV
    log = (tmp_path / "w.log").read_text()
    assert "Segmentation fault" in log
    assert f'{Path(__file__).name}", line' in log


def test_a_node_that_a_signal_ends_has_not_crashed(tmp_path: Path) -> None:
    process, pipe = start(tmp_path, wait_for_a_signal)
    assert receive_report(pipe) == ChildReport(ReportKind.READY, "x")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(process.pid, number)
    assert reports(pipe) == []
    process.join(30)
    assert process.exitcode == 0
    assert json.loads((tmp_path / "w.log").read_text())["by"] == "SIGTERM"


def test_a_full_disk_is_reported_once_and_so_is_room(tmp_path: Path) -> None:
    ours, theirs = mp.Pipe(duplex=False)
    on_space = children._space_reporter(theirs, tmp_path / "ledger")
    for reason in ("", "no space", "no space", "", "", "no space"):
        on_space(reason)
    theirs.close()
    full = note(f"no space; the run waits for disk space in {tmp_path / 'ledger'}")
    assert reports(ours) == [full, note("disk space is available again; the run continues"), full]


def test_a_report_with_any_bytes_in_a_name_is_received() -> None:
    ours, theirs = mp.Pipe(duplex=False)
    children._report(theirs, ReportKind.ENDING, "ready \udcff \n")
    assert receive_report(ours) == ChildReport(ReportKind.ENDING, r"ready \udcff " + "\n")
