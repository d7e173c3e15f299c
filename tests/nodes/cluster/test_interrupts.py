"""Runs that are stopped, and runs whose terminal fails: real processes, signals and pipes."""

import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedmq.broker.errors import LedgerError
from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.ledger.reader import read_entries
from fedmq.nodes.process.signals import INTERRUPTED

pytestmark = pytest.mark.end_to_end

FEDMQ = (sys.executable, "-P", "-m", "fedmq.nodes")
ENDLESS = ("--set", "run.versions=100000", "--set", "problem.examples=1000")
SHORT = (
    *("--set", "run.versions=2", "--set", "problem.examples=1000"),
    *("--set", "problem.clients=4", "--workers", "2", "--set", "schedule.name=rounds"),
)
STUBBORN = """
import time
import torch
from fedmq.algorithms.problems import ImageClassification

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass

class Stubborn(ImageClassification):
    def __init__(self, seed):
        super().__init__("mnist-mini", "mlp", 4, "iid", seed)

    def model(self):
        return Net()
"""


class Run:
    """A command in a process group of its own, and everything that it started."""

    def __init__(self, cwd: Path, *arguments: str, **options) -> None:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
        self.process = subprocess.Popen(
            [*FEDMQ, *arguments], cwd=cwd, text=True, start_new_session=True, **options
        )

    def signal(self, number: int, *, times: int = 1) -> None:
        for _ in range(times):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            time.sleep(0.1)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def output(self, timeout_s: float = 60) -> str:
        return self.process.communicate(timeout=timeout_s)[0] or ""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    started: list[Run] = []

    def begin(*arguments: str, **options) -> Run:
        started.append(Run(tmp_path, *arguments, **options))
        return started[-1]

    yield begin
    for each in started:
        if each.process.poll() is None:
            os.killpg(each.process.pid, signal.SIGKILL)
            each.process.wait()
        if each.process.stdout:
            each.process.stdout.close()


def wait_until(what: str, condition: Callable[[], object], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


def versions_in(run: Path) -> int:
    try:
        entries = list(read_entries(run / "ledger"))
    except LedgerError:
        return 0
    return sum(isinstance(each, Accepted) and each.read().kind == "version" for each in entries)


def is_admitted(run: Path, name: str) -> bool:
    log = run / f"{name}.log"
    return log.exists() and "admitted" in log.read_text()


MOMENTS = {
    "nothing but the ledger's folder": lambda run: (run / "ledger").is_dir(),
    "nodes are starting": lambda run: (run / "aggregator.log").exists(),
    "running": lambda run: versions_in(run) >= 1,
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_ctrl_c_ends_everything_with_a_summary_and_prints_how_to_resume(
    start, tmp_path: Path, moment
) -> None:
    run = tmp_path / "run"
    cluster = start("cluster", "--run", str(run), *ENDLESS)
    wait_until("the moment", lambda: moment(run))
    family = cluster.family()
    cluster.signal(signal.SIGINT, times=2)
    output = cluster.output(20)
    assert cluster.process.returncode == INTERRUPTED, output
    assert "Traceback" not in output
    assert "Aborted" not in output
    assert output.rstrip().endswith(f"resume with: fedmq cluster --run {run}")
    assert "stopped by SIGINT" in output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["ended"] is None
    wait_until("the children's end", lambda: not living(family), 10)


def test_the_command_that_a_stopped_run_prints_resumes_it(start, tmp_path: Path) -> None:
    (tmp_path / "my run.toml").write_text(
        "run.versions = 20\nproblem.examples = 1000\nproblem.clients = 4\n"
        "worker.count = 2\nschedule.name = 'rounds'\n"
    )
    run = tmp_path / "my run"
    cluster = start("cluster", "--run", "my run", "my run.toml")
    wait_until("the first version", lambda: versions_in(run) >= 1)
    cluster.signal(signal.SIGTERM)
    line = cluster.output(20).splitlines()[-1]
    assert cluster.process.returncode == INTERRUPTED
    assert line == "resume with: fedmq cluster --run 'my run' 'my run.toml'"
    again = start(*shlex.split(line.removeprefix("resume with: fedmq ")))
    output = again.output()
    assert again.process.returncode == 0, output
    assert json.loads((run / "summary.json").read_text())["versions"] == 20


@pytest.mark.parametrize("times", [1, 3])
def test_nodes_that_do_not_end_are_killed_at_once_by_the_third_signal(
    start, tmp_path: Path, times: int
) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    run = tmp_path / "run"
    settings = ("--workers", "2", "--set", "problem.name=stubborn:Stubborn")
    cluster = start("cluster", "--run", str(run), *settings)
    wait_until("the workers", lambda: all(is_admitted(run, f"worker-{k}") for k in (0, 1)))
    time.sleep(0.5)  # into the model
    family = cluster.family()
    began = time.monotonic()
    cluster.signal(signal.SIGINT, times=times)
    output = cluster.output(20)
    took_s = time.monotonic() - began
    assert cluster.process.returncode == INTERRUPTED, output
    assert took_s < 4 if times == 3 else took_s > 4
    assert (run / "summary.json").exists()
    assert "Traceback" not in output
    # The third may come before the others have ended, too.
    assert re.search("^killing .*worker-0, worker-1", output, re.MULTILINE)
    wait_until("the children's end", lambda: not living(family), 10)


def test_user_code_that_lets_nothing_through_is_ended_while_it_is_imported(
    start, tmp_path: Path
) -> None:
    (tmp_path / "stuck.py").write_text(
        "import time\n"
        "open('imported', 'w').close()\n"
        "while True:\n"
        "    try:\n"
        "        time.sleep(60)\n"
        "    except BaseException:\n"
        "        pass\n"
    )
    cluster = start("cluster", "--set", "problem.name=stuck:Problem")
    wait_until("the import", (tmp_path / "imported").exists)
    family = cluster.family()
    cluster.signal(signal.SIGINT, times=3)
    assert cluster.output(20) == "fedmq: stopped by SIGINT\n"
    assert cluster.process.returncode == INTERRUPTED
    wait_until("the children's end", lambda: not living(family), 20)


@pytest.mark.parametrize("file", ["broker.log", "worker-1.log"])
def test_nodes_that_are_starting_end_with_a_killed_supervisor(
    start, tmp_path: Path, file: str
) -> None:
    run = tmp_path / "run"
    cluster = start("cluster", "--run", str(run), *ENDLESS)
    wait_until(file, (run / file).exists)
    family = cluster.family()
    cluster.process.kill()
    cluster.process.wait()
    wait_until("the children's end", lambda: not living(family), 20)


def test_a_broker_that_is_stopped_at_once_leaves_a_summary(start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    broker = start("broker", "--bind", "tcp://127.0.0.1:0", "--run", str(run), "--once")
    wait_until("the ledger", lambda: list((run / "ledger").glob("messages-*")))
    time.sleep(0.3)
    broker.signal(signal.SIGTERM, times=2)
    output = broker.output(20)
    assert broker.process.returncode == INTERRUPTED, output
    assert output.rstrip().endswith("fedmq: stopped by SIGTERM")
    assert json.loads((run / "summary.json").read_text())["versions"] == 0


@pytest.mark.parametrize("command", ["worker", "aggregator"])
def test_a_node_that_waits_for_its_broker_is_stopped_with_one_sentence(start, command: str) -> None:
    clients = ("--clients", "0-3") if command == "worker" else ()
    node = start(command, "--connect", "tcp://127.0.0.1:1", *clients)
    time.sleep(2.5)
    node.signal(signal.SIGHUP)
    output = node.output(20)
    assert node.process.returncode == INTERRUPTED, output
    assert output.splitlines()[-1] == "fedmq: stopped by SIGHUP"
    assert "Traceback" not in output


# ---- what is optional


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_broker_serves_though_standard_error_finds_no_room(start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Path("/dev/full").open("w") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": full}
        broker = start("broker", "--bind", "tcp://127.0.0.1:0", "--run", str(run), **streams)
    wait_until("the ledger", lambda: list((run / "ledger").glob("messages-*")))
    time.sleep(0.5)
    assert broker.process.poll() is None
    broker.signal(signal.SIGINT)
    output = broker.output(20)
    assert broker.process.returncode == INTERRUPTED
    assert output == "fedmq: standard error: no space left on device; going on without it\n"


def test_a_run_whose_pipe_is_closed_ends_well_and_reports_it_once_in_its_log(
    start, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    cluster = start("cluster", "--run", "run", *SHORT, stdout=writer, stderr=writer)
    os.close(writer)
    os.close(reader)
    cluster.output()
    assert cluster.process.returncode == 0
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text())["versions"] == 2
    log = (run / "cluster.log").read_text()
    for stream in ("standard output", "standard error"):
        assert log.count(f"{stream}: broken pipe; going on without it") == 1


def test_what_standard_output_lost_is_reported_on_standard_error(start, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    cluster = start("cluster", "--run", "run", *ENDLESS, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    os.close(reader)
    wait_until("the first version", lambda: versions_in(tmp_path / "run") >= 1)
    cluster.signal(signal.SIGINT)
    errors = cluster.process.communicate(timeout=20)[1]
    assert cluster.process.returncode == INTERRUPTED
    assert errors.splitlines()[0] == "fedmq: standard output: broken pipe; going on without it"
    assert errors.splitlines()[-1] == "resume with: fedmq cluster --run run"
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_narrow_terminal_of_ascii_shows_a_run_to_its_end(start, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()

    def resize(columns: int, rows: int) -> None:
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    resize(0, 0)  # as a terminal without a size says
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LANG": "C", "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "env": environment}
    cluster = start("cluster", "--run", "run", *SHORT, **terminal)
    os.close(theirs)
    shown = bytearray()
    thread = threading.Thread(target=_read_all, args=(ours, shown))
    thread.start()
    wait_until("the first task", (tmp_path / "run" / "worker-0.log").exists)
    resize(20, 5)
    cluster.process.wait(60)
    thread.join()
    os.close(ours)
    text = shown.decode("ascii")
    assert cluster.process.returncode == 0, text
    assert "Traceback" not in text
    assert "in run" in text
    assert (tmp_path / "run" / "summary.json").exists()


def _read_all(fd: int, into: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := os.read(fd, 4096):
            into.extend(data)


def test_a_summary_that_cannot_be_written_is_one_sentence_after_the_nodes_have_ended(
    start, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    cluster = start("cluster", "--run", "run", *SHORT)
    wait_until("the ledger", (run / "worker-0.log").exists)
    (run / "summary.json").mkdir()
    family = cluster.family()
    output = cluster.output()
    assert cluster.process.returncode == 1, output
    assert "fedmq: cannot write run/summary.json: is a directory" in output.splitlines()
    assert "Traceback" not in output
    assert "2 versions committed" in output, "what the run has come to is shown"
    wait_until("the children's end", lambda: not living(family), 10)
