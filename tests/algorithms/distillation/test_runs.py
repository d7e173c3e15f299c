"""Distillation in its three forms in whole runs: they survive crashes, and replay to the bit."""

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
TINY_GAN = {"gan_steps": 2, "gan_batch": 4, "gan_widths": [4, 4, 4]}
ALGORITHMS = {
    "fd": {"name": "fedmq.algorithms.distillation.fd:Distillation", "models": ["mlp", "fd-cnn"]},
    "codistillation": {"name": "fedmq.algorithms.distillation.codistillation:Codistillation"},
    "faug": {"name": "fedmq.algorithms.faug.algorithm:FAug", **TINY_GAN},
    "faug-fedavg": {"name": "fedmq.algorithms.faug.algorithm:FAug", "then": "fedavg", **TINY_GAN},
}


@pytest.mark.parametrize(
    ("algorithm", "schedule", "problem"),
    [
        ("fd", "rounds", "augmenting:Skewed"),
        ("fd", "stream", "augmenting:Skewed"),
        ("codistillation", "buffered", "distillation.test_codistillation:Shared"),
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
    check_recorded_run(setup, tmp_path, 8)
