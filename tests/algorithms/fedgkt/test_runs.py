"""FedGKT in whole runs: nodes crash, and a recorded run replays to the bit."""

import pytest

from fedmq.nodes.run.config import build
from fedmq.nodes.run.setup import set_up
from tests.sim.recorded import check_recorded_run

pytestmark = pytest.mark.slow

SCHEDULES = {
    "rounds": {"name": "rounds", "fraction": 1.0},
    "buffered": {"name": "buffered", "size": 2, "concurrency": 3},
    "stream": {"name": "stream", "concurrency": 2},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_recorded_run_with_crashes_replays_to_the_bit(schedule, tmp_path):
    """The aggregator's fold, then every task of every node; with features in files."""
    setup = set_up(
        build(
            {
                "run": {"versions": 5, "evaluate_every": 2, "checkpoint_s": 1.0},
                "problem": {"name": "tests.algorithms.bars:Bars", "clients": 3},
                "algorithm": {
                    "name": "fedmq.algorithms.fedgkt.algorithm:FedGKT",
                    "edge": "tiny",
                    "server": "tiny",
                    "batch_size": 4,
                    "max_samples": 50,
                    "memory_mb": 0,
                },
                "schedule": SCHEDULES[schedule],
                "codec": {"features": "features(int8)"},
            }
        )
    )
    check_recorded_run(setup, tmp_path, 5)
