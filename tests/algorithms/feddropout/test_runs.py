"""Federated Dropout in whole runs: it learns, restarts, and replays to the bit."""

import random

import pytest

from fedmq.algorithms.base import Task
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.messages.actions import Start
from fedmq.nodes.run.config import build
from fedmq.nodes.run.digests import model_digest
from fedmq.nodes.run.setup import set_up
from tests.algorithms.fleet import Fleet, changed
from tests.sim.recorded import check_recorded_run

pytestmark = pytest.mark.slow

SCHEDULES = {
    "rounds": {"name": "rounds", "fraction": 0.6},
    "buffered": {"name": "buffered", "size": 2, "concurrency": 3},
    "stream": {"name": "stream", "concurrency": 2},
}


def setup_of(schedule, problem="Hidden", clients=4, codec="raw", algorithm=None, **run):
    return set_up(
        build(
            {
                "run": {"versions": 3, "evaluate_every": 0, **run},
                "problem": {"name": f"tests.algorithms.layered:{problem}", "clients": clients},
                "algorithm": {"name": "feddropout", "keep": 0.5, **(algorithm or {})},
                "schedule": SCHEDULES[schedule],
                "codec": {"up": codec, "down": codec},
            }
        )
    )


def accuracy(fleet):
    algorithm, problem = fleet.setup.algorithm, fleet.setup.problem
    task = Task(fleet.core.version, algorithm.evaluation_task(fleet.core.state))
    return algorithm.evaluate(task, problem, "cpu")["accuracy"]


@pytest.mark.parametrize("codec", ["raw", "cast(float16)"])
@pytest.mark.parametrize("absent", ["zero", "holders"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_fleet_learns(schedule, absent, codec):
    options = {"absent": absent, "lr": 0.3, "epochs": 3}
    fleet = Fleet(setup_of(schedule, codec=codec, algorithm=options, versions=40))
    before = accuracy(fleet)
    fleet.run(random.Random(1))  # noqa: S311 - an order, not a secret
    assert fleet.counts[1:] == (0, 0, 0)
    assert accuracy(fleet) >= max(0.85, before)
    assert fleet.core.state.version == fleet.core.version == 40


def test_late_results_are_used_in_a_buffer():
    fleet = Fleet(setup_of("buffered", versions=20))
    fleet.run(random.Random(2))  # noqa: S311
    assert max(each["max_staleness"] for each in fleet.versions) >= 2
    assert fleet.counts[2] == 0


def test_a_task_is_small_and_a_result_too():
    """8 of 16 units: 8 * 2 + 8 + 2 * 8 + 2 of 82 numbers."""
    fleet = Fleet(setup_of("buffered", versions=1))
    for message, data in fleet.tasks:
        assert len(data[0]) == 4 * 42
        _, answer = fleet.work(message, data)
        assert len(answer[0]) == 4 * 42


def test_a_result_of_another_sub_model_that_there_is_not_is_refused():
    fleet = Fleet(setup_of("rounds"))
    message, data = fleet.work(*fleet.tasks.pop(0))
    lie = {**message.body["numbers"], "client": 4}
    fleet.hear(changed(message, body={"numbers": lie}), data)
    assert list(fleet.done_with.values())[-1] == "expected client from 0 to 3, got 4"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_restarted_aggregator_says_what_it_said(schedule):
    fleet = Fleet(setup_of(schedule, versions=6, checkpoint_s=0.0))
    halfway = None
    while fleet.finished is None:
        fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
        if halfway is None and fleet.core.version == 3:
            halfway = fleet.checkpoint, fleet.settled
    checkpoint, settled = halfway
    core = Aggregator(fleet.setup, "run", "aggregator")
    core.handle(Start(checkpoint))
    for delivery in fleet.inbox[settled:]:
        core.handle(delivery)
    assert model_digest(core.tensors()) == model_digest(fleet.core.tensors())
    assert core.version == 6


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_recorded_run_replays_to_the_bit(schedule, tmp_path):
    """With crashes; the aggregator's fold, then every task of every node."""
    setup = setup_of(
        schedule, "Images", codec="cast(float16)", versions=10, evaluate_every=5, checkpoint_s=1.0
    )
    replay = check_recorded_run(setup, tmp_path, 10, ("worker-0", "worker-1", "evaluator"))
    assert replay.messages > 15
