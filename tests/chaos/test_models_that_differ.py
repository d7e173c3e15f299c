"""A problem whose model is not the same everywhere: a run says so."""

from __future__ import annotations

import json

import pytest

from tests.chaos.crew import Crew

pytestmark = pytest.mark.end_to_end

LEASE_S = 2.0


def settings(problem: str) -> dict[str, object]:
    return {
        "problem__name": f"chaos_models:{problem}",
        "problem__dim": 1000,
        "problem__model": None,
        "problem__examples": None,
        "problem__clients": 2,
        "algorithm__name": "chaos_models:Echo",
        "algorithm__pause_s": None,
        "run__versions": 3,
        "run__evaluate_every": 1,
        "schedule__name": "rounds",
        "schedule__fraction": 1.0,
    }


def test_a_model_that_is_drawn_without_a_seed_starts_nothing(crew: Crew) -> None:
    aggregator = crew.aggregator(**settings("Unseeded"))
    assert aggregator.wait(30) == 2
    assert aggregator.said() == (
        "fedmq: problem.name: expected model() to return the same values at every call, but "
        "'vector' differs from one call to the next: seed its random generator\n"
    )


def test_nodes_that_start_from_other_values_are_named(crew: Crew) -> None:
    broker = crew.broker(LEASE_S, "--once")
    aggregator = crew.aggregator(**settings("Unlike"))
    crew.worker("one", "0-1")
    crew.node("evaluator", "worker", "--evaluator", "--name", "judge")
    assert aggregator.wait(60) == 0, aggregator.said()[-3000:]
    assert broker.wait(LEASE_S + 20) == 0, broker.said()[-3000:]
    summary = json.loads((crew.folder / "run" / "summary.json").read_text())
    assert sorted(summary["disagreeing"]) == ["judge", "one"]
    warnings = [each for each in aggregator.said().splitlines() if "another model" in each]
    assert len(warnings) == 2
    assert "one" in "".join(warnings)
