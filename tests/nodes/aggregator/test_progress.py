"""A run that gets nowhere ends and says why; who fails again and again is not asked at once."""

import random

import msgspec
import numpy as np
import pytest

from fedmq.algorithms.schedules import Schedule
from fedmq.nodes.aggregator.checkpoint import Fold
from fedmq.nodes.aggregator.computed import Computed
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.aggregator.progress import Failures, Progress, failures_allowed
from fedmq.nodes.messages.actions import EndRun, PostMessage, Start
from tests.algorithms.fleet import Fleet, changed, make_setup, with_data
from tests.nodes.aggregator.test_continued import come_back, go_on

SCHEDULES = {
    "rounds": {"name": "rounds", "fraction": 0.5},
    "everybody": {"name": "rounds", "fraction": 1.0},
    "deadline": {"name": "rounds", "fraction": 1.0, "deadline_s": 5.0, "min_results": 2},
    "buffered": {"name": "buffered", "size": 2, "concurrency": 3},
    "stream": {"name": "stream", "concurrency": 2},
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def fleet_of(schedule, clients=4, algorithm=None, rules=None, **run):
    setup = make_setup(SCHEDULES[schedule], clients=clients, algorithm=algorithm, **run)
    if rules is None:
        return Fleet(setup)
    fleet = Fleet(setup, join=False)
    fleet.core = Aggregator(setup, "run", "aggregator", Computed(rules=rules))
    fleet.core.handle(Start())
    for k in range(clients):
        fleet.join(k)
    return fleet


def fail(fleet, message, reason="RuntimeError: shapes", code="training-failed", **more):
    """The worker of a task says that it failed."""
    body = {"reason": reason, "code": code, **more}
    fleet.say("failed", body, f"w{message.body['client']}", re=message.id)


def spoiled(message, data):
    weights = np.frombuffer(data[0], dtype=np.float32).copy()
    weights[0] = np.nan
    return with_data(message, [weights.tobytes(), *data[1:]])


def step(fleet, bad, how=fail):
    """Let the oldest task fail if its client is bad; or let time pass. Return its client."""
    if not fleet.tasks:
        assert fleet.ticks, "the run waits for nothing"
        fleet.say("tick", {"token": fleet.ticks.pop(0)})
        return None
    message, data = fleet.tasks.pop(0)
    client = message.body["client"]
    if client not in bad:
        fleet.hear(*fleet.work(message, data))
    elif how is fail:
        fail(fleet, message, where="mine.py:7")
    else:
        fleet.hear(*how(*fleet.work(message, data)))
    return client


def play(fleet, bad, how=fail, limit=2000):
    """Go on until the run ends; return the clients asked, in order."""
    asked = []
    for _ in range(limit):
        if fleet.finished is not None:
            return [each for each in asked if each is not None]
        asked.append(step(fleet, bad, how))
    raise AssertionError("the run does not end")


# ---- the end of a run that gets nowhere


@every_schedule
def test_a_run_whose_tasks_all_fail_ends_with_the_last_reason(schedule):
    fleet = fleet_of(schedule)
    asked = play(fleet, range(4))
    allowed = failures_allowed(fleet.setup, None)
    assert len(asked) == allowed == 12
    assert set(asked) == set(range(4))
    assert "12 tasks in a row failed or were rejected" in fleet.finished
    assert f"client {asked[-1]}: RuntimeError: shapes (mine.py:7)" in fleet.finished
    assert fleet.core.failed
    assert fleet.records[-1].kind == "finished"
    assert fleet.records[-1].body["failed"] is True
    assert fleet.actions[-1] == EndRun(fleet.finished, failed=True)


@every_schedule
def test_a_run_that_failed_goes_on_when_it_is_asked_for_again_with_more_failures(schedule):
    fleet = fleet_of(schedule)
    play(fleet, range(4))
    go_on(fleet, further=True, failures=20)
    come_back(fleet)
    asked = play(fleet, range(4))
    assert len(asked) == 20
    assert "20 tasks in a row failed or were rejected" in fleet.finished
    go_on(fleet, further=True, failures=None)
    come_back(fleet)
    play(fleet, ())
    assert fleet.finished == f"{fleet.core.version} versions committed"
    assert not fleet.core.failed


@every_schedule
def test_a_run_whose_results_are_all_rejected_ends_with_the_last_reason(schedule):
    fleet = fleet_of(schedule)
    play(fleet, range(4), spoiled)
    assert "the result holds NaN or infinite values" in fleet.finished
    assert fleet.counts == (0, 0, 12, 0)
    assert fleet.core.failed


@pytest.mark.slow
@every_schedule
def test_one_client_that_always_fails_does_not_end_a_run_and_is_rarely_asked(schedule):
    fleet = fleet_of(schedule, versions=64)
    asked = play(fleet, {1})
    assert fleet.finished == "64 versions committed"
    assert not fleet.core.failed
    assert "failed" not in fleet.records[-1].body
    others = [asked.count(client) for client in (0, 2, 3)]
    assert 2 <= asked.count(1) <= min(16, *others)


@every_schedule
def test_a_used_result_begins_the_count_anew(schedule):
    fleet = fleet_of(schedule, versions=10, failures=5)
    rng = random.Random(3)  # noqa: S311 - an order
    in_a_row = 0
    while fleet.finished is None:
        bad = range(4) if in_a_row < 4 and rng.random() < 0.6 else ()
        used = fleet.counts[0]
        client = step(fleet, bad)
        in_a_row = 0 if fleet.counts[0] > used else in_a_row + (client is not None and bool(bad))
    assert not fleet.core.failed


def test_results_in_hand_may_yet_be_used():
    """They wait for a slow client before them; the others' failures do not end the run."""
    fleet = fleet_of("everybody", clients=6, failures=3, versions=1)
    slow, *others = fleet.tasks
    for message, data in others[:2]:
        fleet.hear(*fleet.work(message, data))
    for message, _ in others[2:]:
        fail(fleet, message)
    assert fleet.finished is None
    assert fleet.core._progress.hopeless
    fleet.hear(*fleet.work(*slow))
    assert fleet.finished == "1 versions committed"
    assert not fleet.core.failed


def test_results_in_hand_that_turn_out_bad_end_it():
    fleet = fleet_of("everybody", clients=4, failures=3, versions=1)
    slow, *others = fleet.tasks
    for message, data in others:
        fleet.hear(*spoiled(*fleet.work(message, data)))
    assert fleet.finished is None
    fail(fleet, slow[0])
    assert "4 tasks in a row failed or were rejected" in fleet.finished


def test_stale_results_are_no_failures():
    setup = make_setup(
        {"name": "stream", "concurrency": 8, "max_staleness": 0}, clients=8, versions=3, failures=2
    )
    fleet = Fleet(setup)
    first = [fleet.work(*fleet.tasks.pop(0)) for _ in range(8)]
    for message, data in first:
        fleet.hear(message, data)
    assert fleet.counts == (1, 7, 0, 0)
    assert fleet.finished is None


def test_what_is_no_answer_to_a_task_does_not_count():
    """Nobody can end a run by posting results that were not asked for."""
    fleet = fleet_of("buffered", failures=2)
    message, data = fleet.work(*fleet.tasks[0])
    for number in range(10):
        stranger = changed(message, re=f"aggregator/{1000 + number}", id=f"w0/{number}")
        fleet.hear(stranger, data)
        fleet.hear(changed(message, sender="w3", id=f"w3/{number}"), data)
    assert fleet.finished is None
    assert fleet.core._progress.failures == Failures()


def test_a_task_that_could_not_be_delivered_is_a_failure():
    fleet = fleet_of("stream", failures=3)
    for _ in range(3):
        message, _ = fleet.tasks.pop(0)
        body = {"id": message.id, "reason": "parked: 5 sessions died", "code": "dead-letter"}
        fleet.say("refused", body, re=message.id)
    assert "parked: 5 sessions died" in fleet.finished


def test_clients_that_go_away_on_demand_count_a_tenth():
    fleet = fleet_of("stream", failures=3)
    for number in range(30):
        assert fleet.finished is None, number
        message, _ = fleet.tasks.pop(0)
        fail(fleet, message, "dropped on demand", "dropped")
    assert "30 tasks in a row" in fleet.finished
    assert fleet.ticks == []


@pytest.mark.parametrize(
    ("schedule", "clients", "allowed"),
    [
        ({"name": "buffered"}, 1, 6),
        ({"name": "buffered"}, 4, 12),
        ({"name": "buffered"}, 40, 100),
        ({"name": "buffered", "concurrency": 500}, 1000, 1000),
        ({"name": "stream", "concurrency": 500}, 4, 12),
        ({"name": "rounds", "fraction": 1.0}, 1000, 2000),
        ({"name": "rounds", "fraction": 0.1}, 1000, 200),
        ({"name": "rounds", "fraction": 0.1, "over_select": 2.0}, 1000, 400),
    ],
)
def test_by_default_each_client_of_a_small_run_is_tried_three_times(schedule, clients, allowed):
    assert failures_allowed(make_setup(schedule, clients=clients), None) == allowed
    assert failures_allowed(make_setup(schedule, clients=clients), 7) == 7


def test_a_schedule_of_a_users_own_needs_to_say_nothing():
    class Own(Schedule):
        name = "own"

        def num_to_start(self, view):
            return 1

        weight = is_ready = divisor = num_to_start

    assert Own().at_once(9) == 9
    assert Own().least_clients() is None


# ---- who is made to wait


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


@pytest.mark.slow
@every_schedule
def test_a_client_whose_failure_was_passing_comes_back(schedule):
    fleet = fleet_of(schedule, versions=80, failures=1000)
    failures = fleet.core._progress.failures.clients
    while 1 not in failures or failures[1].times < 3:
        step(fleet, {1})
    asked = play(fleet, ())
    assert asked.count(1) > 5
    assert failures == {}


@pytest.mark.slow
def test_cohorts_follow_from_the_seed_and_not_from_how_long_failures_take():
    drawn = []
    for pace in (1.0, 1000.0):
        fleet = fleet_of("rounds", clients=8, versions=40)
        fleet.pace, asked = pace, []
        while fleet.finished is None:
            asked.append(step(fleet, {1, 5}))
        drawn.append(asked)
    assert drawn[0] == drawn[1]


@pytest.mark.slow
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


# ---- what is kept of it


def test_a_run_of_an_older_release_goes_on_as_it_did():
    fleet = fleet_of("buffered", rules=0)
    for _ in range(500):
        message, _ = fleet.tasks.pop(0)
        fail(fleet, message)
    assert fleet.finished is None
    assert fleet.ticks == []
    assert Computed.read({"arithmetic": 2, "device": "cpu"}).rules == 0
    assert Computed.read({}).rules == 0
    assert "rules" not in Computed(rules=0).facts()
    assert Computed.read(Computed().facts()).rules == Computed().rules > 0


def test_a_checkpoint_of_an_older_release_has_no_failures():
    fleet = fleet_of("buffered")
    fold = msgspec.to_builtins(fleet.core._fold())
    del fold["failures"], fold["failed"], fold["rules"]
    one, other = (msgspec.convert(fold, Fold) for _ in range(2))
    assert one.failures == Failures()
    assert one.failures is not other.failures
    assert one.rules == 0


@pytest.mark.slow
@every_schedule
def test_the_next_session_counts_on_and_says_the_same(schedule):
    """From each checkpoint: what a new core says to the rest of the inbox was said before."""
    fleet = fleet_of(schedule, versions=200, checkpoint_s=0.0)
    seen = []
    for number in range(400):
        if fleet.finished is not None:
            break
        bad = {1} if number < 60 else range(4)
        before = fleet.checkpoint
        step(fleet, bad)
        if fleet.checkpoint is not before and len(seen) < 12:
            seen.append((fleet.checkpoint, len(fleet.inbox)))
    assert fleet.core.failed
    for checkpoint, heard in seen[1:]:
        core = Aggregator(fleet.setup, "run", "aggregator")
        posts = [each for each in core.handle(Start(checkpoint)) if isinstance(each, PostMessage)]
        for inbound in fleet.inbox[heard:]:
            posts += [each for each in core.handle(inbound) if isinstance(each, PostMessage)]
        assert core._progress.failures == fleet.core._progress.failures
        assert core._finishing == fleet.finished
        assert core.failed
        assert [each.message for each in posts] == [
            each.message for each in fleet.actions if isinstance(each, PostMessage)
        ][-len(posts) :]


def test_the_clock_of_a_broker_may_be_set_back():
    progress = Progress(make_setup(SCHEDULES["stream"], clients=1), 1)
    hosts = {0: "w0"}
    progress.now = 1000.0
    for _ in range(3):
        progress.failed(0, "w0", "training-failed", "no")
    assert progress.timer(hosts) == 1.0
    progress.now = 10.0
    progress.timer_is_over(hosts)
    assert progress.waiting(hosts) == set()


# ---- the algorithm's own code


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
    assert fleet.done[seq] == ""


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


# ---- whom a run waits for


def test_a_run_that_has_not_begun_waits_for_those_who_have_not_come():
    fleet = Fleet(make_setup(SCHEDULES["rounds"], clients=4), join=False)
    assert fleet.core.missing_clients() == [0, 1, 2, 3]
    fleet.join(2)
    assert fleet.core.missing_clients() == [0, 1, 3]
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
    assert fleet.core.missing_clients() == [3]
    fleet.join(3)
    assert fleet.core.missing_clients() == []


def test_a_buffer_larger_than_the_cohort_is_filled_by_clients_that_take_turns():
    setup = make_setup({"name": "buffered", "size": 9, "concurrency": 1}, clients=2, versions=2)
    assert Fleet(setup).run().counts == (18, 0, 0, 0)
