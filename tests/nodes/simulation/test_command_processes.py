"""``fedmq simulate`` in real processes: the digest of a live run, any number of them, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
from click.testing import CliRunner

from fedmq.nodes.cli.main import main
from fedmq.nodes.process.signals import INTERRUPTED

pytestmark = pytest.mark.end_to_end

FEDMQ = (sys.executable, "-P", "-m", "fedmq.nodes")
ROUNDS = (
    *("--set", "run.id=same", "--set", "run.versions=2", "--set", "problem.clients=6"),
    *("--set", "problem.examples=600", "--set", "schedule.name=rounds"),
    *("--set", "schedule.fraction=0.5"),
)


def digest_in(folder):
    return json.loads((folder / "summary.json").read_text())["model_digest"]


def ledger_in(folder):
    return {each.name: each.read_bytes() for each in folder.glob("ledger/*-*.log")}


def test_a_simulated_run_has_the_digest_of_a_live_one_with_any_number_of_processes(tmp_path):
    live = [*FEDMQ, "cluster", "--workers", "2", *ROUNDS, "--run", str(tmp_path / "live")]
    subprocess.run(live, check=True, capture_output=True, timeout=100)
    for processes in ("1", "4"):
        folder = str(tmp_path / processes)
        simulated = ["simulate", "--processes", processes, *ROUNDS, "--run", folder]
        assert CliRunner().invoke(main, simulated).exit_code == 0
    digests = {digest_in(tmp_path / each) for each in ("live", "1", "4")}
    assert len(digests) == 1
    assert digests != {""}
    assert ledger_in(tmp_path / "1") == ledger_in(tmp_path / "4")


def test_ctrl_c_ends_it_and_its_training_processes(tmp_path):
    folder = tmp_path / "run"
    with subprocess.Popen(
        [*FEDMQ, "simulate", "--set", "run.versions=100000", "--clients", "20", "--processes", "2",
         "--set", "run.evaluate_every=1", "--run", str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            lines = iter(process.stdout.readline, "")
            next(line for line in lines if line.startswith("simulated "))
            family = psutil.Process(process.pid).children(recursive=True)
            assert len(family) >= 2
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            rest = process.communicate(timeout=50)[0]
        finally:
            process.kill()
    assert process.returncode == INTERRUPTED
    assert "stopped by SIGINT" in rest
    assert "Traceback" not in rest
    assert "to start over, use another folder" in rest
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    psutil.wait_procs(family, timeout=10)
    assert not [each for each in family if each.is_running() and each.status() != "zombie"]
