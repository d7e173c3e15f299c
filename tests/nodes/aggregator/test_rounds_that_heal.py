"""One lost client makes one round smaller; a late result never makes another result late."""

import random

import pytest

from tests.algorithms.fleet import Fleet, make_setup

pytestmark = pytest.mark.slow

LATE = ("use", "discount", "refuse")


def rounds(late="discount", **schedule):
    return {"name": "rounds", "fraction": 1.0, "late": late, **schedule}


def of_client(fleet, client, version):
    """Take a client's task of a version from those that are out."""
    (found,) = [
        each
        for each in fleet.tasks
        if (each[0].body["client"], each[0].body["model_version"]) == (client, version)
    ]
    fleet.tasks.remove(found)
    return found


def work_on(fleet, version):
    """Work on all tasks of a version that are out."""
    for message, data in list(fleet.tasks):
        if message.body["model_version"] == version:
            fleet.tasks.remove((message, data))
            fleet.hear(*fleet.work(message, data))


def own(fleet):
    return [each["results"] - each["late"] for each in fleet.versions]


def lose_one(late, **schedule):
    """Return a run whose first round has lost one of four clients, and that client's task."""
    fleet = Fleet(make_setup(rounds(late, **schedule), clients=4, versions=8))
    lost = of_client(fleet, 3, 0)
    fleet.leave("w3")
    work_on(fleet, 0)
    assert own(fleet) == [3]
    return fleet, lost


@pytest.mark.parametrize("late", LATE)
def test_after_one_lost_client_every_later_round_is_whole(late):
    fleet, lost = lose_one(late)
    fleet.join(3)
    fleet.hear(*fleet.work(*lost))
    assert [each[0].body["client"] for each in fleet.tasks] == [0, 1, 2, 3]
    fleet.run(random.Random(1))  # noqa: S311 - an order, not a secret
    assert own(fleet) == [3, *[4] * 7]
    helped = late != "refuse"
    assert [each["late"] for each in fleet.versions] == [0, int(helped), *[0] * 6]
    assert [each["cohort"] for each in fleet.versions] == [4] * 8
    assert fleet.counts == (31 + helped, 1 - helped, 0, 0)


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("seed", range(5))
def test_whoever_is_first_a_round_waits_for_a_client_that_is_behind(late, seed):
    """It was here when the round began, busy with the task of the one before."""
    fleet, lost = lose_one(late)
    fleet.join(3)
    work_on(fleet, 1)
    assert own(fleet) == [3, 3]
    work_on(fleet, 2)
    assert fleet.core.version == 2, "the fourth is not waited for"
    fleet.hear(*fleet.work(*lost))
    work_on(fleet, 2)
    assert own(fleet) == [3, 3, 4]
    fleet.run(random.Random(seed))  # noqa: S311
    assert own(fleet) == [3, 3, *[4] * 6]
    assert sum(each["late"] for each in fleet.versions) == (late != "refuse")


@pytest.mark.parametrize("late", LATE)
def test_a_client_that_stays_away_is_not_waited_for(late):
    fleet, _ = lose_one(late)
    fleet.run(random.Random(0))  # noqa: S311
    assert own(fleet) == [3] * 8
    assert [each["cohort"] for each in fleet.versions] == [4] * 8


def test_a_client_that_is_behind_and_leaves_is_not_waited_for():
    fleet, _ = lose_one("discount")
    fleet.join(3)
    work_on(fleet, 1)
    work_on(fleet, 2)
    assert fleet.core.version == 2
    fleet.leave("w3")
    assert own(fleet) == [3, 3, 3]


def test_a_client_whose_late_task_fails_is_drawn_as_well():
    fleet, (message, _) = lose_one("discount")
    fleet.join(3)
    fleet.say("failed", {"reason": "no memory"}, "w3", message.id)
    fleet.run()
    assert own(fleet) == [3, *[4] * 7]


@pytest.mark.parametrize("late", LATE)
def test_a_deadline_makes_one_result_late_and_no_others(late):
    """A slow client misses one deadline; the next round is whole within its own."""
    fleet = Fleet(make_setup(rounds(late, deadline_s=5.0), clients=4, versions=6))
    slow = of_client(fleet, 3, 0)
    work_on(fleet, 0)
    assert fleet.core.version == 0
    fleet.say("tick", {"token": "deadline/0"})
    assert own(fleet) == [3]
    fleet.hear(*fleet.work(*slow))
    fleet.run(random.Random(2))  # noqa: S311
    assert own(fleet) == [3, *[4] * 5]
    assert fleet.ticks == [f"deadline/{version}" for version in range(6)]


def test_late_results_do_not_stand_for_the_least_that_a_round_needs():
    schedule = rounds("use", deadline_s=5.0, min_results=3)
    fleet = Fleet(make_setup(schedule, clients=4, versions=3))
    slow = of_client(fleet, 3, 0)
    work_on(fleet, 0)
    fleet.say("tick", {"token": "deadline/0"})
    first, second = of_client(fleet, 0, 1), of_client(fleet, 1, 1)
    fleet.hear(*fleet.work(*slow))
    for each in (first, second):
        fleet.hear(*fleet.work(*each))
    fleet.say("tick", {"token": "deadline/1"})
    assert fleet.core.version == 1, "two of its own and a late one are not three"
    fleet.hear(*fleet.work(*of_client(fleet, 2, 1)))
    assert [each["results"] for each in fleet.versions] == [3, 4]


@pytest.mark.parametrize("late", LATE)
def test_over_selection_leaves_some_behind_and_every_round_whole(late):
    schedule = rounds(late, fraction=0.5, over_select=1.5)
    fleet = Fleet(make_setup(schedule, clients=8, versions=10))
    assert len(fleet.tasks) == 6
    fleet.run(random.Random(4))  # noqa: S311
    assert own(fleet) == [4] * 10
    late_ones = fleet.counts[1] if late == "refuse" else sum(e["late"] for e in fleet.versions)
    assert late_ones > 0


def test_a_restarted_aggregator_draws_the_same_cohorts():
    """What a round knows of who came back is in its inbox, not only in its memory."""
    fleet, lost = lose_one("discount")
    fleet.join(3)
    fleet.hear(*fleet.work(*lost))
    fleet.run(random.Random(3))  # noqa: S311
    again = Fleet(fleet.setup, join=False)
    for event in fleet.inbox:
        again.act(again.core.handle(event))
    assert again.versions == fleet.versions


def test_late_and_stale_results_are_rejected_by_different_codes():
    fleet, lost = lose_one("refuse")
    fleet.join(3)
    seq = fleet.hear(*fleet.work(*lost))
    assert (fleet.done_with[seq], fleet.codes[seq]) == ("too stale: 1 versions behind", "late")
