"""Per-FedAvg and Jiang's personalised FedAvg in whole runs: they survive crashes and replay."""

import pytest

from fedmq.nodes.run.config import build
from fedmq.nodes.run.setup import set_up
from tests.sim.recorded import check_recorded_run

pytestmark = pytest.mark.slow

SCHEDULES = {
    "rounds": {"name": "rounds", "fraction": 0.6},
    "buffered": {"name": "buffered", "size": 2, "concurrency": 3},
    "stream": {"name": "stream", "concurrency": 2},
}
META = {"name": "fedmq.algorithms.personal.perfedavg:PerFedAvg", "variant": "hf", "batch_size": 5}
TWO_PHASES = {
    "name": "fedmq.algorithms.personal.personalised_fedavg:PersonalisedFedAvg",
    "epochs": 1,
    "switch": 3,
}


@pytest.mark.parametrize(
    ("algorithm", "schedule"),
    [
        (META, "rounds"),
        (META, "buffered"),
        (META, "stream"),
        (TWO_PHASES, "rounds"),
        (TWO_PHASES, "buffered"),
    ],
)
def test_a_run_with_crashes_ends_and_replays_to_the_bit(algorithm, schedule, tmp_path):
    """The aggregator's fold, and every task and evaluation of every node."""
    setup = set_up(
        build(
            {
                "run": {"versions": 6, "evaluate_every": 3, "checkpoint_s": 1.0},
                "problem": {"name": "tests.algorithms.meta:Local", "clients": 4},
                "algorithm": algorithm,
                "schedule": SCHEDULES[schedule],
            }
        )
    )
    check_recorded_run(setup, tmp_path, 6)
