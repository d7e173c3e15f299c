"""Distillation in its three forms in whole runs: they survive crashes, and replay to the bit."""

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
TINY_GAN = {"gan_steps": 2, "gan_batch": 4, "gan_widths": [4, 4, 4]}
ALGORITHMS = {
    "fd": {"name": "fedmq.algorithms.distillation:Distillation", "models": ["mlp", "fd-cnn"]},
    "codistillation": {"name": "fedmq.algorithms.codistillation:Codistillation"},
    "faug": {"name": "fedmq.algorithms.faug:FAug", **TINY_GAN},
    "faug-fedavg": {"name": "fedmq.algorithms.faug:FAug", "then": "fedavg", **TINY_GAN},
}


@pytest.mark.parametrize(
    ("algorithm", "schedule", "problem"),
    [
        ("fd", "rounds", "augmenting:Skewed"),
        ("fd", "stream", "augmenting:Skewed"),
        ("codistillation", "buffered", "test_codistillation:Shared"),
        ("faug", "rounds", "augmenting:Skewed"),
        ("faug", "buffered", "augmenting:Skewed"),
        ("faug-fedavg", "rounds", "augmenting:Skewed"),
        ("faug-fedavg", "stream", "augmenting:Skewed"),
    ],
)
def test_a_run_with_crashes_ends_and_replays_to_the_bit(algorithm, schedule, problem, tmp_path):
    """The aggregator's fold, then every task of every node."""
    setup = set_up(
        build(
            {
                "run": {"versions": 8, "evaluate_every": 4, "checkpoint_s": 1.0},
                "problem": {"name": f"tests.algorithms.{problem}", "clients": 3},
                "algorithm": ALGORITHMS[algorithm],
                "schedule": SCHEDULES[schedule],
                "codec": {"logits": "logits(float16)", "features": "features(int8)"},
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
    assert replay.core.version == 8
    digest = model_digest(simulation.aggregator.core.tensors())
    assert model_digest(replay.core.tensors()) == digest
    for node in ("worker-0", "worker-1"):
        tasks = list(Retraining(trace, setup, node).all())
        assert tasks
        assert all(each.same for each in tasks)
