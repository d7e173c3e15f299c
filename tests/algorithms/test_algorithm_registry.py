"""Algorithms by name, built in or a user's own."""

import dataclasses
from pathlib import Path

import pytest

from fedmq.algorithms.allowed import Allowed
from fedmq.algorithms.errors import AlgorithmError, ProblemError, ResultError
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.registry import ALGORITHMS, find_algorithm
from fedmq.algorithms.rng import derive_rng, derive_seed
from fedmq.algorithms.schedules import SCHEDULES

GOLDEN_SEED = 5207891206783928404
GOLDEN_DRAW = 496153198


@dataclasses.dataclass(frozen=True)
class Mine(FedAvg):
    name = "mine"


class Half:
    pass


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_built_in_algorithms_are_found_by_name(name):
    assert find_algorithm(name).name == name


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_docs_say_of_each_algorithm_under_which_schedules_it_is_sound(name):
    """A cell that begins with "no" is a schedule that it does not run under."""
    docs = Path(__file__).parents[2] / "docs" / "algorithms.md"
    rows = [line.split("|") for line in docs.read_text().splitlines() if f"`{name}`" in line]
    (_, _, rounds, buffered, stream, _), *_ = [row for row in rows if len(row) == 6]
    cells = {"rounds": rounds, "buffered": buffered, "stream": stream}
    sound = {key for key, cell in cells.items() if not cell.strip().startswith("no:")}
    assert sound == ALGORITHMS[name].schedules


def test_every_algorithm_runs_under_schedules_that_exist():
    for algorithm in ALGORITHMS.values():
        assert algorithm.schedules
        assert algorithm.schedules <= set(SCHEDULES)


def test_hyper_parameters_are_fields_that_cannot_change():
    for algorithm in ALGORITHMS.values():
        with pytest.raises(dataclasses.FrozenInstanceError):
            algorithm().lr = 1.0


def test_an_unknown_algorithm_is_answered_with_the_choices():
    names = ".*fedavg, fedavg-ft, feddropout"
    message = rf"unknown algorithm 'fedavq' .*'fedavg'\?\); choose from {names}"
    with pytest.raises(AlgorithmError, match=message):
        find_algorithm("fedavq")


def test_a_users_own_algorithm_is_found_by_module_and_class():
    name = f"{__name__}:Mine"
    assert find_algorithm(name, Allowed(names=frozenset({name}))) is Mine
    assert find_algorithm(name, Allowed(modules=frozenset({__name__}))) is Mine


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{__name__}:Half", "expected a dataclass derived from Algorithm"),
        (f"{__name__}:Nobody", "Nobody does not exist"),
        ("no_such_module:Mine", "cannot import 'no_such_module'"),
        (":Mine", "expected module:attribute, got ':Mine'"),
    ],
)
def test_what_is_no_algorithm_is_refused(name, message):
    with pytest.raises(AlgorithmError, match=message):
        find_algorithm(name, Allowed(names=frozenset({name})))


def test_every_error_is_an_algorithm_error():
    assert issubclass(ProblemError, AlgorithmError)
    assert issubclass(ResultError, AlgorithmError)


def test_a_seed_depends_on_all_that_it_is_for():
    seeds = {
        derive_seed(0, "train", 1, "t"),
        derive_seed(1, "train", 1, "t"),
        derive_seed(0, "uplink", 1, "t"),
        derive_seed(0, "train", 2, "t"),
        derive_seed(0, "train", 1, "u"),
        derive_seed(0, "train", 1),
    }
    assert len(seeds) == 6
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_a_seed_never_changes_between_releases():
    """Recorded runs replay only while this holds."""
    assert derive_seed(0, "cohort", 3, 1) == GOLDEN_SEED
    assert derive_rng(0, "cohort", 3, 1).integers(1 << 30) == GOLDEN_DRAW
