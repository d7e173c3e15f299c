"""``fedmq simulate``: its folder, screens and exit codes; other commands on its folder."""

import io
import json
import os
import re
import signal
import time

import pytest
from click.testing import CliRunner
from rich.console import Console

from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.ledger.reader import read_entries
from fedmq.nodes.api.run import Run
from fedmq.nodes.cli.main import main
from fedmq.nodes.errors import ConfigError, NodeError
from fedmq.nodes.history.run import RunHistory, runs_of
from fedmq.nodes.population.table import STARTS_AT
from fedmq.nodes.process.signals import INTERRUPTED
from fedmq.nodes.run_folder.folder import look_into
from fedmq.nodes.simulation import command as command_module
from fedmq.nodes.simulation import view as view_module
from fedmq.nodes.simulation.trainers import InlineTrainer
from fedmq.nodes.simulation.view import SimulationView

SMALL = (
    *("--set", "run.id=small", "--set", "run.versions=3", "--clients", "50"),
    *("--set", "simulation.learner=curve", "--set", "simulation.compute=lognormal(600, 1)"),
)


def fedmq(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    result = fedmq("simulate", *SMALL, "--run", folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


def summary_in(folder):
    return json.loads((folder / "summary.json").read_text())


def ledger_bytes(folder):
    return {each.name: each.read_bytes() for each in folder.glob("ledger/*-*.log")}


# ---- what it writes and shows


def test_the_folder_is_that_of_a_run_with_virtual_times(finished) -> None:
    folder, _ = finished
    names = {each.name for each in folder.iterdir()}
    assert names == {
        *("config.toml", "ledger", "model.npz", "model.safetensors"),
        *("simulation.log", "summary.json"),
    }
    summary = summary_in(folder)
    assert (summary["status"], summary["versions"], summary["run"]) == ("finished", 3, "small")
    entries = list(read_entries(folder / "ledger"))
    times = [each.at for each in entries if isinstance(each, Accepted)]
    assert times == sorted(times)
    assert times[0] == STARTS_AT
    assert summary["wall_s"] == pytest.approx(times[-1] - STARTS_AT, abs=0.001)
    assert summary["wall_s"] > 60
    assert 0 < summary["simulated_in_s"] < 60
    contents = look_into(folder)
    assert contents.simulated
    assert contents.begun == STARTS_AT


def test_the_closing_table_has_both_times(finished) -> None:
    _, output = finished
    assert "50 simulated clients, trained in this process" in output
    assert re.search(r"^time +simulated \d+ min \d+ s in \d+\.\d s, first task after 0\.0 s$",
                     output, re.MULTILINE)  # fmt: skip
    assert max(map(len, output.splitlines()[1:-1])) <= 200


def test_the_same_command_writes_the_same_ledger_to_the_byte(finished, tmp_path) -> None:
    folder, _ = finished
    again = tmp_path / "again"
    assert fedmq("simulate", *SMALL, "--run", again).exit_code == 0
    assert ledger_bytes(again) == ledger_bytes(folder)
    assert summary_in(again)["model_digest"] == summary_in(folder)["model_digest"]


def test_trace_shows_virtual_times(finished) -> None:
    folder, _ = finished
    shown = fedmq("trace", "ls", folder, "--kind", "version")
    assert shown.exit_code == 0
    times = [float(line.split()[1]) for line in shown.output.splitlines() if " version " in line]
    history = runs_of(read_entries(folder / "ledger"), STARTS_AT)["small"]
    assert len(times) == 3
    assert times[-1] == pytest.approx(history.wall_s, abs=60)
    assert times == sorted(times)
    assert times[0] > 60


@pytest.mark.parametrize("options", [(), ("--worker", "population-0"), ("--worker", "evaluator")])
def test_a_replay_agrees(finished, options) -> None:
    folder, _ = finished
    result = fedmq("replay", folder, *options)
    assert result.exit_code == 0, result.output
    assert "match the record" in result.output


def test_the_ledger_is_sound(finished) -> None:
    folder, _ = finished
    result = fedmq("ledger", "check", folder)
    assert result.exit_code == 0
    assert "sound" in result.output


def test_faults_of_the_configuration_happen(tmp_path) -> None:
    folder = tmp_path / "run"
    settings = ("--set", "simulation.faults.dropout=0.5", "--set", "simulation.nodes=2")
    crashes = ("--set", "simulation.faults.node_crash=60", "--set", "run.versions=20")
    quick = ("--set", "simulation.compute=lognormal(6, 1)", "--set", "simulation.faults.away_s=5")
    result = fedmq("simulate", *SMALL, *settings, *crashes, *quick, "--run", folder)
    assert result.exit_code == 0, result.output
    summary = summary_in(folder)
    assert summary["results"]["failed_by_code"]["dropped"] > 10
    assert summary["nodes"]["population-0"]["sessions"] > 1
    assert "population-1" in summary["nodes"]


# ---- the same folder again


def test_the_same_command_shows_a_finished_run(finished) -> None:
    folder, output = finished
    before = ledger_bytes(folder)
    for options in (SMALL, ()):
        shown = fedmq("simulate", *options, "--run", folder)
        assert shown.exit_code == 0
        assert "nothing was started" in shown.output
        assert "choose another folder with --run" in shown.output
        time_row = next(line for line in output.splitlines() if line.startswith("time"))
        assert time_row in shown.output
    assert ledger_bytes(folder) == before


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("run.versions=9", "run.versions expected 3, got 9"),
        ("simulation.compute=5", "simulation.compute expected 'lognormal(600, 1)', got 5"),
        ("simulation.faults.dropout=0.1", "simulation.faults.dropout expected 0.0, got 0.1"),
        ("schedule.name=rounds", "schedule.name expected 'buffered', got 'rounds'"),
    ],
)
def test_another_configuration_in_the_folder_is_an_error(finished, setting, expected) -> None:
    folder, _ = finished
    result = fedmq("simulate", *SMALL, "--set", setting, "--run", folder)
    assert result.exit_code == 2
    assert expected in result.output


def test_simulated_and_live_runs_do_not_share_a_folder(finished, tmp_path) -> None:
    folder, _ = finished
    result = fedmq("cluster", "--run", folder)
    assert result.exit_code == 2
    assert result.output == f"fedmq: --run: {folder} has a simulated run: choose another folder\n"
    config = (folder / "config.toml").read_text()
    live = tmp_path / "live"
    (live / "ledger").mkdir(parents=True)
    (live / "config.toml").write_text(config.replace("# simulated = true\n", ""))
    for name, data in ledger_bytes(folder).items():
        (live / "ledger" / name).write_bytes(data)
    result = fedmq("simulate", "--run", live)
    assert result.exit_code == 2
    assert f"{live} has a run that was not simulated" in result.output


def test_the_configuration_in_the_folder_simulates_the_run_again(finished, tmp_path) -> None:
    folder, _ = finished
    again = tmp_path / "again"
    result = fedmq("simulate", folder / "config.toml", "--set", "run.id=small", "--run", again)
    assert result.exit_code == 0, result.output
    assert ledger_bytes(again) == ledger_bytes(folder)


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--set", "simulation.speed=3"), "unknown key 'simulation.speed'"),
        (("--set", "simulation.compute=-1"), "simulation.compute"),
        (("--set", "simulation.latency=fast(3)"), "simulation.latency"),
        (("--set", "simulation.devices=none.csv"), "none.csv"),
        (("--clients", "0"), "--clients"),
        (("--processes", "-1"), "--processes"),
        (("--on", "spark"), "--on: expected one of ray"),
        (("--on", "ray", "--processes", "2"), "--processes: not used with --on ray, got 2"),
        (
            ("--set", "schedule.name=rounds", "--set", "schedule.min_results=60"),
            "schedule.min_results",
        ),
        (("--set", "algorithm.name=fedbest"), "algorithm.name"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, expected, tmp_path) -> None:
    folder = tmp_path / "run"
    result = fedmq("simulate", *SMALL, *arguments, "--run", folder)
    assert result.exit_code == 2
    assert expected in result.output
    assert len(result.output.splitlines()) == 1
    assert not folder.exists()


def test_a_run_that_fails_exits_with_1_and_the_reason(tmp_path) -> None:
    folder = tmp_path / "run"
    lost = ("--set", "simulation.faults.dropout=0.99", "--set", "run.failures=20")
    arguments = ("simulate", *SMALL, *lost, "--run", folder)
    result = fedmq(*arguments)
    assert result.exit_code == 1
    assert "fedmq: the run failed: " in result.output
    assert summary_in(folder)["status"] == "failed"
    again = fedmq(*arguments)
    assert again.exit_code == 1
    assert "nothing was started" in again.output


def test_an_unexpected_error_leaves_a_complete_folder(tmp_path, monkeypatch) -> None:
    def broken(*_):
        raise KeyError("unexpected")

    monkeypatch.setattr(command_module.PopulationRun, "run_to_end", broken)
    folder = tmp_path / "run"
    result = fedmq("simulate", *SMALL, "--run", folder)
    assert result.exit_code == 1
    assert "crashed: KeyError: 'unexpected'" in result.output
    assert str(folder / "simulation.log") in result.output
    assert "test_command.py" in (folder / "simulation.log").read_text()
    summary = summary_in(folder)
    assert summary["status"] == "failed"
    assert "crashed: KeyError: 'unexpected'" in summary["ended"]
    assert Run(folder).status == "failed"


@pytest.mark.parametrize(
    ("error", "code"), [(NodeError("nothing happens"), 1), (ConfigError("bad key"), 2)]
)
def test_a_run_that_cannot_go_on_has_failed_at_its_virtual_time(
    tmp_path, monkeypatch, error, code
) -> None:
    def run_to_end(self, _):
        while self.now_s < 500.0:
            self.network.step()
        raise error

    monkeypatch.setattr(command_module.PopulationRun, "run_to_end", run_to_end)
    folder = tmp_path / "run"
    result = fedmq("simulate", *SMALL, "--set", "run.versions=1000", "--run", folder)
    assert result.exit_code == code
    assert re.search(rf"^ended +{error}$", result.output, re.MULTILINE)
    summary = summary_in(folder)
    assert (summary["status"], summary["ended"]) == ("failed", str(error))
    assert summary["wall_s"] >= 500.0


# ---- signals


def interrupted(folder, *options):
    result = fedmq("simulate", *SMALL, *options, "--run", folder)
    assert result.exit_code == INTERRUPTED, result.output
    assert "stopped by SIGINT" in result.output
    assert "to start over, use another folder" in result.output
    assert summary_in(folder)["status"] == "interrupted"
    assert fedmq("ledger", "check", folder).exit_code == 0
    assert fedmq("replay", folder).exit_code == 0
    again = fedmq("simulate", *SMALL, *options, "--run", folder)
    assert again.exit_code == 2
    assert "a simulation cannot be resumed" in again.output
    assert str(folder) in again.output


def test_a_signal_between_two_steps_ends_it_cleanly(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(command_module, "_REFRESH_S", 0.0)
    show = SimulationView.show

    def show_and_stop(self, history):
        show(self, history)
        if history.version == 2 and history.ended is None:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(SimulationView, "show", show_and_stop)
    interrupted(tmp_path / "run", "--set", "run.versions=1000")
    assert summary_in(tmp_path / "run")["versions"] == 2


def test_a_signal_interrupts_the_training(tmp_path, monkeypatch) -> None:
    def training(self, action):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(InlineTrainer, "_compute", training)
    began = time.monotonic()
    interrupted(tmp_path / "run")
    assert time.monotonic() - began < 30


# ---- the view


def shown_by(history, *, is_terminal, clock=None):
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=80)
    with SimulationView(console, "a run", pytest.fail, clock or time.monotonic) as view:
        console.print(view.render(history, waits=True))
        return view, file.getvalue()


def large_history(finished):
    folder, _ = finished
    [history] = runs_of(read_entries(folder / "ledger"), STARTS_AT).values()
    history.now += 40 * 86_400
    history.payload_down = history.payload_up = 999_000_000
    history.outcomes.used = history.outcomes.results = 1_000_000
    return history


def test_the_view_fits_80_columns(finished) -> None:
    _, text = shown_by(large_history(finished), is_terminal=False)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "40 d 0 h" in text
    assert "…" not in text


def test_the_view_never_goes_through_the_clients(finished, monkeypatch) -> None:
    for name in ("missing_clients", "working_clients", "at_work"):
        monkeypatch.setattr(RunHistory, name, property(lambda _: pytest.fail("slow")))
    view, _ = shown_by(large_history(finished), is_terminal=True)
    assert "waiting" not in view.line(large_history(finished), waits=True)


def test_the_rate_is_that_of_the_last_seconds(finished) -> None:
    history, now = large_history(finished), [0.0]
    history.outcomes.results = 0
    console = Console(file=io.StringIO())
    view = SimulationView(console, "a run", pytest.fail, lambda: now[0])
    rates = []
    for second in range(1, 21):
        now[0] = float(second)
        history.outcomes.results += 100 if second <= 10 else 10
        rates.append(int(view.line(history, waits=False).split("results/s ")[1].split()[0]))
    assert rates[9] == 100
    assert rates[-1] == 10
    assert view_module._RATE_OVER_S < 10
