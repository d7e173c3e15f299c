"""A run without progress ends with the reason, also after a restart."""

import random

import msgspec
import pytest

from fedmq.algorithms.schedules import Schedule
from fedmq.broker.link.events import PostMessage
from fedmq.broker.wire.schema import Message
from fedmq.nodes.aggregator.checkpoint import Fold
from fedmq.nodes.aggregator.computed import Computed
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.aggregator.fleet import Fleet as Members
from fedmq.nodes.aggregator.progress import Failures, Progress, failures_allowed
from fedmq.nodes.messages.actions import EndRun, Start
from tests.algorithms.fleet import Fleet, changed, make_setup
from tests.nodes.aggregator.failing import (
    SCHEDULES,
    every_schedule,
    fail,
    fleet_of,
    play,
    spoiled,
    step,
)
from tests.nodes.aggregator.test_continued import come_back, go_on

# ---- the end of a run without progress


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


# ---- restarts and older releases


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
        for delivery in fleet.inbox[heard:]:
            posts += [each for each in core.handle(delivery) if isinstance(each, PostMessage)]
        assert core._progress.failures == fleet.core._progress.failures
        assert core._finishing == fleet.finished
        assert core.failed
        assert [each.message for each in posts] == [
            each.message for each in fleet.actions if isinstance(each, PostMessage)
        ][-len(posts) :]


def test_the_clock_of_a_broker_may_be_set_back():
    progress = Progress(make_setup(SCHEDULES["stream"], clients=1), 1)
    fleet = Members(1)
    body = {"node": "w0", "role": "worker", "clients": [[0, 0]]}
    about = {"id": "broker/0", "run": "run", "sender": "broker", "to": "aggregator"}
    fleet.joined(Message(kind="joined", body=body, **about))
    progress.now = 1000.0
    for _ in range(3):
        progress.failed(0, "w0", "training-failed", "no")
    assert progress.timer(fleet) == 1.0
    progress.now = 10.0
    progress.timer_is_over(fleet)
    assert progress.skipped(fleet) == ([], [])
