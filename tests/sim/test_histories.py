"""Deterministic fault simulation: whatever befalls a run, what is promised holds."""

import pytest

from fedmq.broker.core.deduplication import DedupWindow
from fedmq.nodes.worker.client_state import ClientStateStore
from tests.sim.history import check_history
from tests.sim.soak import BATCH, run_seeds

pytestmark = pytest.mark.soak

SEEDS = 2000


def batch_from(first):
    """Return a test of some histories."""

    class Batch:
        def test_every_promise_is_kept(self):
            bad = run_seeds(first, BATCH)
            assert bad is None, bad

    return Batch


# A class each: the processes of `make test` take the tests of a class, or of a module, as one.
globals().update({f"TestFrom{first}": batch_from(first) for first in range(0, SEEDS, BATCH)})


def test_a_history_is_the_same_each_time():
    assert check_history(5) == check_history(5)


# Each promise broken once on purpose: the histories must tell.


def caught(seeds):
    """Return how many histories go wrong."""
    count = 0
    for seed in range(seeds):
        try:
            check_history(seed)
        except AssertionError:
            count += 1
    return count


def test_without_deduplication_histories_go_wrong(monkeypatch):
    monkeypatch.setattr(DedupWindow, "seen", lambda *_: "new")
    assert caught(10) > 0


def test_without_saved_local_state_histories_go_wrong(monkeypatch):
    monkeypatch.setattr(ClientStateStore, "put", lambda _self, _client, kept: kept)
    assert caught(5) > 0
