"""Sweeps: what is made, skipped, resumed and refused; the table."""

import csv
import io
import os
import re
import threading
from pathlib import Path

import pytest

import fedmq
from fedmq.nodes.api.sweep import Sweeper
from fedmq.nodes.api.sweep_table import failure_lines, lines, row_of
from fedmq.nodes.errors import FolderInUse
from fedmq.nodes.run_folder.folder import held
from tests.nodes.api.commands import Commands

GRID = {"algorithm.lr": [0.1, 0.01], "run.seed": [0, 1]}


def test_each_combination_runs_in_a_folder_of_its_own(commands: Commands, tmp_path: Path) -> None:
    swept = fedmq.sweep({"run.versions": 3}, GRID, folder="s")
    assert commands.made == ["lr=0.1,seed=0", "lr=0.1,seed=1", "lr=0.01,seed=0", "lr=0.01,seed=1"]
    assert [each.status for each in swept] == ["finished"] * 4
    assert swept.folder == tmp_path / "s"
    assert swept.runs[2].settings == {"algorithm.lr": 0.01, "run.seed": 0}
    assert swept.runs[2].run.folder == tmp_path / "s" / "lr=0.01,seed=0"
    assert swept.failed == []
    table = swept.table
    assert table["algorithm.lr"].tolist() == [0.1, 0.1, 0.01, 0.01]
    assert (table["bytes_up"] > 0).all()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "s" / "sweep.csv").read_text())))
    assert [row["folder"] for row in rows] == commands.made
    assert rows[0]["status"] == "finished"


def test_what_has_finished_is_not_repeated(commands: Commands) -> None:
    fedmq.sweep({}, {"run.seed": [0, 1]}, folder="s")
    fedmq.sweep({}, {"run.seed": [0, 1, 2]}, folder="s")
    assert commands.made == ["seed=0", "seed=1", "seed=2"]


def test_a_failed_run_stops_no_other_and_is_made_again(commands: Commands) -> None:
    commands.codes = {"seed=0": 1, "seed=1": 2}
    swept = fedmq.sweep({}, {"run.seed": [0, 1, 2]}, folder="s")
    assert [each.status for each in swept] == ["failed", "invalid", "finished"]
    assert [each.reason for each in swept] == ["out of luck", "out of luck", ""]
    assert "failed: out of luck (seed=0)" in repr(swept)
    commands.codes = {}
    again = fedmq.sweep({}, {"run.seed": [0, 1, 2]}, folder="s")
    assert commands.made[3:] == ["seed=0", "seed=1"]
    assert again.runs[1].status == "finished"


def test_another_configuration_in_the_folder_is_an_error_that_names_the_key(
    commands: Commands,
) -> None:
    fedmq.sweep({"algorithm.lr": 0.1}, {"run.seed": [0]}, folder="s")
    expected = r"seed=0 has another configuration: algorithm\.lr is 0\.1 there and 0\.2 here"
    with pytest.raises(fedmq.ConfigError, match=expected):
        fedmq.sweep({"algorithm.lr": 0.2}, {"run.seed": [0]}, folder="s")
    with pytest.raises(fedmq.ConfigError, match="made with how='run', got 'simulate'"):
        fedmq.sweep({"algorithm.lr": 0.1}, {"run.seed": [0]}, how="simulate", folder="s")
    fedmq.sweep({"algorithm.lr": 0.1, "worker.count": 2}, {"run.seed": [0]}, folder="s")
    assert len(commands.made) == 1
    Path("s", "sweep.json").write_text("[]")
    with pytest.raises(fedmq.ConfigError, match=r"sweep\.json: it is no record of a sweep"):
        fedmq.sweep({}, {"run.seed": [0]}, folder="s")


def test_another_goal_extends_the_runs_until_they_reach_it(commands: Commands) -> None:
    over = {"run.seed": [0, 1]}
    fedmq.sweep({"run.versions": 3}, over, folder="s")
    commands.codes = {"seed=0": 1}
    fedmq.sweep({"run.versions": 4}, over, folder="s")
    assert commands.made[2:] == ["seed=0", "seed=1"]
    commands.codes = {}
    fedmq.sweep({"run.versions": 4}, over, folder="s")
    assert commands.made[4:] == ["seed=0"]
    fedmq.sweep({"run.versions": 3}, over, folder="t", how="simulate")
    with pytest.raises(fedmq.ConfigError, match=r"run\.versions is 3 there and 4 here"):
        fedmq.sweep({"run.versions": 4}, over, folder="t", how="simulate")


def test_an_unfinished_simulation_starts_over(commands: Commands) -> None:
    commands.codes = {"seed=0": 130}
    fedmq.sweep({}, {"run.seed": [0]}, how="simulate", folder="s", processes=2)
    assert Path("s", "seed=0", "ledger").exists()
    there: list[bool] = []
    commands.codes, commands.before = {}, lambda name: there.append(Path("s", name).exists())
    assert fedmq.sweep({}, {"run.seed": [0]}, how="simulate", folder="s").failed == []
    assert there == [False]


@pytest.mark.parametrize("how", ["run", "simulate"])
def test_a_run_that_ended_before_it_began_is_made_again(commands: Commands, how) -> None:
    folder = Path("s", "seed=0", "ledger")
    folder.mkdir(parents=True)
    (folder / f"messages-{0:020}.log").touch()
    commands.codes = {"seed=0": 1}
    swept = fedmq.sweep({}, {"run.seed": [0]}, how=how, folder="s")
    assert [each.status for each in swept] == ["failed"]
    assert commands.made == ["seed=0"]


def test_a_date_in_the_configuration_is_the_same_date_again(commands: Commands) -> None:
    Path("run.toml").write_text("[problem]\nname = 'my_problem:Points'\nday = 2026-01-02\n")
    for _ in range(2):
        fedmq.sweep("run.toml", {"run.seed": [0]}, folder="s")
    assert commands.made == ["seed=0"]


def test_an_interrupt_ends_what_runs_and_starts_no_more(commands: Commands) -> None:
    sweeper = Sweeper({}, {"run.seed": [0, 1, 2]}, "run", "s", show=lambda _: None)

    def interrupt(name: str) -> None:
        sweeper.interrupt()
        assert commands.interrupted.wait(10)

    commands.before, commands.codes = interrupt, {"seed=0": 130}
    sweeper.work()
    assert commands.made == ["seed=0"]
    assert [each.status for each in sweeper.sweep] == ["interrupted", "not started", "not started"]


def test_several_runs_at_the_same_time(commands: Commands) -> None:
    together = threading.Barrier(2, timeout=10)
    commands.before = lambda _: together.wait()
    assert fedmq.sweep({}, {"run.seed": [0, 1]}, folder="s", jobs=2).failed == []


def in_use(folder: Path) -> str:
    return f"--run: {folder.absolute()} is in use by another fedmq command, process {os.getpid()}"


def test_a_folder_that_another_sweep_uses_is_an_error_and_stays_unchanged(
    commands: Commands,
) -> None:
    fedmq.sweep({}, {"run.seed": [0]}, folder="s")
    before = Path("s", "sweep.json").read_text()
    with (
        held(Path("s")),
        pytest.raises(fedmq.ConfigError, match=re.escape(in_use(Path("s")))),
    ):
        fedmq.sweep({}, {"run.seed": [1]}, folder="s")
    assert Path("s", "sweep.json").read_text() == before
    locked = []

    def try_to_lock(_: str) -> None:
        with pytest.raises(FolderInUse), held(Path("s")):
            pass
        locked.append(True)

    commands.before = try_to_lock
    fedmq.sweep({}, {"run.seed": [1]}, folder="s")
    assert locked  # while it made a run


@pytest.mark.parametrize("how", ["run", "simulate"])
def test_a_run_that_another_command_makes_is_in_use_not_invalid(commands: Commands, how) -> None:
    with held(Path("s", "seed=0")):
        swept = fedmq.sweep({}, {"run.seed": [0, 1]}, how=how, folder="s")
    assert [each.status for each in swept] == ["in use", "finished"]
    assert swept.runs[0].reason == in_use(Path("s", "seed=0"))
    assert commands.made == ["seed=1"]


def test_the_csv_has_every_run_in_the_folder(commands: Commands) -> None:
    fedmq.sweep({}, {"algorithm.lr": [0.1, 0.2]}, folder="s")
    commands.codes = {"seed=0": 2}
    swept = fedmq.sweep({}, {"run.seed": [0]}, folder="s")
    fedmq.sweep({}, {"algorithm.lr": [0.2]}, folder="s")
    rows = list(csv.DictReader(io.StringIO(Path("s", "sweep.csv").read_text())))
    assert [(row["algorithm.lr"], row["run.seed"], row["status"]) for row in rows] == [
        ("0.1", "", "finished"),
        ("0.2", "", "finished"),
        ("", "0", "not started"),
    ]
    assert rows[0]["accuracy"]
    assert swept.table["folder"].tolist() == ["seed=0"]


def test_progress_is_one_line_for_each_run(commands: Commands, capsys) -> None:
    commands.codes = {"seed=1": 1}
    fedmq.sweep({}, {"run.seed": [0, 1]}, folder="s", progress=True)
    first, one, two = capsys.readouterr().err.splitlines()
    assert first == f"2 runs in {Path('s').absolute()}"
    assert re.fullmatch(r"1 of 2  seed=0  finished  accuracy \d+\.\d\d%", one)
    assert re.fullmatch(r"2 of 2  seed=1  failed  accuracy \d+\.\d\d%  out of luck", two)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"how": "walk"}, "how: expected one of run, simulate, got 'walk'"),
        ({"jobs": 0}, "jobs: expected at least 1, got 0"),
        ({"how": "simulate", "workers": 2}, 'workers: expected how="run"'),
        ({"processes": 2}, 'processes: expected how="simulate"'),
    ],
)
def test_a_mistake_is_one_sentence(commands: Commands, more, error: str) -> None:
    with pytest.raises(fedmq.ConfigError, match=error):
        fedmq.sweep({}, {"run.seed": [0]}, **more)
    assert commands.made == []


def summary(accuracy: float | None, **metrics: float) -> dict:
    return {
        "versions": 150,
        "final_accuracy": accuracy,
        "best_accuracy": accuracy,
        "metrics": metrics,
        "wall_s": 1234.56,
        "bytes": {"up": {"payload": 65_900_000}, "down": {"payload": 68_800_000}},
        "results": {"used": 750},
    }


def test_the_table_has_mean_and_deviation_over_seeds_in_80_columns() -> None:
    keys = ("algorithm.lr", "codec.up", "run.seed")
    rows = [
        row_of(dict(zip(keys, (lr, up, seed), strict=True)), "finished", summary(lr + seed / 100))
        for lr in (0.1, 0.5)
        for up in ("raw", "hadamard | quantize(4)")
        for seed in range(3)
    ]
    rows[-1] |= {"status": "failed"}
    shown = lines(rows, keys)
    assert max(map(len, shown)) <= 80
    text = "\n".join(shown)
    assert "lr 0.1, up raw" in text
    assert "11.00% ± 1.00" in text
    assert "2 of 3" in text
    assert "50.50% ± 0.71" in text
    assert "65.9 MB" in text


def test_a_table_of_a_metric_that_is_not_accuracy() -> None:
    rows = [
        row_of({"run.seed": seed}, "finished", summary(None, rmse=0.5 + seed, status=1.0))
        for seed in range(2)
    ]
    assert rows[0]["metrics.status"] == 1.0
    head, body = lines(rows, ["run.seed"])
    assert "rmse" in head
    assert "1 ± 0.71" in body
    assert "best" not in head


def test_a_table_without_any_result() -> None:
    rows = [row_of({"run.seed": 0}, "invalid", None)]
    assert "0 of 1" in lines(rows, ["run.seed"])[1]
    same = ("invalid", "a reason " * 20)
    found = failure_lines({"seed=0": same, "seed=1": same, "seed=2": ("not started", "")})
    assert max(map(len, found)) <= 80
    assert found[-2].endswith("(seed=0 and 1 more)")
    assert found[-1] == "not started (seed=2)"
