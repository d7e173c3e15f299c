"""What ends a run before its versions: bytes, time, and evaluations without a better accuracy."""

import math

import pytest

from fedmq.broker.core.mailboxes import MAX_TIMER_S
from fedmq.broker.link.events import PostMessage
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.run.config import RunTable
from fedmq.nodes.run.goal import Goal, Spent
from fedmq.nodes.run.setup import check_attainable
from tests.algorithms.fleet import Fleet, make_setup
from tests.nodes.aggregator.test_continued import come_back, go_on
from tests.nodes.aggregator.test_resume import (
    fold_of,
    handed_over,
    is_checkpoint,
    plain,
    resumed,
    setup_of,
)

ROUNDS = {"name": "rounds", "fraction": 1.0}
BUFFERED = {"name": "buffered", "size": 2, "concurrency": 2}
ASKS = ("task", "evaluate")
LIMITS = {
    "max_bytes": (4000, "run.max_bytes is 4,000"),
    "max_wall_s": (40.0, "s have passed, run.max_wall_s is 40"),
    "patience": (2, "2 evaluations in a row had no better accuracy than"),
}


def evaluator_says(fleet, *accuracies):
    """Answer the oldest evaluations with these accuracies."""
    for each in accuracies:
        message, _ = fleet.evaluations.pop(0)
        fleet.say("score", {"metrics": {"accuracy": each}}, "evaluator", message.id)


def limited_run(limit, schedule="rounds"):
    """Return a run that one of the limits ends, and the reason."""
    value, reason = LIMITS[limit]
    fleet = Fleet(setup_of(schedule, evaluate_every=1, versions=40, **{limit: value}))
    fleet.join_evaluator()
    for step in range(300):
        if fleet.finished is not None:
            return fleet, reason
        if fleet.ticks and step % 5 == 0:
            fleet.say("tick", {"token": fleet.ticks.pop(0)})
        elif fleet.evaluations:
            evaluator_says(fleet, 0.5)
        else:
            fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    raise AssertionError("the run does not end")


def payload(fleet, *kinds):
    return sum(
        blob.size
        for each in fleet.inbox
        if each.message.kind in kinds
        for blob in each.message.blobs
    )


def test_bytes_in_both_directions_end_a_run():
    unlimited = Fleet(make_setup(BUFFERED, versions=5)).run()
    up = payload(unlimited, "result")
    setup = make_setup(BUFFERED, versions=5, max_bytes=up)
    fleet = Fleet(setup).run()
    assert fleet.finished == f"{up + 24} bytes transferred, run.max_bytes is {up}"
    assert 0 < fleet.core.version < 5
    assert not fleet.core.failed
    sent = [each.message for each in fleet.actions if isinstance(each, PostMessage)]
    down = sum(blob.size for each in sent if each.kind in ASKS for blob in each.blobs)
    # The last evaluation comes on top.
    assert fleet.core._spent.payload_bytes == down + payload(fleet, "result", "score")


@pytest.mark.parametrize("joined", [True, False], ids=["running", "waiting for clients"])
def test_time_ends_a_run_even_if_nothing_arrives(joined):
    fleet = Fleet(make_setup(ROUNDS, max_wall_s=60.0), join=False)
    timer = next(each for each in fleet.actions if each.message.kind == "timer").message
    assert (timer.to, timer.body["after_s"]) == ("timer", 0.0)
    fleet.say("tick", {"token": fleet.ticks.pop()})
    if joined:
        come_back(fleet)
        fleet.tasks.clear()
    fleet.pace = 61.5 / (fleet.seq + 1)
    token = fleet.ticks.pop()
    fleet.say("tick", {"token": token})
    assert fleet.finished == "60.5 s have passed, run.max_wall_s is 60"
    assert not fleet.core.failed


def test_the_timer_is_set_for_the_rest_of_the_time():
    fleet = Fleet(make_setup(ROUNDS, max_wall_s=60.0), join=False)
    fleet.say("tick", {"token": fleet.ticks[-1]})  # at 1 s, the start
    for _ in range(19):
        fleet.say("nonsense", {})
    go_on(fleet)  # it was stopped for 5 s
    fleet.say("tick", {"token": fleet.ticks[-1]})
    posts = [each.message.body for each in fleet.actions if isinstance(each, PostMessage)]
    after = [body["after_s"] for body in posts if "after_s" in body]
    assert (after[0], after[-1]) == (0.0, 60.0 - (21 - 5))
    fleet.say("tick", {"token": "wall/0"})  # an old one
    assert fleet.finished is None


def test_evaluations_without_a_better_accuracy_end_a_run():
    fleet = Fleet(make_setup(ROUNDS, versions=20, evaluate_every=1, patience=3))
    fleet.join_evaluator()
    for accuracy in (0.1, 0.3, 0.3, math.nan, 0.31, 0.2, 0.31, 0.3):
        assert fleet.finished is None
        while not fleet.evaluations:
            fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
        evaluator_says(fleet, accuracy)
    expected = "3 evaluations in a row had no better accuracy than 0.3100 (run.patience)"
    assert fleet.finished == expected
    assert not fleet.core.failed


def test_patience_needs_evaluations_with_an_accuracy():
    setup = make_setup(ROUNDS, evaluate_every=0, patience=3)
    with pytest.raises(ConfigError, match=r"run\.evaluate_every: .* because run\.patience is set"):
        check_attainable(setup)
    fleet = Fleet(make_setup(ROUNDS, evaluate_every=1, patience=3))
    fleet.join_evaluator()
    message, _ = fleet.evaluations.pop()
    fleet.say("score", {"metrics": {"loss": 0.5}}, "evaluator", message.id)
    assert fleet.finished == "run.patience: expected accuracy among the metrics, got loss"
    assert fleet.core.failed


@pytest.mark.parametrize("schedule", ["rounds", "buffered"])
@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_ends_a_run_in_the_same_way_from_any_checkpoint(limit, schedule):
    fleet, reason = limited_run(limit, schedule)
    setup = fleet.setup
    assert reason in fleet.finished
    posts = [each for each in fleet.actions if is_checkpoint(each)]
    assert len(posts) > 3
    for post in posts[1:]:
        later = [each for each in fleet.inbox if each.seq > fold_of(post).position]
        core, actions = resumed(setup, handed_over(post), later)
        rest = fleet.actions[fleet.actions.index(post) + 2 :]
        assert plain(actions) == plain(rest)
        assert core._spent == fleet.core._spent


@pytest.mark.parametrize("limit", LIMITS)
def test_a_run_that_a_limit_ended_goes_on_when_the_limit_is_raised(limit):
    fleet, _ = limited_run(limit)
    version, records = fleet.core.version, len(fleet.records)
    go_on(fleet, further=True, **{limit: LIMITS[limit][0] * 1000})
    come_back(fleet)
    fleet.join_evaluator()
    assert fleet.finished is None
    while fleet.core.version == version:
        fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    assert [each.kind for each in fleet.records[records:]] == ["version"]


def test_a_limit_that_is_not_raised_ends_a_run_again():
    fleet, _ = limited_run("max_bytes")
    go_on(fleet, further=True, versions=50)
    come_back(fleet)
    fleet.join_evaluator()
    assert LIMITS["max_bytes"][1] in fleet.finished


def test_the_longest_run_is_the_longest_timer():
    assert RunTable(max_wall_s=MAX_TIMER_S).max_wall_s == MAX_TIMER_S
    with pytest.raises(ValueError, match="max_wall_s"):
        RunTable(max_wall_s=MAX_TIMER_S * 1.01)


def test_the_first_limit_that_is_reached_is_the_reason():
    goal = Goal(10, max_bytes=100, max_wall_s=5.0, patience=2)
    assert goal.limit_reached(Spent(99, not_better=1), 4.9) == ("", "")
    assert goal.limit_reached(Spent(100, not_better=2), 5.0)[0] == "run.max_bytes"
    assert goal.limit_reached(Spent(99, not_better=2), 5.0)[0] == "run.patience"
    assert goal.limit_reached(Spent(99), 5.0)[0] == "run.max_wall_s"
