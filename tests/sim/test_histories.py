"""Deterministic fault simulation: every promise of docs/guarantees.md holds in every history."""

import pytest

from tests.sim.history import check_history
from tests.sim.soak import BATCH, run_seeds

pytestmark = pytest.mark.soak

SEEDS = 2000


def batch_from(first):
    """Return a test of some histories."""

    class Batch:
        def test_every_promise_is_kept(self):
            bad, coverage = run_seeds(first, BATCH)
            assert bad is None, bad
            assert not coverage.missing

    return Batch


# A class each: the processes of `make test` take the tests of a class, or of a module, as one.
globals().update({f"TestFrom{first}": batch_from(first) for first in range(0, SEEDS, BATCH)})


def test_a_history_is_the_same_each_time():
    one, again = check_history(5), check_history(5)
    assert one.entries == again.entries
    assert one.faults == again.faults
