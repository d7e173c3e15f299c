"""A run is deleted and started again under its id: nothing of the one before comes back."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.chaos.crew import Crew, wait_until
from tests.chaos.ledgers import Watch, check_books

pytestmark = pytest.mark.end_to_end

LEASE_S = 2.0
SETTINGS = {
    "problem__clients": 2,
    "problem__examples": 100,
    "run__versions": 4,
    "algorithm__name": "fedrep",
    "algorithm__pause_s": None,
    "schedule__name": "rounds",
    "schedule__fraction": 1.0,
}


def run(crew: Crew, lr: float, states: str, *, restarts: bool = False) -> dict[str, np.ndarray]:
    """Run to the end in an empty folder; return the model."""
    shutil.rmtree(crew.folder / "run", ignore_errors=True)
    broker = crew.broker(LEASE_S, "--once")
    aggregator = crew.aggregator(**SETTINGS, algorithm__lr=lr)
    worker = crew.worker("one", "0-1", "--state", "state-one", "--client-states", states)
    if restarts:
        Watch(crew.ledger).until_version(1, 60)
        broker.kill()
        worker.kill()
        broker, worker = broker.again(), worker.again()
    assert aggregator.wait(60) == 0, aggregator.said()[-3000:]
    assert broker.wait(LEASE_S + 20) == 0, broker.said()[-3000:]
    assert worker.wait(20) == 0, worker.said()[-3000:]
    assert check_books(crew.folder / "run", crew.folder / "model").versions == 4
    with np.load(crew.folder / "model" / "model.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def identities(folder: Path) -> list[str]:
    return sorted(each.name for each in (folder / "chaos").iterdir())


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_a_run_that_is_started_again_under_its_id_finds_no_states_of_the_one_before(
    crew: Crew,
) -> None:
    """The second run has another learning rate, and ends where it ends with an empty folder."""
    first = run(crew, 0.1, "shared", restarts=True)
    [identity] = identities(crew.folder / "shared")  # though broker and worker were killed
    again = run(crew, 0.02, "shared")
    assert len(identities(crew.folder / "shared")) == 2
    assert identity in identities(crew.folder / "shared")
    fresh = run(crew, 0.02, "empty")
    assert same(again, fresh)
    assert not same(again, first)


def test_a_worker_of_a_deleted_run_does_not_take_part_in_the_one_that_has_its_id(
    crew: Crew,
) -> None:
    broker = crew.broker(LEASE_S)
    aggregator = crew.aggregator(**{**SETTINGS, "run__versions": 100_000})
    worker = crew.worker("one", "0-1")
    Watch(crew.ledger).until_version(1, 60)
    broker.kill()
    aggregator.kill()
    shutil.rmtree(crew.folder / "run")
    broker.again()
    aggregator.again()
    assert worker.wait(30) == 2
    assert worker.said().endswith(
        "fedmq: the broker has started another run 'chaos' since this node joined: "
        "start the node again to join it\n"
    )
    worker.again()
    Watch(crew.ledger).until_version(1, 60)


def test_the_results_of_the_run_before_are_not_there_while_another_one_goes_on(crew: Crew) -> None:
    model, summary = crew.folder / "model" / "model.npz", crew.folder / "run" / "summary.json"
    for path in (model, summary):
        path.parent.mkdir()
        path.write_bytes(b"of the run before")
    crew.broker(LEASE_S, "--once")
    crew.aggregator(**SETTINGS)
    wait_until("them to go", lambda: not (model.exists() or summary.exists()))
