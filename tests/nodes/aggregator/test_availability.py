"""Clients whose node is connected, but that are not available for a while."""

import random

import pytest

from fedmq.broker.rejections import Code
from fedmq.nodes.aggregator.checkpoint import Fold
from fedmq.nodes.aggregator.fleet import ClientSet, as_list, numbers_in
from fedmq.nodes.run.digests import model_digest
from tests.algorithms.fleet import Fleet, changed, make_setup
from tests.nodes.aggregator.test_resume import (
    SCHEDULES,
    fold_of,
    handed_over,
    is_checkpoint,
    plain,
    resumed,
    setup_of,
)

ALL = {"name": "rounds", "fraction": 1.0, "min_results": 1}


def hosted(clients=6, schedule=ALL, **run):
    """Return a run with one node, w0, that hosts all clients."""
    fleet = Fleet(make_setup(schedule, clients=clients, **run), join=False)
    ends = [[0, clients - 1]]
    fleet.say("joined", {"node": "w0", "role": "worker", "clients": ends})
    return fleet


def report(fleet, back=(), away=(), sender="w0"):
    ranges = {"back": [list(each) for each in back], "away": [list(each) for each in away]}
    return fleet.codes[fleet.say("availability", ranges, sender)]


def drawn(fleet):
    return [message.body["client"] for message, _ in fleet.tasks]


def result_of(fleet, client):
    """Answer a client's task, and return the code of its rejection, or None while it is held."""
    (at,) = [k for k, each in enumerate(fleet.tasks) if each[0].body["client"] == client]
    message, data = fleet.tasks.pop(at)
    result, data = fleet.work(message, data)
    return fleet.codes.get(fleet.hear(changed(result, sender="w0"), data))


def test_a_round_does_not_wait_for_clients_that_went_away():
    fleet = hosted()
    assert drawn(fleet) == [0, 1, 2, 3, 4, 5]
    assert report(fleet, away=[(1, 2), (4, 4)]) == ""
    for client in (5, 3):
        assert result_of(fleet, client) is None  # held until client 0 has answered
    assert fleet.core.version == 0
    assert result_of(fleet, 0) == ""
    assert fleet.core.version == 1
    assert drawn(fleet) == [1, 2, 4, 0, 3, 5]  # of the second round: those that are available


def test_the_result_of_a_client_that_went_away_may_come_late():
    fleet = hosted()
    report(fleet, away=[(1, 1)])
    for client in (0, 2, 3, 4, 5):
        result_of(fleet, client)
    assert fleet.core.version == 1
    assert result_of(fleet, 1) == ""
    assert fleet.core._results.current.late == 1


def test_a_client_that_came_back_in_its_round_is_waited_for():
    fleet = hosted()
    report(fleet, away=[(0, 1)])
    for client in (2, 3, 4):
        result_of(fleet, client)
    assert fleet.counts[0] == 3  # nothing before them is awaited
    report(fleet, back=[(0, 0)])
    assert result_of(fleet, 5) is None
    assert fleet.core.version == 0
    assert result_of(fleet, 0) == ""
    assert fleet.core.version == 1


def test_clients_that_came_back_are_drawn():
    fleet = hosted(schedule={"name": "buffered", "size": 1, "concurrency": 6}, versions=9)
    report(fleet, away=[(0, 2)])
    for client in (3, 4, 5):
        result_of(fleet, client)
        assert drawn(fleet)[-1] == client
    before = len(fleet.tasks)
    report(fleet, back=[(0, 2)])
    assert len(fleet.tasks) == before  # each has a task still
    assert fleet.core._tasks.num_in_flight == 6


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"away": [[6, 6]]}, Code.WRONG_CLIENT),
        ({"back": [[0, 9]]}, Code.WRONG_CLIENT),
        ({"away": [[2, 1]]}, Code.MALFORMED),
        ({"away": "all"}, Code.MALFORMED),
        ({"back": [[0]]}, Code.MALFORMED),
    ],
)
def test_other_messages_are_rejected(body, code):
    fleet = hosted()
    assert fleet.codes[fleet.say("availability", body, "w0")] == code
    assert fleet.core._tasks.num_in_flight == 6


def test_a_worker_cannot_speak_for_the_clients_of_another():
    fleet = Fleet(make_setup(ALL, clients=3))
    assert report(fleet, away=[(1, 1)], sender="w0") == Code.WRONG_CLIENT
    assert report(fleet, away=[(1, 1)], sender="w1") == ""


def test_a_client_in_both_is_away():
    fleet = hosted()
    report(fleet, away=[(1, 3)])
    report(fleet, back=[(2, 3)], away=[(3, 4)])
    assert fleet.core._fleet.reachable.missing() == [(1, 1), (3, 4)]
    fleet.core.validate_state()


@pytest.mark.parametrize("ends", ["leaves", "joins again"])
def test_a_new_session_makes_all_its_clients_available(ends):
    fleet = hosted()
    report(fleet, away=[(0, 5)])
    assert fleet.core.missing_clients() == [(0, 5)]
    if ends == "leaves":
        fleet.leave("w0")
    fleet.say("joined", {"node": "w0", "role": "worker", "clients": [[0, 5]]})
    assert fleet.core._tasks.num_in_flight == 6
    fleet.core.validate_state()


def test_clients_that_are_away_count_for_the_start():
    fleet = Fleet(make_setup(ALL, clients=3), join=False)
    fleet.join(0)
    report(fleet, away=[(0, 0)])
    fleet.join(1)
    assert not fleet.tasks
    fleet.join(2)
    assert drawn(fleet) == [1, 2]


def unreported(clients=6, schedule=ALL, **run):
    """Return a run with one node, w0, that reports which of its clients are available."""
    fleet = Fleet(make_setup(schedule, clients=clients, **run), join=False)
    body = {"node": "w0", "role": "worker", "clients": [[0, clients - 1]]}
    fleet.say("joined", body | {"reports_availability": True})
    return fleet


def test_a_node_that_reports_its_available_clients_gets_tasks_once_it_has():
    fleet = unreported()
    fleet.say("availability", {"back": [[0, 1]], "away": [], "more": True}, "w0")
    fleet.join_evaluator()
    assert not fleet.tasks
    assert fleet.core.missing_clients() == [(0, 5)]
    assert fleet.core._fold().unreported == ["w0"]
    report(fleet, back=[(4, 4)])
    assert drawn(fleet) == [0, 1, 4]
    assert not fleet.core._fold().unreported


def test_no_task_starts_on_a_part_of_a_report():
    fleet = unreported(schedule={"name": "buffered", "size": 1, "concurrency": 6})
    report(fleet, back=[(0, 0)])
    fleet.say("availability", {"back": [[1, 2]], "away": [], "more": True}, "w0")
    assert drawn(fleet) == [0]
    report(fleet, back=[(3, 3)])
    assert sorted(drawn(fleet)) == [0, 1, 2, 3]


def test_clients_of_a_node_that_joins_again_are_away_until_it_reports():
    fleet = unreported()
    report(fleet, back=[(0, 5)])
    body = {"node": "w0", "role": "worker", "clients": [[0, 5]], "reports_availability": True}
    fleet.say("joined", body)
    assert not len(fleet.core._fleet.reachable)
    fleet.core.validate_state()
    fleet.leave("w0")
    assert not fleet.core._fleet.unreported


def restless(setup, seed):
    """Return a run in which clients come and go."""
    dice = random.Random(seed)  # noqa: S311 - a test's own dice
    fleet = Fleet(setup)
    fleet.join_evaluator()
    for _ in range(600):
        if fleet.finished is not None:
            return fleet
        fleet.core.validate_state()
        client = dice.randrange(setup.problem.clients)
        if dice.random() < 0.4:
            way = {dice.choice(["back", "away"]): [(client, client)]}
            report(fleet, **way, sender=f"w{client}")
        elif fleet.evaluations:
            fleet.hear(fleet.score(*fleet.evaluations.pop(0)))
        elif fleet.tasks:
            fleet.hear(*fleet.work(*fleet.tasks.pop(dice.randrange(len(fleet.tasks)))))
    raise AssertionError("the run does not end")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(3))
def test_from_any_checkpoint_a_run_goes_on_in_the_same_way(schedule, seed):
    setup = setup_of(schedule)
    fleet = restless(setup, seed)
    posts = [each for each in fleet.actions if is_checkpoint(each)]
    assert any(fold_of(each).unavailable for each in posts)
    assert not any(fold_of(each).hosts for each in posts)
    for post in posts[1:]:
        later = [each for each in fleet.inbox if each.seq > fold_of(post).position]
        core, actions = resumed(setup, handed_over(post), later)
        assert plain(actions) == plain(fleet.actions[fleet.actions.index(post) + 2 :])
        assert model_digest(core.tensors()) == model_digest(fleet.core.tensors())


def test_a_checkpoint_of_an_older_release_has_a_host_for_each_client():
    fields = {"position": 0, "at": 0.0, "version": 0, "next_id": 1, "outstanding": {}}
    fields |= {"evaluators": [], "evaluating": [], "evaluated": 0, "counts": None}
    hosts = {0: "w0", 1: "w1", 2: "w0", 3: "w0"}
    fold = Fold(**fields, hosts=hosts, running=True, finishing="", ended=False)
    core = Fleet(make_setup(ALL, clients=5), join=False).core
    core._fleet.resume(fold.ranges(), ())
    assert list(core._fleet.hosts) == [(0, 0, "w0"), (1, 1, "w1"), (2, 3, "w0")]
    assert core._fleet.reachable.missing() == [(4, 4)]


@pytest.mark.parametrize("clients", [1, 1023, 1024, 1025, 5000])
def test_a_set_of_clients_finds_each_of_them_by_position(clients):
    dice = random.Random(clients)  # noqa: S311 - a test's own dice
    found, plain_set = ClientSet(clients), set()
    for _ in range(60):
        low = dice.randrange(clients)
        high = min(clients - 1, low + dice.randrange(1 + clients // 4))
        some = numbers_in([(low, high)])
        match dice.randrange(4):
            case 0:
                changed = set(as_list(found.discard_all(some)))
                assert changed == plain_set & set(range(low, high + 1))
                plain_set -= changed
            case 1:
                found.add(low)
                plain_set.add(low)
            case 2:
                found.discard(high)
                plain_set.discard(high)
            case _:
                changed = set(as_list(found.add_all(some)))
                assert changed == set(range(low, high + 1)) - plain_set
                plain_set |= changed
        ordered = sorted(plain_set)
        assert (len(found), as_list(found.all())) == (len(ordered), ordered)
        positions = sorted(dice.sample(range(len(ordered)), dice.randint(0, len(ordered))))
        at = found.at(numbers_in([(each, each) for each in positions]))
        assert as_list(at) == [ordered[each] for each in positions]
        assert found.count(low, high) == sum(low <= each <= high for each in ordered)
        missing = [k for a, b in found.missing() for k in range(a, b + 1)]
        assert missing == sorted(set(range(clients)) - plain_set)
        assert not [*found.faults()]
