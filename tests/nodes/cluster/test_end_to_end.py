"""Real processes, real sockets, real data: what a user starts, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from fedmq.algorithms.problems import load_problem
from fedmq.broker.ledger.entries import Accepted, Consumed, Refusal
from fedmq.broker.ledger.reader import read_entries
from fedmq.nodes.run.config import load
from fedmq.nodes.run.digests import model_digest
from fedmq.nodes.run_folder.model_files import read_state_dict
from tests.permissions import readable_by_others

pytestmark = pytest.mark.end_to_end

FEDMQ = (sys.executable, "-P", "-m", "fedmq.nodes")
SYNCHRONOUS = (
    *("--set", "schedule.name=rounds", "--set", "schedule.fraction=0.2"),
    *("--set", "run.versions=3", "--set", "problem.examples=1000"),
)


class Started:
    """A command in a process group of its own, and everything that it started."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*FEDMQ, *arguments],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def output(self, timeout_s: float = 50) -> str:
        return self.process.communicate(timeout=timeout_s)[0]

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    started = []

    def begin(*arguments: str) -> Started:
        started.append(Started(tmp_path, *arguments))
        return started[-1]

    yield begin
    for each in started:
        if each.process.poll() is None:
            os.killpg(each.process.pid, signal.SIGKILL)
            each.process.wait()
        if each.process.stdout:
            each.process.stdout.close()


def wait_until(what: str, condition, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)


def pid_of(run: Path, name: str) -> int:
    """The process that runs a node now: the last that wrote into its log."""
    lines = (run / f"{name}.log").read_text().splitlines()
    whole = [line for line in lines if line.startswith("{") and line.endswith("}")]
    return int(json.loads(whole[-1])["pid"])


def kill(run: Path, name: str) -> None:
    """Kill a node's process, and wait until another one has taken its place."""
    before = pid_of(run, name)
    os.kill(before, signal.SIGKILL)
    wait_until(f"{name} to come back", lambda: pid_of(run, name) != before)


def versions_in(folder: Path) -> int:
    if not (folder / "ledger").is_dir():
        return 0
    entries = read_entries(folder / "ledger")
    return sum(isinstance(each, Accepted) and each.read().kind == "version" for each in entries)


def test_a_cluster_trains_and_leaves_everything_behind(start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("--set", "run.versions=20", "--set", "codec.up=cast(float16)")
    cluster = start("cluster", "--run", str(run), *settings)
    output = cluster.output()
    assert cluster.process.returncode == 0, output
    assert "20 versions committed" in output

    summary = json.loads((run / "summary.json").read_text())
    assert summary["algorithm"] == "fedavg"
    assert summary["schedule"] == "buffered"
    assert summary["codec"].items() >= {"down": "raw", "up": "cast(float16)"}.items()
    assert summary["versions"] == 20
    assert summary["results"]["used"] >= 100
    assert summary["results"]["refused"] == 0
    assert [point["version"] for point in summary["curve"]] == [0, 5, 10, 15, 20]
    # Runs of this length were seen to end between 85 % and 92 %.
    assert summary["final_accuracy"] > 0.6
    assert summary["curve"][0]["accuracy"] < 0.3
    assert summary["nodes"]["aggregator"]["sessions"] == 1
    assert sum(node["tasks"] for node in summary["nodes"].values()) >= 100
    down, up = summary["bytes"]["down"], summary["bytes"]["up"]
    assert up["payload"] == pytest.approx(2 * 21_840 * summary["results"]["used"], rel=0.2)
    assert down["payload"] > 1.5 * up["payload"]
    assert 0.9 < up["wire"] / up["payload"] < 1.5

    # The configuration that it wrote runs again, and is complete.
    config = load(run / "config.toml")
    assert config.algorithm["lr"] == 0.05
    assert config.run.id == "", "under a new id"
    assert f'# run.id = "{summary["run"]}"' in (run / "config.toml").read_text()
    for name in ("broker", "aggregator", "worker-0", "worker-3", "evaluator"):
        assert (run / f"{name}.log").exists()

    # The model in the folder is the one in the summary, and its own module takes it.
    with np.load(run / "model.npz", allow_pickle=False) as arrays:
        model = {name: torch.from_numpy(array) for name, array in arrays.items()}
    assert model_digest(model) == summary["model_digest"]
    module = load_problem(config.problem, 0).model()
    module.load_state_dict(read_state_dict(run), strict=True)

    assert readable_by_others(run) == []
    check_accounts(run)


def check_accounts(run: Path) -> None:
    """accepted = consumed + pending + refused, and every message was accepted once."""
    accepted, consumed, refused = {}, [], set()
    for number, entry in enumerate(read_entries(run / "ledger")):
        assert entry.seq == number
        match entry:
            case Accepted(seq=seq, consumes=consumes):
                accepted[seq] = entry.read()
                consumed += consumes
            case Consumed(of=of):
                consumed += of
            case Refusal(of=of) if of is not None:
                refused.add(of)
    assert set(consumed) | refused <= set(accepted)
    assert len(consumed) == len(set(consumed))
    for sender in {message.sender for message in accepted.values()}:
        names = [message.id for message in accepted.values() if message.sender == sender]
        assert len(names) == len(set(names))
    results = [message.re for message in accepted.values() if message.kind == "result"]
    assert len(results) == len(set(results))


def test_a_killed_broker_and_a_killed_aggregator_change_nothing_in_the_model(
    start, tmp_path: Path
) -> None:
    """Under rounds, the same seed gives the same model; so it does when they come back."""
    settings = (*SYNCHRONOUS, "--set", "run.versions=25", "--set", "run.checkpoint_s=0.5")
    digests = {}
    for name in ("whole", "killed"):
        run = tmp_path / name
        cluster = start("cluster", "--run", str(run), *settings)
        if name == "killed":
            for victim, version in (("broker", 2), ("aggregator", 6), ("broker", 10)):
                wait_until(f"version {version}", lambda: versions_in(run) >= version)  # noqa: B023
                kill(run, victim)
        output = cluster.output()
        assert cluster.process.returncode == 0, output
        summary = json.loads((run / "summary.json").read_text())
        assert summary["versions"] == 25
        digests[name] = summary["model_digest"]
    assert digests["whole"] == digests["killed"]
    assert output.count("broker was killed by SIGKILL; restarting it") == 2
    assert output.count("aggregator was killed by SIGKILL; restarting it") == 1
    sessions = {name: node["sessions"] for name, node in summary["nodes"].items()}
    assert sessions.pop("aggregator") == 2
    assert set(sessions.values()) == {1}, "nodes that did not crash stayed connected"
    with np.load(run / "model.npz", allow_pickle=False) as arrays:
        model = {name: torch.from_numpy(array) for name, array in arrays.items()}
    assert model_digest(model) == digests["whole"]
    check_accounts(run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_every_process_cleanly(start, tmp_path: Path, number: int) -> None:
    run = tmp_path / "run"
    cluster = start("cluster", "--run", str(run), "--set", "run.versions=10000")
    wait_until("the first versions", lambda: versions_in(run) >= 2)
    family = cluster.family()
    assert len(family) >= 7
    os.killpg(cluster.process.pid, number)
    output = cluster.output(20)
    assert cluster.process.returncode == 130
    assert "Traceback" not in output
    assert json.loads((run / "summary.json").read_text())["versions"] >= 2
    wait_until("the children's end", lambda: not psutil.wait_procs(family, 0)[1], 5)
    # No node sent a goodbye: the run resumes as if it had never stopped.
    left = [
        each.read().body
        for each in read_entries(run / "ledger")
        if isinstance(each, Accepted) and each.read().kind == "left"
    ]
    assert left == []


def test_no_child_outlives_a_killed_parent(start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cluster = start("cluster", "--run", str(run), "--set", "run.versions=10000")
    wait_until("the first versions", lambda: versions_in(run) >= 2)
    family = cluster.family()
    cluster.process.kill()
    cluster.process.wait()
    wait_until("the children's end", lambda: not psutil.wait_procs(family, 0)[1], 15)


def test_stragglers_drop_outs_and_a_killed_worker_are_ordinary(start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cluster = start(
        *("cluster", "--run", str(run), "--set", "problem.examples=1000"),
        *("--set", "run.versions=40"),
        *("--set", "broker.lease_s=1", "--set", "broker.heartbeat_s=0.2"),
        *("--set", "worker.slowdown=halfnormal(1)", "--set", "worker.drop=0.1"),
    )
    wait_until("the first versions", lambda: versions_in(run) >= 2)
    kill(run, "worker-2")
    output = cluster.output()
    assert "40 versions committed" in output
    assert "worker-2 was killed by SIGKILL; restarting it" in output
    assert cluster.process.returncode == 0
    nodes = json.loads((run / "summary.json").read_text())["nodes"]
    assert sum(node["drops"] for node in nodes.values()) > 0
    check_accounts(run)


def test_a_process_that_ends_again_and_again_ends_the_run(start, tmp_path: Path) -> None:
    """It is started again ten times a minute, not for ever."""
    run = tmp_path / "run"
    cluster = start("cluster", "--run", str(run), "--set", "run.versions=10000")
    wait_until("the first versions", lambda: versions_in(run) >= 1)
    for _ in range(10):
        kill(run, "aggregator")
    os.kill(pid_of(run, "aggregator"), signal.SIGKILL)
    output = cluster.output(20)
    assert cluster.process.returncode == 1
    assert "fedmq: aggregator: was killed by SIGKILL" in output


def test_a_model_that_cannot_be_followed_is_one_sentence_and_exit_code_2(
    start, tmp_path: Path
) -> None:
    """A worker tries it before it takes a task."""
    (tmp_path / "growing.py").write_text(
        "import torch\n"
        "from fedmq.algorithms.problems import ImageClassification\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, inner):\n"
        "        super().__init__()\n"
        "        self.inner = inner\n"
        "        self.register_buffer('seen', torch.zeros(1))\n"
        "    def forward(self, x):\n"
        "        if self.training:\n"
        "            self.seen = torch.cat([self.seen, self.seen])\n"
        "        return self.inner(x)\n"
        "class Growing(ImageClassification):\n"
        "    def __init__(self, seed):\n"
        "        super().__init__('mnist-mini', 'mlp', 4, 'iid', seed)\n"
        "    def model(self):\n"
        "        return Net(super().model())\n"
    )
    own = ("--set", "problem.name=growing:Growing")
    cluster = start("cluster", "--run", str(tmp_path / "run"), *own)
    output = cluster.output()
    assert cluster.process.returncode == 2
    assert "expected seen to stay float32 [1], the model made it float32 [2]" in output
    assert "Traceback" not in output


OWN_VALUES = """
import math
import numpy as np
import torch
from torch import nn
from fedmq.algorithms.problems import ImageClassification

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        names = (f"features_denseblock{n}_transition_denselayer{n}" for n in range(900))
        self.scales = nn.ParameterDict({name: torch.ones(()) for name in names})
        self.last = nn.Linear(784, 10)
    def forward(self, x):
        return self.last(x.flatten(1)) * sum(self.scales.values()) / len(self.scales)

class Own(ImageClassification):
    def __init__(self, seed, value):
        super().__init__("mnist-mini", "mlp", 4, "iid", seed, 80)
        values = {"numpy": np.float64(0.25), "strange": torch.tensor(math.nan), "nothing": None}
        object.__setattr__(self, "value", values[value])
    def model(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return Wide()
    def metrics(self, outputs, y):
        return {**super().metrics(outputs, y), "mae": self.value}
"""


def own_values(start, folder: Path, value: str) -> tuple[Started, Path]:
    (folder / "own.py").write_text(OWN_VALUES)
    run = folder / "run"
    settings = ("problem.name=own:Own", f"problem.value={value}", "run.versions=2")
    words = [word for each in settings for word in ("--set", each)]
    return start("cluster", "--run", str(run), "--workers", "2", *words), run


@pytest.mark.parametrize(("value", "mae"), [("numpy", 0.25), ("strange", None)])
def test_numbers_of_any_kind_and_a_model_of_very_many_tensors(
    start, tmp_path: Path, value: str, mae: float | None
) -> None:
    cluster, run = own_values(start, tmp_path, value)
    output = cluster.output()
    assert cluster.process.returncode == 0, output
    text = (run / "summary.json").read_text()
    summary = json.loads(text, parse_constant=pytest.fail)
    assert summary["metrics"]["mae"] == mae
    assert summary.get("not_finite", {}).get("metrics.mae") == (None if mae else "NaN")
    assert summary["results"]["refused"] == 0
    assert len(read_state_dict(run)) == 902


def test_a_metric_that_is_no_number_is_one_sentence_and_exit_code_2(start, tmp_path: Path) -> None:
    cluster, _ = own_values(start, tmp_path, "nothing")
    output = cluster.output()
    assert cluster.process.returncode == 2, output
    assert "evaluator: Own.metrics: expected a number for 'mae', got None" in output
    assert "Traceback" not in output


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_nodes_on_separate_hosts_need_only_the_brokers_address(start, tmp_path: Path) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    settings = ("--set", "problem.clients=4", "--set", "problem.examples=400")
    (tmp_path / "run.toml").write_text('[run]\nid = "apart"\nversions = 2\n')
    # Nobody has to be started first.
    early = start("worker", "--connect", endpoint, "--clients", "0-1", "--name", "early")
    evaluator = start("worker", "--connect", endpoint, "--evaluator")
    broker = start("broker", "--bind", endpoint, "--run", str(tmp_path / "run"), "--once")
    wait_until("the broker", (tmp_path / "run" / "ledger").is_dir)
    aggregator = start("aggregator", "--connect", endpoint, "run.toml", *settings, "--run", "out")
    late = start("worker", "--connect", endpoint, "--clients", "2,3", "--name", "late")

    assert "2 versions committed" in aggregator.output()
    for node in (early, late, evaluator, broker):
        node.output(20)
        assert node.process.returncode == 0
    assert (tmp_path / "out" / "model.npz").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["run"] == "apart"
    assert summary["final_accuracy"] is not None
    assert {"early", "late"} < set(summary["nodes"])


def test_what_the_broker_refuses_is_one_sentence_and_exit_code_2(start, tmp_path: Path) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    start("broker", "--bind", endpoint, "--run", str(tmp_path / "run"))
    wait_until("the broker", (tmp_path / "run" / "ledger").is_dir)
    second = start("broker", "--bind", endpoint, "--run", str(tmp_path / "other"))
    assert f"fedmq: cannot listen on {endpoint}: address already in use" in second.output()
    assert second.process.returncode == 2

    settings = ("--set", "problem.clients=4", "--set", "problem.examples=400")
    start("aggregator", "--connect", endpoint, *settings, "--set", "run.id=a")
    start("worker", "--connect", endpoint, "--clients", "0-1", "--name", "one")
    wait_until(
        "the worker",
        lambda: any(
            isinstance(each, Accepted) and each.read().body.get("node") == "one"
            for each in read_entries(tmp_path / "run" / "ledger")
        ),
    )
    for arguments, sentence in (
        (("--clients", "2-57"), "client 57 is out of range: this run has 4 clients, 0 to 3"),
        (
            ("--clients", "3", "--name", "one", "--state", "other"),
            "a node named 'one' is already connected",
        ),
        (("--clients", "1-2", "--name", "two"), "client/1 is already hosted by one"),
    ):
        refused = start("worker", "--connect", endpoint, *arguments)
        assert f"fedmq: {sentence}" in refused.output().splitlines()
        assert refused.process.returncode == 2


def test_a_node_reports_what_it_waits_for_and_in_what_its_configuration_differs(
    start, tmp_path: Path
) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    start("broker", "--bind", endpoint, "--run", str(tmp_path / "run"))
    settings = ("--set", "problem.clients=4", "--set", "problem.examples=400", "--run", "out")
    run = ("aggregator", "--connect", endpoint, *settings, "--set", "run.id=a")
    first = start(*run)
    lost = start(
        *("worker", "--connect", endpoint, "--clients", "0", "--run-id", "b", "--give-up", "20")
    )
    output = lost.output()
    assert f"the broker at {endpoint} serves run a; waiting for run b for " in output
    assert "fedmq: gave up: " in output.splitlines()[-1]
    assert lost.process.returncode == 1

    first.process.kill()
    other = start(*run, "--set", "algorithm.lr=0.3")
    words = f"fedmq: run a at {endpoint} has another configuration: algorithm.lr (here 0.3, there"
    assert words in other.output()
    assert other.process.returncode == 2


def test_a_node_that_starts_after_the_end_learns_it_or_reports_that_the_broker_is_gone(
    start, tmp_path: Path
) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    settings = ("--set", "problem.clients=2", "--set", "problem.examples=400")
    broker = start("broker", "--bind", endpoint, "--run", str(tmp_path / "run"))
    node = ("worker", "--connect", endpoint, "--clients", "0-1", "--run-id", "a", "--state", "w")
    worker = start(*node)
    start("worker", "--connect", endpoint, "--evaluator")
    short = ("--set", "run.id=a", "--set", "run.versions=1", "--set", "schedule.size=1")
    start("aggregator", "--connect", endpoint, *settings, *short)
    assert "the run ended: 1 versions committed" in worker.output()
    assert worker.process.returncode == 0
    again = start(*node)
    assert "the run ended: 1 versions committed" in again.output()
    assert again.process.returncode == 0

    broker.process.terminate()
    broker.output()
    late = start(*node, "--give-up", "5")
    words = f"waiting for the broker at {endpoint} for 3 s"
    output = late.output()
    assert words in output
    assert "nothing listens there (connection refused)" in output
    assert late.process.returncode == 1
