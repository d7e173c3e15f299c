"""The population of a configuration, and the stand-in that ``learner = "curve"`` puts in place."""

import numpy as np
import pytest

from fedmq.algorithms.problems.quadratic import DIM, QuadraticProblem
from fedmq.broker.wire.addresses import MAX_CLIENTS
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.run.config import load, parse
from fedmq.nodes.run.setup import Setup, check_attainable, set_up
from fedmq.nodes.simulation.clients import message_bytes, population_of

CURVE = ["simulation.learner=curve", "problem.clients=1000000"]


def setup(*settings: str) -> Setup:
    return set_up(load(None, settings))


def test_without_a_table_clients_are_alike_and_always_available() -> None:
    found = population_of(setup())
    assert found.availability is None
    assert found.compute_s(3, "task") == 1.0
    assert found.clients == 40


def test_each_node_hosts_a_client() -> None:
    population_of(setup("simulation.nodes=40"))
    with pytest.raises(ConfigError, match=r"simulation\.nodes: .* problem\.clients, 40"):
        population_of(setup("simulation.nodes=41"))


def test_training_time_can_depend_on_the_clients_examples() -> None:
    made = setup("simulation.compute=0.5", "simulation.compute_per=example")
    found = population_of(made)
    for client in (0, 39):
        assert found.compute_s(client, "t") == 0.5 * len(made.problem.client(client))


def test_availability_can_depend_on_the_clients_labels() -> None:
    made = setup("simulation.availability=by_label(0, 1)", "problem.partition=shards(1)")
    found = population_of(made).availability
    assert found is not None
    ones = [index for index in range(40) if (made.problem.client(index).y == 9).all()]
    zeros = [index for index in range(40) if (made.problem.client(index).y == 0).all()]
    assert ones
    assert zeros
    assert found.available[ones].all()
    assert not found.available[zeros].any()


def test_a_problem_without_classes_has_no_labels_to_depend_on() -> None:
    made = set_up(
        load(
            None,
            [
                "problem.name=tests.algorithms.tiny:Tiny",
                "problem.clients=2",
                "simulation.availability=by_label(0, 1)",
            ],
        )
    )
    with pytest.raises(ConfigError, match=r"^simulation\.availability: .*defines classes"):
        population_of(made)


def test_the_stand_in_takes_the_place_of_the_problem_on_every_node() -> None:
    made = setup(*CURVE, "simulation.curve.noise=0.25")
    problem = made.problem
    assert isinstance(problem, QuadraticProblem)
    assert (problem.clients, problem.noise, problem.heterogeneity) == (10**6, 0.25, 0.5)
    # A node that reads the configuration of the ledger makes the same.
    again = set_up(parse(made.config.to_toml())).problem
    assert isinstance(again, QuadraticProblem)
    assert (again.real, again.noise) == (problem.real, 0.25)
    assert made.config.problem["name"] == "mnist-mini"


def test_the_clients_of_the_stand_in_have_the_stated_numbers_of_examples() -> None:
    assert {setup(*CURVE).problem.client_size(each) for each in range(5)} == {100}
    made = setup(*CURVE, "simulation.curve.examples=lognormal(50, 1)")
    sizes = [made.problem.client_size(each) for each in range(1000)]
    assert sizes == [len(made.problem.client(each)) for each in range(1000)]
    assert np.median(sizes) == pytest.approx(50, rel=0.15)
    tiny = setup(*CURVE, "simulation.curve.examples=0")
    assert tiny.problem.client_size(7) == 1


@pytest.mark.parametrize("name", ["fedsgd", "fedrep", "mocha"])
def test_algorithms_that_need_data_are_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        setup("simulation.learner=curve", f"algorithm.name={name}", "schedule.name=rounds")
    text = str(caught.value)
    assert text.startswith(f"simulation.learner: expected 'train' with algorithm {name}, got 'cur")


def test_transfers_of_the_stand_in_take_as_long_as_the_real_models() -> None:
    made = setup(*CURVE, "problem.model=mlp", "simulation.bandwidth_down=1000", "codec.down=raw")
    parameters = sum(each.numel() for each in made.problem.real.model().parameters())
    assert message_bytes(made) == (4 * parameters, 4 * parameters)
    found = population_of(made)
    assert found.download_s(0, 4 * DIM) == pytest.approx(4 * parameters / 1000)
    assert found.upload_s(0, 4 * DIM) == 0.0


def test_codecs_shorten_the_transfers_of_the_stand_in() -> None:
    plain, short = (
        message_bytes(setup(*CURVE, f"codec.up={codec}")) for codec in ("raw", "cast(float16)")
    )
    assert plain is not None
    assert short is not None
    assert short[0] == plain[0]
    assert short[1] == plain[1] / 2


def test_a_run_that_trains_has_the_bytes_of_its_messages() -> None:
    assert message_bytes(setup()) is None


def test_the_number_of_clients_is_checked_before_the_start() -> None:
    check_attainable(setup("simulation.learner=curve", f"problem.clients={MAX_CLIENTS}"))
    with pytest.raises(
        ConfigError, match=rf"problem\.clients: expected at most {MAX_CLIENTS}, got"
    ):
        check_attainable(setup("simulation.learner=curve", f"problem.clients={MAX_CLIENTS + 1}"))
