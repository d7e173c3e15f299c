"""What an algorithm that is `reproducible` computes at the aggregator is the same on any CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedmq.algorithms.registry import ALGORITHMS
from tests.cpus import capabilities


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


@pytest.mark.end_to_end
def test_every_averaging_algorithm_gives_the_same_bits_on_every_kind_of_cpu():
    if len(capabilities()) < 2:
        pytest.skip("torch has one set of instructions to choose from on this CPU")
    first, *others = capabilities()
    found = folded(ATEN_CPU_CAPABILITY=first)
    named = {line.split()[0] for line in found}
    assert named == {name for name, kind in ALGORITHMS.items() if kind.reproducible}
    for cpu in others:
        assert folded(ATEN_CPU_CAPABILITY=cpu) == found, cpu


def test_servers_that_train_or_solve_do_not_promise_it():
    promised = {name for name, kind in ALGORITHMS.items() if kind.reproducible}
    assert promised.isdisjoint({"fedgkt", "faug", "pfedhn", "mocha"})
