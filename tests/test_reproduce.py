"""``make reproduce`` on the embedded digits."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "benchmarks" / "reproduce.py"
TINY = (
    "problem.name=mnist-mini",
    "problem.model=2nn",
    "problem.clients=4",
    "problem.examples=200",
    "schedule.fraction=0.5",
    "run.versions=2",
)
CELLS = [
    "2nn-iid",
    "2nn-iid-fedsgd",
    "2nn-shards",
    "2nn-shards-fedsgd",
    "cnn-iid",
    "cnn-iid-fedsgd",
    "one-shot",
    "combined",
    "fedbuff-iid",
]


def reproduce(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", str(PROGRAM), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def tiny(*more: str) -> list[str]:
    return [each for setting in (*TINY, *more) for each in ("--set", setting)]


@pytest.mark.end_to_end
def test_all_and_hours_add_cells_with_different_names() -> None:
    short = [line.split()[0] for line in reproduce("--list").stdout.splitlines()]
    assert short == CELLS
    more = [line.split()[0] for line in reproduce("--list", "--all").stdout.splitlines()]
    assert more[: len(short)] == short
    assert more[len(short)] == "combined-holders"
    every = [line.split()[0] for line in reproduce("--list", "--hours").stdout.splitlines()]
    assert [name for name in every if name in more] == more
    assert len(set(every)) == len(every) > len(more) > len(short)


@pytest.mark.end_to_end
def test_an_unknown_cell_is_a_one_line_error() -> None:
    done = reproduce("--only", "2nn-ood")
    assert done.returncode == 2
    assert done.stderr.startswith("reproduce: unknown cell '2nn-ood'; choose from 2nn-iid, ")


@pytest.mark.end_to_end
def test_missing_data_are_a_one_line_error(tmp_path: Path) -> None:
    # A file where the folder should be: nothing is downloaded, not even where there is a network.
    (tmp_path / "data").touch()
    done = reproduce(FEDMQ_DATA=str(tmp_path / "data"))
    assert done.returncode == 2
    assert done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    assert f"cannot find data set 'mnist' in {tmp_path / 'data'}" in sentence
    assert "set FEDMQ_DATA to a folder that holds MNIST/raw/" in sentence


@pytest.mark.slow
def test_one_shot_encodes_a_model_with_every_codec(
    measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, _ = measured
    from reproduction import caldas

    monkeypatch.setattr(caldas, "BITS", (2, 4))
    monkeypatch.setattr(caldas, "ORDERED_BITS", (2, 4))
    outcome = caldas.CELLS[0].measure(runs.Runs(0, TINY))
    found = outcome.figures
    for way in caldas.WAYS:
        assert found[f"{way}.4.nmse"] < found[f"{way}.2.nmse"]
        assert 4 * 199_210 / found[f"{way}.4.bytes"] > 7
    assert found["K.2.nmse"] < found["HD.2.nmse"]
    assert found["accuracy"] > 0.1
    assert len(outcome.lines) == 3


@pytest.mark.end_to_end
def test_a_failed_run_is_a_missed_bar_and_the_other_cells_still_run() -> None:
    done = reproduce("--only", "2nn-iid,2nn-shards", *tiny("worker.slowdown=0.5"))
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines()[1:3]] == ["2nn-iid", "2nn-shards"]
    assert "failed" in done.stdout
    assert "worker.slowdown" in done.stderr


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of cells and results, imported as the program imports them."""
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    from reproduction import fedavg, runs

    return runs, fedavg


def test_rounds_are_counted_as_in_the_paper(measured: Any) -> None:
    """The curve's running maximum, linear between rounds."""
    runs, _ = measured
    curve = [(0, 0.1), (1, 0.5), (2, 0.4), (3, 0.9), (4, 0.8)]
    result = runs.Result(curve, runs.Traffic(1, 1, 1, 1), 1.0)
    assert result.first(0.7) == 3
    assert result.crossing(0.7) == pytest.approx(2.5)
    assert result.first(0.95) is result.crossing(0.95) is None
    assert result.first(0.05) == 0
    assert result.late(2) == pytest.approx(0.85)
    assert (result.best, result.last) == (0.9, 0.8)


@pytest.mark.parametrize(("reached", "met"), [(92, True), (93, False)])
def test_a_bar_holds_to_the_round(measured: Any, reached: int, *, met: bool) -> None:
    runs, fedavg = measured
    curve = [(reached - 1, 0.96), (reached, 0.975)]

    class Known:
        def result(self, settings: object) -> Any:
            return runs.Result(curve, runs.Traffic(1, 1, 1, 1), 1.0)

    outcome = fedavg.CELLS[0].measure(Known())
    assert outcome.met is met
    assert outcome.figures["rounds"] == reached


@pytest.mark.parametrize(
    ("updates", "met"),
    [
        ({"rounds": 80, "FedBuff": 40, "FedAsync": 60}, True),
        ({"rounds": None, "FedBuff": 40, "FedAsync": None}, True),
        ({"rounds": 80, "FedBuff": 60, "FedAsync": 60}, False),
        ({"rounds": 80, "FedBuff": None, "FedAsync": 60}, False),
    ],
)
def test_fedbuff_needs_fewer_updates_than_both_others(
    measured: Any, updates: dict[str, int | None], *, met: bool
) -> None:
    runs, _ = measured
    from reproduction import fedbuff

    asked = set()

    class Known:
        seed = 3

        def result(self, settings: Any, seed: int) -> Any:
            asked.add(seed)
            names = {options["name"]: name for name, (_, options) in fedbuff.SCHEDULES.items()}
            used = updates[names[settings.schedule["name"]]]
            point = {"accuracy": 0.96, "results_used": used, "bytes_up": 1, "bytes_down": 1}
            known = {**point, "wall_s": seed}
            if used is None:
                known = {**known, "accuracy": 0.5}
            return runs.Result([(1, known["accuracy"])], runs.Traffic(1, 1, 1, 1), 1.0, [known])

    outcome = fedbuff.IID.measure(Known())
    assert outcome.met is met
    assert asked == {3, 4, 5}
    assert outcome.figures["FedBuff.reached"] == (0 if updates["FedBuff"] is None else 3)
    if updates["rounds"]:
        assert outcome.figures["rounds.updates"] == 80
        assert outcome.figures["rounds.seconds_std"] == pytest.approx(1.0)
