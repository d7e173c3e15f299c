"""``fedmq personalise``: adapt a recorded run to clients that never took part."""

import json
import statistics

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from fedmq.algorithms.base import Client
from fedmq.algorithms.rng import derive_seed
from fedmq.broker.inspection.trace import Trace
from fedmq.nodes.cli.personalise import last_state, personalise, spread
from fedmq.nodes.run.config import build
from fedmq.nodes.run.setup import set_up
from fedmq.nodes.simulation.virtual_run import Chances, Simulation
from tests.algorithms.tiny import Tiny
from tests.own_code import ALLOW

pytestmark = pytest.mark.slow


class Newcomers(Tiny):
    """Four clients that train, and the given number that never do."""

    def __init__(self, clients=4, held_out=3, seed=0):
        super().__init__(clients, seed)
        self.new = held_out

    @property
    def held_out(self):
        return self.new

    def module(self):
        return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))

    def client(self, index):
        assert 0 <= index < self.clients + self.new
        return self.points(100 + index, 12)

    def client_test(self, index):
        return self.points(200 + index, 20)


def setup_of(algorithm=None, held_out=3, **run):
    options = {"hidden": 6, "batches": 3, "batch_size": 6, "new_rounds": 3, **(algorithm or {})}
    name = {"name": "fedmq.algorithms.pfedhn.algorithm:PFedHN", **options}
    own = {"name": f"{__name__}:Newcomers", "clients": 4, "held_out": held_out}
    return set_up(
        build(
            {
                "run": {"id": "run", "versions": 3, "evaluate_every": 0, "seed": 5, **run},
                "problem": own,
                "algorithm": algorithm if algorithm and "name" in algorithm else name,
                "schedule": {"name": "rounds", "fraction": 0.5},
            }
        )
    )


def record(folder, setup, until=400.0):
    """Record a run; return whether it came to its end."""
    simulation = Simulation(setup, 2, folder, 5, Chances(train_s=0.3))
    ended = simulation.run(until, until)
    simulation.close()
    return ended


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a finished run, as a broker leaves it."""
    path = tmp_path_factory.mktemp("run")
    assert record(path, setup_of())
    return path


def call(*words, code=0):
    """Run the command; return its result: stdout, stderr."""
    result = CliRunner().invoke(personalise, [*ALLOW, *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def refused(*words):
    """Return the one sentence with which it refuses."""
    sentence = call(*words, code=2).stderr.strip()
    assert sentence.startswith("fedmq: ")
    assert "\n" not in sentence
    return sentence


def test_each_new_client_has_a_line_and_then_come_mean_worst_decile_and_spread(folder, tmp_path):
    result = call(folder, "--json", tmp_path / "out.json")
    assert result.stderr == ""
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["client", "examples", "loss", "accuracy"]
    assert [line[0] for line in lines[1:]] == ["4", "5", "6", "mean", "worst", "spread"]
    assert [line[1] for line in lines[1:4]] == ["12"] * 3
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found) == ["run", "version", "finished", "spread", "clients"]
    assert (found["version"], found["finished"]) == (3, True)
    accuracy = [each["accuracy"] for each in found["clients"].values()]
    assert [line[3] for line in lines[1:4]] == [f"{each:.4f}" for each in accuracy]
    assert lines[4][3] == f"{statistics.fmean(accuracy):.4f}"
    assert lines[5][2:] == ["-", "-", f"{min(accuracy):.4f}"]
    assert found["spread"] == spread(accuracy)


def test_the_state_is_that_of_the_runs_end_and_the_figures_are_the_algorithms(folder, tmp_path):
    setup = setup_of()
    start = last_state(Trace(folder), setup)
    assert (start.version, start.finished) == (3, True)
    assert start.state.used.sum() == 6
    seed = derive_seed(5, "personalise", 3, 5)
    client = Client(5, setup.problem, setup.problem.client(5), None, seed)
    expected = setup.algorithm.personalise(start.state, 3, client)
    call(folder, "--clients", "5", "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())["clients"]
    assert found == {"5": {"examples": 12, **expected}}


def test_the_same_run_gives_the_same_output_and_nothing_in_its_folder_changes(folder):
    def files():
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = files()
    assert call(folder).stdout == call(folder).stdout
    assert files() == before


def test_some_of_the_clients(folder):
    lines = call(folder, "--clients", "6,4-5,5").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["4", "5", "6"]
    lines = call(folder, "--clients", "6").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["6", "mean"]


@pytest.mark.parametrize(("ranges", "got"), [("3", "3"), ("0-4", "0-4"), ("6-7", "6-7")])
def test_a_client_that_took_part_or_is_not_there_is_refused(folder, ranges, got):
    sentence = refused(folder, "--clients", ranges)
    assert "expected clients that never took part, 4 to 6" in sentence
    assert sentence.endswith(f"got {got}")


def test_words_that_are_no_ranges_and_folders_that_are_none_are_refused(folder, tmp_path):
    assert "expected ranges such as" in refused(folder, "--clients", "some")
    assert "expected a run's folder" in refused(tmp_path / "nothing")
    assert "cannot write" in refused(folder, "--json", tmp_path / "no" / "folder")


def test_a_run_without_new_clients_reports_which_option_makes_them(tmp_path):
    assert record(tmp_path, setup_of(held_out=0))
    assert refused(tmp_path).endswith("start one with problem.held_out=N")


def test_an_algorithm_with_one_model_for_all_is_refused(tmp_path):
    assert record(tmp_path, setup_of({"name": "fedavg", "epochs": 1}))
    assert "got fedavg, which has one model for all of them" in refused(tmp_path)


def test_a_run_that_has_not_ended_is_taken_at_its_newest_checkpoint_and_that_is_reported(tmp_path):
    assert not record(tmp_path, setup_of(versions=10_000, checkpoint_s=0.5), until=10.0)
    result = call(tmp_path, "--clients", "4")
    version = last_state(Trace(tmp_path), setup_of(versions=10_000)).version
    assert version > 0
    assert result.stderr.strip() == (
        f"the run has not ended: using its newest checkpoint, version {version}"
    )
    assert result.stdout.splitlines()[1].startswith("4 ")


def test_the_worst_decile_is_the_mean_of_the_lowest_tenth():
    values = [float(each) for each in torch.randperm(30)]
    assert spread(values) == {
        "mean": 14.5,
        "worst_decile": 1.0,
        "std": pytest.approx(statistics.pstdev(range(30))),
        "count": 30,
    }
    assert spread([0.5])["worst_decile"] == 0.5
