"""Per-FedAvg and Jiang's personalised FedAvg in whole runs: they survive crashes and replay."""

import pytest

from fedmq.broker.trace import Trace
from fedmq.nodes.config import build
from fedmq.nodes.digests import model_digest
from fedmq.nodes.replay.fold import Replay
from fedmq.nodes.replay.workers import Retraining
from fedmq.nodes.setup import set_up
from fedmq.nodes.simulation import Chances, Simulation

SCHEDULES = {
    "rounds": {"name": "rounds", "fraction": 0.6},
    "buffered": {"name": "buffered", "size": 2, "concurrency": 3},
    "stream": {"name": "stream", "concurrency": 2},
}
META = {"name": "fedmq.algorithms.perfedavg:PerFedAvg", "variant": "hf", "batch_size": 5}
TWO_PHASES = {"name": "fedmq.algorithms.reptile:PersonalisedFedAvg", "epochs": 1, "switch": 3}


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
    simulation = Simulation(setup, 2, tmp_path, 5, Chances(train_s=0.3, crash=0.1))
    assert simulation.run(10.0, 400.0)
    simulation.broker.ledger.close()
    trace = Trace(tmp_path)
    replay = Replay(trace)
    for _ in replay.steps():
        pass
    assert replay.core.version == 6
    assert model_digest(replay.core.tensors()) == model_digest(simulation.aggregator.core.tensors())
    for node in ("worker-0", "worker-1"):
        tasks = list(Retraining(trace, setup, node).all())
        assert tasks
        assert all(each.same for each in tasks)
