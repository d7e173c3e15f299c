"""Deterministic fault simulation: every promise of docs/guarantees.md holds in every history."""

from dataclasses import replace

import pytest

from fedmq.broker.settings import BrokerSettings
from fedmq.nodes.run.digests import model_digest
from fedmq.nodes.simulation.virtual_run import Chances
from tests.sim.history import Plan, check_history
from tests.sim.keyed import KeyPlan
from tests.sim.soak import BATCH, run_seeds

pytestmark = pytest.mark.soak

SEEDS = 1000


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


@pytest.mark.parametrize("keys", [None, KeyPlan()], ids=["without keys", "with keys"])
def test_a_node_that_attacks_changes_nothing(keys):
    """Rounds without faults end at the same model, bit for bit, with it and without it."""
    calm = Plan(0, "Tally", 0.0, Chances(train_s=2.0), BrokerSettings(3.0, 0.5), keys=keys)
    alone, attacked = (check_history(1, replace(calm, mallory=each)) for each in (False, True))
    assert attacked.mallory.attacks > 5
    digests = {model_digest(each.aggregator.tensors()) for each in (alone, attacked)}
    assert len(digests) == 1
    assert alone.aggregator.version == attacked.aggregator.version


@pytest.mark.parametrize("seed", [5, 6, 9])
def test_a_history_is_the_same_each_time(seed):
    one, again = check_history(seed), check_history(seed)
    assert one.entries == again.entries
    assert one.faults == again.faults
