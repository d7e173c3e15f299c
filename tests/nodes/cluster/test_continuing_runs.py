"""Real runs that are killed and resumed by the same command, or extended."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedmq.broker.ledger.entries import (
    MESSAGES,
    PAYLOAD,
    Accepted,
    Ended,
    segment_numbers,
    segment_path,
)
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.records import MAGIC
from fedmq.nodes.cli.main import main
from tests.permissions import readable_by_others

pytestmark = pytest.mark.end_to_end

FEDMQ = (sys.executable, "-P", "-m", "fedmq.nodes")
ROUNDS = {
    "run.versions": 8,
    "run.evaluate_every": 3,
    "run.checkpoint_s": 0.0,
    "problem.clients": 4,
    "problem.examples": 400,
    "schedule.name": "rounds",
    "schedule.fraction": 0.5,
    "algorithm.epochs": 1,
    "worker.count": 2,
}


def command(run: Path, settings: dict[str, object]) -> list[str]:
    words = [f"{key}={value}" for key, value in settings.items()]
    return [*FEDMQ, "cluster", "--run", str(run), *(x for each in words for x in ("--set", each))]


def to_end(words: Sequence[str], code: int = 0) -> str:
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=120, check=False, cwd=Path.cwd()
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert "Traceback" not in output
    return output


def kinds(run: Path) -> list[str]:
    """What the ledger holds so far: kinds of messages, and of entries that are none."""
    return [
        each.read().kind if isinstance(each, Accepted) else type(each).__name__
        for each in read_entries(run / "ledger")
    ]


def kill_when(words: Sequence[str], ready) -> None:
    """Begin a run, and kill every process of it as soon as something is so."""
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not ready() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """The summary of a run that nothing has interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    to_end(command(run, ROUNDS))
    return json.loads((run / "summary.json").read_text())


def test_a_run_that_was_killed_again_and_again_ends_at_the_same_model(whole, tmp_path) -> None:
    run, words = tmp_path / "run", command(tmp_path / "run", ROUNDS)
    moments = [
        lambda: (run / "config.toml").exists(),
        lambda: (run / "ledger").is_dir(),
        lambda: kinds(run).count("task") >= 1,
        lambda: kinds(run).count("version") >= 3,
        lambda: kinds(run).count("version") >= 5 and kinds(run)[-1] == "result",
    ]
    for ready in moments:
        kill_when(words, ready)
    [torn] = segment_numbers(run / "ledger", MESSAGES)
    with segment_path(run / "ledger", MESSAGES, torn).open("ab") as file:
        file.write(b"\x00\x01half a record")
    output = to_end(words)
    assert "resuming run " in output

    summary = json.loads((run / "summary.json").read_text())
    assert summary["model_digest"] == whole["model_digest"]
    assert summary["versions"] == 8
    for name in ("used", "stale", "refused", "unused", "failed", "unaccepted"):
        assert summary["results"][name] == whole["results"][name], name
    found, expected = ([point["version"] for point in each["curve"]] for each in (summary, whole))
    assert found == expected
    for way in ("down", "up"):
        sizes = summary["bytes"][way]
        assert sizes["payload"] >= whole["bytes"][way]["payload"]
        assert sizes["wire"] > 0.5 * sizes["payload"], "it counts all brokers"
    assert summary["final_accuracy"] == whole["final_accuracy"]
    assert kinds(run).count("run") == 1
    assert (
        len({entry.run for entry in read_entries(run / "ledger") if isinstance(entry, Ended)}) == 1
    )
    for more in ([], ["--worker", "worker-0"]):
        to_end([*FEDMQ, "replay", str(run), *more])
    assert readable_by_others(run) == []


def test_a_run_that_was_stopped_in_the_middle_of_a_round_ends_at_the_same_model(
    whole, tmp_path
) -> None:
    """Nobody closes the round without the results that its workers were at."""
    run = tmp_path / "run"
    slow = command(run, {**ROUNDS, "worker.slowdown": 30.0})
    with subprocess.Popen(slow, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as one:
        deadline = time.monotonic() + 60
        while not (run / "ledger").is_dir() or kinds(run).count("task") < 6:
            assert one.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        one.send_signal(signal.SIGINT)
    assert one.returncode == 130
    assert "left" not in kinds(run)
    to_end(command(run, ROUNDS))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["model_digest"] == whole["model_digest"]
    assert summary["results"]["used"] == whole["results"]["used"]


def test_a_run_that_was_killed_at_any_moment_resumes_alone(whole, tmp_path) -> None:
    seed = random.randrange(1 << 30)  # noqa: S311 - a moment, not a secret
    print(f"seed {seed}")  # noqa: T201 - to find the moment again
    moment = random.Random(seed).uniform(1.0, 9.0)  # noqa: S311
    run, start = tmp_path / "run", time.monotonic()
    kill_when(command(run, ROUNDS), lambda: time.monotonic() - start > moment)
    if not (run / "config.toml").exists():
        to_end(command(run, ROUNDS))
    to_end([*FEDMQ, "cluster", "--run", str(run)])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["model_digest"] == whole["model_digest"]


def test_an_ended_run_is_shown_and_is_extended_when_more_is_asked_for(tmp_path) -> None:
    run = tmp_path / "run"
    to_end(command(run, {**ROUNDS, "run.versions": 3}))
    before = json.loads((run / "summary.json").read_text())
    model = (run / "model.npz").read_bytes()
    entries = len(kinds(run))

    (run / "summary.json").unlink()
    output = to_end(command(run, {**ROUNDS, "run.versions": 3}))
    assert "has ended" in output
    assert before["model_digest"] in output
    assert len(kinds(run)) == entries
    assert json.loads((run / "summary.json").read_text()) == before

    # The other number of workers is this host's business, and their clients move.
    words = command(run, {**ROUNDS, "run.versions": 5, "worker.count": 3})
    kill_when(words, lambda: "continued" in kinds(run))
    assert "resuming run " in to_end(words)
    after = json.loads((run / "summary.json").read_text())
    assert after["versions"] == 5
    assert after["run"] == before["run"]
    assert [point["version"] for point in after["curve"]] == [0, 3, 5]
    assert after["results"]["used"] == 10
    assert after["wall_s"] > before["wall_s"]
    for way in ("down", "up"):
        for what in ("payload", "wire"):
            assert after["bytes"][way][what] > before["bytes"][way][what]
    assert after["nodes"]["aggregator"]["sessions"] >= 2
    assert (run / "model.npz").read_bytes() != model
    assert kinds(run).count("finished") == kinds(run).count("Ended") == 2
    assert "versions = 5" in (run / "config.toml").read_text()
    for more in ([], ["--worker", "worker-0"], ["--from-checkpoint"]):
        to_end([*FEDMQ, "replay", str(run), *more])
    stats = to_end([*FEDMQ, "trace", "stats", str(run)])
    assert "ended: 5 versions committed" in stats
    assert "results 10 = used 10 + stale 0 + rejected 0 + unused 0" in stats
    assert "holds" in stats

    output = to_end(command(run, {**ROUNDS, "run.versions": 4}), 2)
    assert "run.versions: expected at least 5, " in output
    assert "already has, got 4" in output


def test_a_run_that_keeps_its_headers_alone_can_be_read_but_not_replayed(tmp_path) -> None:
    run = tmp_path / "run"
    kept = {"broker.retain": "headers", "broker.durability": "power"}
    to_end(command(run, {**ROUNDS, **kept, "run.versions": 2}))
    [last] = segment_numbers(run / "ledger", PAYLOAD)
    assert segment_path(run / "ledger", PAYLOAD, last).stat().st_size == len(MAGIC)
    assert readable_by_others(run) == []
    for words in (["trace", "ls"], ["trace", "stats"], ["ledger", "check"]):
        result = CliRunner().invoke(main, [*words, str(run)])
        assert result.exit_code == 0, result.output
    assert "deleted by the retention policy" in result.output
    for more in ([], ["--worker", "worker-0"], ["--set", "algorithm.server_lr=0.5"]):
        result = CliRunner().invoke(main, ["replay", str(run), *more])
        assert result.exit_code == 2
        [sentence] = result.stderr.splitlines()
        assert sentence.startswith("fedmq: cannot replay run ")
        assert sentence.endswith("its payload segment was deleted (see broker.retain)")


def test_a_runs_own_configuration_runs_again_in_a_new_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {**ROUNDS, "run.versions": 1, "run.id": "first"}
    run = tmp_path / "runs" / "first"
    words = command(run, settings)
    to_end([*words[: words.index("--run")], *words[words.index("--run") + 2 :]])
    output = to_end([*FEDMQ, "cluster", str(run / "config.toml")])
    assert "resuming" not in output
    [other] = [each for each in (tmp_path / "runs").iterdir() if each.name != "first"]
    first, second = (json.loads((each / "summary.json").read_text()) for each in (run, other))
    assert first["run"] == "first"
    assert second["run"] == other.name
    assert first["model_digest"] == second["model_digest"]
    for again in ([str(run / "config.toml"), "--run", str(run)], ["--set", "run.id=first"]):
        assert "run first has ended" in to_end([*FEDMQ, "cluster", *again])


def test_a_folder_in_use_is_refused_at_once_and_a_broker_reports_what_is_in_its_ledger(
    tmp_path,
) -> None:
    run = tmp_path / "run"
    words = command(run, {**ROUNDS, "run.versions": 1000})
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while "version" not in kinds(run) and process.poll() is None:
            time.sleep(0.05)
        began = time.monotonic()
        output = to_end(words, 2)
        assert f"in use by another fedmq command, process {process.pid}" in output
        assert time.monotonic() - began < 10
        os.kill(process.pid, signal.SIGKILL)  # its nodes end by themselves, and are waited for
        process.wait()
        output = to_end(command(run, {**ROUNDS, "run.versions": kinds(run).count("version") + 1}))
        assert "extending run " in output
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
