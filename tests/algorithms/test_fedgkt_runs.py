"""FedGKT in whole runs: nodes crash, and a recorded run replays to the bit."""

import pytest

from fedmq.broker.trace import Trace
from fedmq.nodes.config import build
from fedmq.nodes.digests import model_digest
from fedmq.nodes.replay.fold import Replay
from fedmq.nodes.replay.workers import Retraining
from fedmq.nodes.setup import set_up
from fedmq.nodes.simulation import Chances, Simulation

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
                    "name": "fedmq.algorithms.fedgkt:FedGKT",
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
    simulation = Simulation(setup, 2, tmp_path, 5, Chances(train_s=0.3, crash=0.1))
    assert simulation.run(10.0, 400.0)
    simulation.broker.ledger.close()
    trace = Trace(tmp_path)
    replay = Replay(trace)
    for _ in replay.steps():
        pass
    assert replay.core.version == 5
    assert model_digest(replay.core.tensors()) == model_digest(simulation.aggregator.core.tensors())
    for node in ("worker-0", "worker-1"):
        tasks = list(Retraining(trace, setup, node).all())
        assert tasks
        assert all(each.same for each in tasks)
