"""Errors of the algorithm's own code and of evaluations end the run."""

import pytest

from fedmq.nodes.aggregator.progress import failures_allowed
from tests.nodes.aggregator.failing import (
    fleet_of,
    step,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("schedule", ["rounds", "stream"])
@pytest.mark.parametrize("at", ["task", "accumulate", "commit", "evaluation_task"])
def test_an_algorithm_that_raises_ends_the_run_at_once(schedule, at):
    name = "tests.algorithms.raising:Raising"
    fleet = fleet_of(
        schedule,
        algorithm={"name": name, "at": at},
        evaluate_every=1 if at == "evaluation_task" else 0,
    )
    while fleet.finished is None:
        step(fleet, ())
    assert f"raising raised RuntimeError: {at} is broken" in fleet.finished
    assert "algorithms/raising.py:" in fleet.finished
    finish = fleet.actions[-1]
    assert finish.failed
    assert isinstance(finish.error, RuntimeError)
    record = fleet.records[-1]
    assert (record.kind, record.to, record.body["failed"]) == ("finished", "checkpoint", True)
    seq = fleet.say("nonsense", {})
    assert fleet.done_with[seq] == ""


def test_a_state_that_cannot_be_saved_ends_the_run_as_well():
    fleet = fleet_of("stream", algorithm={"name": "tests.algorithms.raising:Raising", "at": "save"})
    assert "raising raised RuntimeError: save is broken" in fleet.finished
    (record,) = fleet.records
    assert (record.kind, record.to, record.body["failed"]) == ("finished", "record", True)


@pytest.mark.parametrize("kind", ["MemoryError", "ConnectionResetError"])
def test_what_a_restart_may_cure_is_raised(kind):
    name = "tests.algorithms.raising:Raising"
    fleet = fleet_of("stream", algorithm={"name": name, "at": "accumulate", "kind": kind})
    with pytest.raises(Exception, match="accumulate is broken"):
        step(fleet, ())
    assert fleet.finished is None


def test_a_target_that_the_metrics_do_not_have_ends_the_run():
    fleet = fleet_of("stream", target_accuracy=0.5, evaluate_every=1)
    fleet.join_evaluator()
    (message, _), *_ = fleet.evaluations
    fleet.say("score", {"metrics": {"mae": 0.1, "loss": 1.0}}, "evaluator", re=message.id)
    assert fleet.core.failed
    assert (
        fleet.finished == "run.target_accuracy: expected accuracy among the metrics, got loss, mae"
    )


def test_evaluations_that_all_fail_end_a_run_that_is_to_reach_a_target():
    fleet = fleet_of("stream", target_accuracy=0.5, evaluate_every=1, versions=1000)
    fleet.join_evaluator()
    answered = 0
    while fleet.finished is None and answered < 100:
        while fleet.evaluations and fleet.finished is None:
            message, _ = fleet.evaluations.pop(0)
            fleet.say("failed", {"reason": "KeyError: 'mae'"}, "evaluator", re=message.id)
            answered += 1
        if fleet.finished is None:
            fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    assert answered == failures_allowed(fleet.setup, None)
    assert fleet.core.failed
    assert "12 evaluations in a row failed (run.failures)" in fleet.finished
    assert fleet.finished.endswith("the last: KeyError: 'mae'")


def test_without_a_target_evaluations_that_fail_end_nothing():
    fleet = fleet_of("stream", evaluate_every=1, versions=20)
    fleet.join_evaluator()
    while fleet.finished is None:
        while fleet.evaluations:
            message, _ = fleet.evaluations.pop(0)
            fleet.say("failed", {"reason": "KeyError: 'mae'"}, "evaluator", re=message.id)
        if fleet.finished is None:
            fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    assert fleet.finished == "20 versions committed"
    assert not fleet.core.failed
