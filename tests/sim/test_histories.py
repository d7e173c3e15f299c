"""Deterministic fault simulation: whatever befalls a run, what is promised holds."""

import os
import sys
from pathlib import Path

import pytest

from fedmq.broker.remembered import Remembered
from fedmq.nodes.local import Locals
from tests.sim.history import check_history
from tests.sim.soak import soak

SEEDS = 2000
ROOT = Path(__file__).parent.parent.parent


@pytest.mark.timeout(400)
def test_two_thousand_histories_keep_every_promise(monkeypatch):
    # The processes of the pool import as this one does.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / ".view"), str(ROOT)]))
    monkeypatch.setattr(sys, "path", [str(ROOT / ".view"), str(ROOT), *sys.path])
    bad = soak(0, SEEDS)
    assert not bad, "\n".join(bad)


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
    monkeypatch.setattr(Remembered, "look", lambda *_: "new")
    assert caught(10) > 0


def test_without_saved_local_state_histories_go_wrong(monkeypatch):
    monkeypatch.setattr(Locals, "put", lambda *_: None)
    assert caught(5) > 0
