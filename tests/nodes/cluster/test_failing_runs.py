"""Runs without progress: how they end, and what they print."""

import json

import pytest

from fedmq.nodes.errors import ConfigError
from fedmq.nodes.run.config import build
from fedmq.nodes.run.setup import check_attainable, set_up
from tests.nodes.cluster.test_end_to_end import free_port, start, wait_until  # noqa: F401 - a fixture

MINE = """
import os
from dataclasses import dataclass
from pathlib import Path
import torch
from torch import nn
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.problems import Examples, Problem


class Mine(Problem):
    def __init__(self, clients=4, fails="", seed=0):
        self.clients, self.seed, self.fails = clients, seed, fails

    def model(self):
        if self.fails == "model":
            raise RuntimeError("no such layer")
        return nn.Linear(8, 2)

    def client(self, index):
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(index))
        return Examples(x, (x[:, 0] > 0).long())

    def test(self):
        data = self.client(999)
        return Examples(data.x[:0], data.y[:0]) if self.fails == "test" else data

    def loss(self, out, y):
        if self.fails == "loss":
            raise ValueError(f"cannot use {out}")
        if self.fails == "leave":
            os._exit(0)
        return nn.functional.cross_entropy(out, y)

    def metrics(self, out, y):
        return {"accuracy": (out.argmax(1) == y).float().mean().item()}


@dataclass(frozen=True)
class Broken(FedAvg):
    name = "broken"
    kill: bool = False

    def commit(self, state, gathered, divisor):
        if not self.kill:
            raise KeyError("momentum")
        if not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), 9)
        return super().commit(state, gathered, divisor)
"""


def run_of(*settings):
    given = (
        "problem.name=mine:Mine",
        "schedule.size=2",
        "schedule.concurrency=2",
        "run.versions=4",
    )
    return [word for each in (*given, *settings) for word in ("--set", each)]


@pytest.fixture
def cluster(start, tmp_path):  # noqa: F811 - the fixture
    """Runs a cluster on the module above; returns exit code, output and the run's folder."""

    def go(*settings, mended=False):
        if not mended:
            (tmp_path / "mine.py").write_text(MINE)
        folder = tmp_path / "run"
        words = ("cluster", "--workers", "2", "--run", str(folder), *run_of(*settings))
        started = start(*words)
        output = started.output()
        return started.process.returncode, output, folder

    return go


@pytest.mark.end_to_end
def test_a_run_whose_tasks_all_raise_ends_and_reports_what_was_raised(cluster):
    code, output, folder = cluster("problem.fails=loss")
    assert code == 1
    line = next(n for n, text in enumerate(MINE.splitlines(), 1) if "cannot use" in text)
    expected = f"ValueError: cannot use tensor(...) (mine.py:{line})"
    assert (
        "fedmq: the run failed: 12 tasks in a row failed or were rejected (run.failures); the last"
        in output
    )
    assert expected in output
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert expected in summary["ended"]
    assert summary["results"]["failed"] == 12
    assert summary["last_failure"]["reason"] == "ValueError: cannot use tensor(...)"
    assert summary["last_failure"]["where"] == f"mine.py:{line}"
    logs = "".join(path.read_text() for path in folder.glob("*.log"))
    assert "tensor([" not in logs + output
    assert "Traceback" not in output
    assert len(logs) < 20_000
    assert logs.count('"event": "task failed"') == 2  # once for each worker


@pytest.mark.end_to_end
def test_a_run_whose_workers_end_by_themselves_ends_and_reports_it(cluster):
    code, output, _ = cluster("problem.fails=leave")
    assert code == 1
    assert "fedmq: worker-0: ended with exit code 0" in output


@pytest.mark.end_to_end
def test_a_node_that_failed_is_reported_even_if_the_run_is_over_by_then(cluster):
    code, output, _ = cluster("problem.fails=test", "run.versions=1")
    assert code in (0, 2)
    assert "fedmq: evaluator: Mine: expected at least one example to evaluate on" in output


@pytest.mark.end_to_end
def test_an_algorithm_that_raises_ends_the_run_at_once_and_resumes_once_it_is_fixed(
    cluster, tmp_path
):
    code, output, folder = cluster("algorithm.name=mine:Broken")
    assert code == 1
    assert "fedmq: the run failed: broken raised KeyError: 'momentum' (mine.py:" in output
    assert "restarting it" not in output
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["nodes"]["aggregator"]["sessions"] == 1
    (tmp_path / "mine.py").write_text(MINE.replace('raise KeyError("momentum")', "pass"))
    code, output, _ = cluster("algorithm.name=mine:Broken", mended=True)
    assert code == 0, output
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["versions"]) == ("finished", 4)


@pytest.mark.end_to_end
def test_a_kill_at_the_same_place_is_cured_by_a_restart(cluster):
    code, output, folder = cluster("algorithm.name=mine:Broken", "algorithm.kill=true")
    assert code == 0, output
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["versions"]) == ("finished", 4)
    assert summary["nodes"]["aggregator"]["sessions"] == 2


@pytest.mark.end_to_end
def test_a_model_that_cannot_be_built_is_one_sentence(cluster):
    code, output, _ = cluster("problem.fails=model")
    assert code == 2
    assert "problem.name: RuntimeError: no such layer (mine.py:" in output
    assert "restarting it" not in output
    assert "Traceback" not in output


@pytest.mark.end_to_end
def test_nodes_by_themselves_say_whom_they_wait_for_and_why_the_run_failed(start, tmp_path):  # noqa: F811 - the fixture
    (tmp_path / "mine.py").write_text(MINE)
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    broker = start("broker", "--bind", endpoint, "--run", str(tmp_path / "run"), "--once")
    wait_until("the broker", (tmp_path / "run" / "ledger").is_dir)
    settings = run_of("problem.fails=loss", "run.failures=3")
    aggregator = start("aggregator", "--connect", endpoint, *settings)
    one = start("worker", "--connect", endpoint, "--clients", "0,2", "--allow", "mine")
    line = ""
    while "waiting for clients 1, 3" not in line:
        line = aggregator.process.stdout.readline()
        assert line, "it ended without saying whom it waited for"
    two = start("worker", "--connect", endpoint, "--clients", "1,3", "--allow", "mine")
    rest = aggregator.output()
    assert aggregator.process.returncode == 1
    assert "fedmq: the run failed: 3 tasks in a row failed or were rejected (run.fail" in rest
    for node in (one, two, broker):
        node.output(20)
        assert node.process.returncode == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


# ---- settings that can never be met


def checked(workers=(), **tables):
    given = {"problem": {"name": "mnist-mini", "clients": 4, "partition": "iid"}, **tables}
    check_attainable(set_up(build(given)), workers)


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        (
            {"schedule": {"name": "rounds", "min_results": 5}},
            "schedule.min_results: expected at most problem.clients, 4, got 5",
        ),
        (
            {"run": {"min_clients": 5}},
            "run.min_clients: expected at most problem.clients, 4, got 5",
        ),
        (
            {"run": {"target_accuracy": 1.01}},
            "run.target_accuracy: expected a number less than or equal to 1, got 1.01",
        ),
        (
            {"run": {"target_accuracy": 0.9, "evaluate_every": 0}},
            "run.evaluate_every: expected at least 1 because run.target_accuracy is set",
        ),
        (
            {"run": {"patience": 3, "evaluate_every": 0}},
            "run.evaluate_every: expected at least 1 because run.patience is set",
        ),
        ({"worker": {"drop": 1.0}}, "worker.drop: expected less than 1, got 1"),
        ({"run": {"failures": 0}}, "run.failures: expected a number greater than or equal to 1"),
    ],
)
def test_what_can_never_be_met_is_refused_at_the_start(tables, sentence):
    with pytest.raises(ConfigError) as caught:
        checked(**tables)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "tables",
    [
        {"schedule": {"name": "rounds", "min_results": 4}},
        {"schedule": {"name": "rounds", "fraction": 0.25, "min_results": 3}},
        {"schedule": {"name": "buffered", "size": 50, "concurrency": 1}},
        {"run": {"target_accuracy": 1.0, "versions": 1}},
        {"worker": {"drop": 1.0, "nodes": {"worker-1": {"drop": 0.5}}}, "workers": ["worker-1"]},
    ],
)
def test_what_is_unusual_but_can_be_met_is_taken(tables):
    checked(**tables)


@pytest.mark.end_to_end
def test_it_is_refused_before_anything_is_started(cluster):
    code, output, folder = cluster("worker.drop=1")
    assert (code, folder.exists()) == (2, False)
    assert output == "fedmq: worker.drop: expected less than 1, got 1: every result would be lost\n"
