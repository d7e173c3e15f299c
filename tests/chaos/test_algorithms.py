"""Algorithms whose state is more than one model, while everything that holds it is killed.

Servers that train beside their inbox, feature maps, heads and moments that clients keep: each
run ends, its ledger accounts for every result, and it folds to the same digests again.
"""

from __future__ import annotations

import json

import pytest

from tests.chaos.crew import Crew
from tests.chaos.ledgers import Watch, check_books

pytestmark = pytest.mark.end_to_end

LEASE_S = 2.0
COMMON = {
    "problem__clients": 4,
    "problem__examples": 400,
    "run__versions": 8,
    "run__evaluate_every": 4,
    "run__checkpoint_s": 0.1,
    "algorithm__pause_s": None,
}
RUNS = {
    "fedgkt": {
        "algorithm__edge": "tiny",
        "algorithm__server": "tiny",
        "codec__features": "features(int8)",
        "schedule__name": "stream",
        "schedule__concurrency": 4,
    },
    "fedrep": {"algorithm__head_epochs": 2, "schedule__name": "buffered", "schedule__size": 2},
    "faug": {
        "algorithm__then": "fd",
        "algorithm__gan_steps": 100,
        "algorithm__gan_widths": "[16, 16, 16]",
        "problem__partition": "targets(2, 5)",
        "schedule__name": "rounds",
        "schedule__fraction": 1.0,
    },
    "pfedhn": {
        "algorithm__personal_classifier": "true",
        "algorithm__batches": 5,
        "problem__model": "mlp",
        "schedule__name": "stream",
        "schedule__concurrency": 3,
    },
}


@pytest.mark.parametrize("algorithm", RUNS)
def test_a_run_ends_and_replays_though_all_of_its_nodes_are_killed(
    crew: Crew, watch: Watch, algorithm: str
) -> None:
    broker = crew.broker(LEASE_S, "--once")
    settings = {**COMMON, **RUNS[algorithm], "algorithm__name": algorithm}
    aggregator = crew.aggregator(**settings)
    one = crew.worker("one", "0-1")
    crew.worker("two", "2-3")
    watch.until_version(1, 60)
    aggregator.kill()
    one.kill()
    aggregator, one = aggregator.again(), one.again()
    watch.until_version(3, 60)
    broker.kill()
    broker = broker.again()
    watch.until_version(5, 60)
    aggregator.kill()
    aggregator = aggregator.again()
    assert aggregator.wait(90) == 0, aggregator.said()[-3000:]
    assert broker.wait(LEASE_S + 20) == 0, broker.said()[-3000:]
    books = check_books(crew.folder / "run", crew.folder / "model")
    assert books.versions == 8
    summary = json.loads((crew.folder / "run" / "summary.json").read_text())
    assert summary["clients"]["count"] == 4
    assert 0 < summary["clients"]["worst_decile"] <= summary["clients"]["mean"] <= 1
