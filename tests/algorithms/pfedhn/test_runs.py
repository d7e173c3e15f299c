"""pFedHN in whole runs: it learns, also from stale deltas, restarts, and replays to the bit."""

import random

import pytest

from fedmq.algorithms.base import Client, Task
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.messages.actions import Start
from fedmq.nodes.run.config import build
from fedmq.nodes.run.digests import digest_of
from fedmq.nodes.run.setup import set_up
from tests.algorithms.fleet import Fleet
from tests.sim.recorded import check_recorded_run

pytestmark = pytest.mark.slow

SCHEDULES = {
    "rounds": {"name": "rounds", "fraction": 0.5},
    "buffered": {"name": "buffered", "size": 2, "concurrency": 3},
    "stream": {"name": "stream", "concurrency": 3, "mixing": 1.0},
}


def setup_of(schedule, problem="Tracked", algorithm=None, codec="raw", **run):
    options = {"hidden": 8, "layers": 1, "batches": 3, "batch_size": 4, **(algorithm or {})}
    return set_up(
        build(
            {
                "run": {"versions": 3, "evaluate_every": 0, **run},
                "problem": {"name": f"tests.algorithms.hyper:{problem}", "clients": 4},
                "algorithm": {"name": "fedmq.algorithms.pfedhn.algorithm:PFedHN", **options},
                "schedule": SCHEDULES[schedule],
                "codec": {"up": codec, "down": codec},
            }
        )
    )


def loss(fleet):
    """Return the mean loss over clients on their own test data."""
    algorithm, problem = fleet.setup.algorithm, fleet.setup.problem
    found = []
    for k in range(problem.clients):
        client = Client(k, problem, problem.client(k), None, 0)
        task = Task(0, algorithm.evaluation_task(fleet.core.state, k))
        found.append(algorithm.evaluate_client(task, client)["loss"])
    return sum(found) / len(found)


@pytest.mark.parametrize("codec", ["raw", "cast(float16)"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_fleet_learns_also_from_stale_deltas(schedule, codec):
    options = {"lr": 0.05, "batches": 5, "server_lr": 0.05}
    fleet = Fleet(setup_of(schedule, "Local", options, codec, versions=60))
    before = loss(fleet)
    fleet.run(random.Random(1))  # noqa: S311 - an order, not a secret
    assert fleet.counts[1:] == (0, 0, 0)
    assert loss(fleet) < 0.7 * before
    late = max(each["max_staleness"] for each in fleet.versions)
    assert late == 0 if schedule == "rounds" else late >= 2


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_restarted_aggregator_says_what_it_said_momentum_included(schedule):
    fleet = Fleet(setup_of(schedule, versions=6, checkpoint_s=0.0))
    halfway = None
    while fleet.tasks:
        fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
        if halfway is None and fleet.core.version == 3:
            halfway = fleet.checkpoint, fleet.settled
    checkpoint, settled = halfway
    core = Aggregator(fleet.setup, "run", "aggregator")
    core.handle(Start(checkpoint))
    for delivery in fleet.inbox[settled:]:
        core.handle(delivery)
    assert core.version == 6
    assert digest_of(core.state) == digest_of(fleet.core.state)


@pytest.mark.parametrize("personal", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_recorded_run_with_crashes_replays_to_the_bit(schedule, personal, tmp_path):
    """The aggregator's fold, then every task and evaluation of every node."""
    options = {"personal_classifier": personal}
    setup = setup_of(schedule, algorithm=options, versions=6, evaluate_every=3, checkpoint_s=1.0)
    check_recorded_run(setup, tmp_path, 6)
