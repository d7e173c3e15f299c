"""Clients that fail repeatedly wait; a run waits for the clients that it needs."""

import pytest

from fedmq.broker.link.events import PostMessage
from tests.algorithms.fleet import Fleet, changed, make_setup
from tests.nodes.aggregator.failing import SCHEDULES, every_schedule, fail, fleet_of, play, step

# ---- clients that wait

pytestmark = pytest.mark.slow


@every_schedule
def test_who_failed_twice_is_asked_again_after_a_timer_that_grows(schedule):
    fleet = fleet_of(schedule, clients=1, failures=6)
    waits = []
    while fleet.finished is None:
        while fleet.tasks:
            message, _ = fleet.tasks.pop(0)
            fail(fleet, message)
        waits += [
            each.message.body["after_s"]
            for each in fleet.actions
            if isinstance(each, PostMessage) and each.message.body.get("token") == "retry"
        ]
        fleet.actions.clear()
        if fleet.finished is None:
            fleet.seq += int(waits[-1])  # time is counted in messages here
            fleet.say("tick", {"token": "retry"})
    assert waits == pytest.approx([0.5, 1.0, 2.0, 4.0])


@every_schedule
def test_a_client_whose_failure_was_passing_comes_back(schedule):
    fleet = fleet_of(schedule, versions=80, failures=1000)
    failures = fleet.core._progress.failures.clients
    while 1 not in failures or failures[1].times < 3:
        step(fleet, {1})
    asked = play(fleet, ())
    assert asked.count(1) > 5
    assert failures == {}


def test_cohorts_follow_from_the_seed_and_not_from_how_long_failures_take():
    drawn = []
    for pace in (1.0, 1000.0):
        fleet = fleet_of("rounds", clients=8, versions=40)
        fleet.pace, asked = pace, []
        while fleet.finished is None:
            asked.append(step(fleet, {1, 5}))
        drawn.append(asked)
    assert drawn[0] == drawn[1]


def test_a_node_all_of_whose_clients_fail_is_made_to_wait_as_a_whole():
    """Many clients that fail for the first or second time would take turns."""
    setup = make_setup({"name": "stream", "concurrency": 4}, clients=24, versions=10**6)
    fleet = Fleet(setup, join=False)
    for node, (low, high) in {"w0": (0, 11), "w12": (12, 23)}.items():
        fleet.say("joined", {"node": node, "role": "worker", "clients": [[low, high]]})
    fleet.pace = 1e-6  # all of this happens in no time
    asked = 0
    for _ in range(200):
        (message, data) = fleet.tasks.pop(0)
        if message.body["client"] < 12:
            asked += 1
            body = {"reason": "no disk", "code": "training-failed"}
            fleet.say("failed", body, "w0", re=message.id)
        else:
            result, blobs = fleet.work(message, data)
            fleet.hear(changed(result, sender="w12"), blobs)
    assert asked < 20
    assert fleet.finished is None


def test_a_round_goes_on_without_those_who_wait():
    fleet = fleet_of("everybody", clients=3, versions=7)
    cohorts = []
    while fleet.finished is None:
        if fleet.core.version == len(cohorts):
            cohorts.append([message.body["client"] for message, _ in fleet.tasks])
        step(fleet, {2})
    assert cohorts == [[0, 1, 2], [0, 1, 2], [0, 1], [0, 1, 2], [0, 1], [0, 1], [0, 1, 2]]
    assert fleet.ticks == []


# ---- clients that a run waits for


def test_a_run_that_has_not_begun_waits_for_those_who_have_not_come():
    fleet = Fleet(make_setup(SCHEDULES["rounds"], clients=4), join=False)
    assert fleet.core.missing_clients() == [(0, 3)]
    fleet.join(2)
    assert fleet.core.missing_clients() == [(0, 1), (3, 3)]
    for k in (0, 1, 3):
        fleet.join(k)
    assert fleet.core.missing_clients() == []


def test_a_run_waits_midway_only_when_nobody_who_is_here_can_bring_a_result():
    schedule = {"name": "rounds", "fraction": 1.0, "min_results": 4}
    fleet = Fleet(make_setup(schedule, clients=4))
    fleet.leave("w3")
    assert fleet.core.missing_clients() == []
    while fleet.tasks[0][0].body["client"] != 3:
        fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    assert fleet.core.missing_clients() == [(3, 3)]
    fleet.join(3)
    assert fleet.core.missing_clients() == []


def test_a_buffer_larger_than_the_cohort_is_filled_by_clients_that_take_turns():
    setup = make_setup({"name": "buffered", "size": 9, "concurrency": 1}, clients=2, versions=2)
    assert Fleet(setup).run().counts == (18, 0, 0, 0)
