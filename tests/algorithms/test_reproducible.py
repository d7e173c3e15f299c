"""What an algorithm that is `reproducible` computes at the aggregator is the same on any CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedmq.algorithms.registry import ALGORITHMS

BEST = torch.backends.cpu.get_cpu_capability()
BELOW = {"AVX512": ["default", "avx2"], "AVX2": ["default"]}


def folded(**machine):
    """Return the digests that `tests.algorithms.folding` prints under a kind of CPU."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.algorithms.folding"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path]), **machine},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_every_averaging_algorithm_gives_the_same_bits_on_lesser_cpus():
    if not BELOW.get(BEST):
        pytest.skip(f"torch has no lesser instruction set to choose on a CPU of {BEST}")
    best = folded()
    named = {line.split()[0] for line in best}
    assert named == {name for name, kind in ALGORITHMS.items() if kind.reproducible}
    for cpu in BELOW[BEST]:
        assert folded(ATEN_CPU_CAPABILITY=cpu) == best, cpu


def test_servers_that_train_or_solve_do_not_promise_it():
    promised = {name for name, kind in ALGORITHMS.items() if kind.reproducible}
    assert promised.isdisjoint({"fedgkt", "faug", "pfedhn", "mocha"})
