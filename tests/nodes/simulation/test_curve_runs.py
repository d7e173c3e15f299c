"""Whole runs of the stand-in over many clients: they learn, differ by schedule, and replay."""

from pathlib import Path

from click.testing import CliRunner

from fedmq.nodes.cli.main import main
from fedmq.nodes.run.config import build
from fedmq.nodes.run.digests import model_digest
from fedmq.nodes.run.setup import set_up
from fedmq.nodes.simulation.clients import population_of
from fedmq.nodes.simulation.population_run import PopulationRun
from fedmq.nodes.simulation.trainers import InlineTrainer

BUFFERED = {"name": "buffered", "size": 10, "concurrency": 30}
ROUNDS = {"name": "rounds", "fraction": 0.015}


def simulate(folder: Path, schedule: dict, versions: int = 6, **table: object) -> PopulationRun:
    given = {
        "run": {"id": "r", "versions": versions, "evaluate_every": 1},
        "problem": {"name": "mnist-mini", "clients": 2000},
        "schedule": schedule,
        "simulation": {"learner": "curve", "compute": "lognormal(60, 1)", **table},
    }
    setup = set_up(build(given))
    run = PopulationRun(setup, folder, population_of(setup), InlineTrainer(setup, "cpu"))
    try:
        assert run.run_to_end() == f"{versions} versions committed"
    finally:
        run.close()
    return run


def digest(run: PopulationRun) -> str:
    return model_digest(run.aggregator.core.tensors())


def test_a_run_is_the_same_again_and_replays(tmp_path: Path) -> None:
    one, other = (simulate(tmp_path / name, BUFFERED, jitter="uniform(1, 2)") for name in "ab")
    assert digest(one) == digest(other)
    assert one.now_s == other.now_s
    result = CliRunner().invoke(main, ["replay", str(tmp_path / "a")])
    assert result.exit_code == 0, result.output
    assert "match the record" in result.output


def test_a_long_tail_makes_rounds_slower_than_a_buffer(tmp_path: Path) -> None:
    rounds = simulate(tmp_path / "rounds", ROUNDS, versions=4)
    buffered = simulate(tmp_path / "buffered", BUFFERED, versions=12)  # as many results
    assert rounds.now_s > 2 * buffered.now_s
