"""``fedmq sweep``: options, table and CSV, mistakes; an interrupt ends what runs."""

import csv
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from fedmq.nodes.cli.main import main
from tests.nodes.api.commands import Commands


def sweep(*words: str, code: int = 0):
    result = CliRunner().invoke(main, ["sweep", *words])
    assert result.exit_code == code, result.output
    return result


def test_the_table_goes_to_standard_output_and_progress_to_standard_error(
    commands: Commands,
) -> None:
    Path("run.toml").write_text("[run]\nversions = 3\n")
    codecs = "codec.up=raw,quantize(4, 256)"
    result = sweep("run.toml", "--over", codecs, "--seeds", "2", "--run", "s")
    assert len(commands.made) == 4
    head, *rows = result.stdout.splitlines()
    assert head.split() == ["runs", "accuracy", "best", "used", "time", "up", "down"]
    assert rows[0].startswith("up raw")
    assert len(result.stderr.splitlines()) == 5
    assert Path("s", "sweep.csv").read_text().count("\n") == 5
    again = sweep("run.toml", "--seeds", "2", "--over", "codec.up=raw", "--run", "s", "--csv")
    assert len(commands.made) == 4
    rows = list(csv.DictReader(io.StringIO(again.stdout)))
    assert [row["run.seed"] for row in rows] == ["0", "1"]


def test_a_failed_run_gives_exit_code_1(commands: Commands) -> None:
    commands.codes = {"seed=0": 1}
    result = sweep("--seeds", "2", "--run", "s", "--set", "run.versions=3", code=1)
    assert "failed: out of luck (seed=0)" in result.stdout


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((), "sweep: expected --over KEY=A,B or --seeds N"),
        (("--seeds", "2", "--over", "run.seed=1"), "--over run.seed gives the seeds already"),
        (("--over", "algorithm.lr"), "expected table.key=value,value"),
        (("--over", "run.sede=1"), "unknown key 'run.sede'"),
        (("--seeds", "1", "--set", "run.seed"), "--set run.seed: expected table.key=value"),
        (("--seeds", "1", "--simulate", "--workers", "2"), "--workers: a simulation has no"),
        (("--seeds", "1", "--processes", "2"), "--processes: expected --simulate, too"),
        (("missing.toml", "--seeds", "1"), "cannot read missing.toml"),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(commands: Commands, words, error: str) -> None:
    result = sweep(*words, code=2)
    assert error in result.stderr
    assert result.stderr.count("\n") == 1
    assert commands.made == []


@pytest.mark.end_to_end
def test_ctrl_c_ends_the_run_in_progress_and_shows_the_table(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "fedmq.nodes", "sweep", "--seeds", "2", "--run", "s"]
    settings = ["--set", "run.versions=100000", "--workers", "1"]
    with subprocess.Popen(
        [*command, *settings],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        until = time.monotonic() + 60
        while not list((tmp_path / "s" / "seed=0" / "ledger").glob("messages-*.log")):
            assert time.monotonic() < until, "the first run did not start"
            time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "1 of 2  seed=0  interrupted" in output
    assert "interrupted: a signal stopped it (seed=0)" in output
    assert "not started (seed=1)" in output
    assert f"continue with the same command and --run {tmp_path / 's'}" in output
    assert psutil.wait_procs(family, timeout=10)[1] == []
