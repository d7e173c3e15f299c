"""Very many clients: what an aggregator knows of them is kept up to date, not counted each time."""

import random
import sys

import msgspec
import pytest

from fedmq.algorithms.rng import derive_rng
from fedmq.broker.wire.schema import Message
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.aggregator.fleet import Fleet as Members
from fedmq.nodes.aggregator.progress import Progress
from fedmq.nodes.aggregator.tasks import Tasks
from fedmq.nodes.aggregator.version import VersionBuffer
from tests.algorithms.fleet import Fleet, changed, make_setup

CLIENTS = 30
SETUP = make_setup({"name": "rounds", "fraction": 1.0}, clients=CLIENTS)


def about(kind, node, *, re=None, sender="broker", **body):
    return Message(
        kind=kind,
        id="broker/1",
        run="run",
        sender=sender,
        to="aggregator",
        re=re,
        body={"node": node, "role": "worker", **body},
    )


@pytest.mark.parametrize("seed", range(10))
def test_counts_and_draws_are_those_of_looking_at_every_task_and_client(seed):
    dice = random.Random(seed)  # noqa: S311 - a test's own dice
    members = Members(CLIENTS)
    tasks = Tasks(SETUP, members, Progress(SETUP, 0))
    state = SETUP.algorithm.start(SETUP.problem)
    current = VersionBuffer(SETUP, state, 0, 0)
    tasks.begin_version(current)
    names = iter(range(10_000))
    for _ in range(400):
        node = dice.randrange(6)
        low = dice.randrange(CLIENTS)
        match dice.randrange(9):
            case 0:
                ends = [low, min(low + dice.randrange(8), CLIENTS - 1)]
                reports = {"reports_availability": True} if dice.random() < 0.3 else {}
                message = about("joined", f"w{node}", clients=[ends], **reports)
                back, away = members.joined(message)
                tasks.came_back(back)
                tasks.went_away(away)
            case 1:
                tasks.went_away(members.left(about("left", f"w{node}")))
            case 2:
                current = VersionBuffer(SETUP, state, current.version + 1, 0)
                tasks.begin_version(current)
            case 3:
                tasks.past_deadline(dice.randint(0, current.version))
            case 4 if tasks.in_flight:
                name = dice.choice(sorted(tasks.in_flight))
                client = tasks.in_flight[name].client
                node = members.hosts.get(client) or tasks.in_flight[name].node
                tasks.answered(about("result", node, re=name, sender=node))
                if dice.random() < 0.5:
                    current.contributed.add(client)
                else:
                    tasks.freed(client)
            case 5:
                tasks.resume(dict(tasks.in_flight))
            case 6:
                ranges = (
                    dice.sample(members.hosts.ranges_of(f"w{node}"), 1)
                    if (members.hosts.ranges_of(f"w{node}"))
                    else []
                )
                moved = {name: ranges for name in ("back", "away") if dice.random() < 0.6}
                message = about("availability", f"w{node}", sender=f"w{node}", **moved)
                back, away = members.availability(message)
                tasks.came_back(members.came_back(back))
                tasks.went_away(members.went_away(away))
            case _:
                before = current.draws
                count = dice.randrange(4)
                found = tasks.draw(count, current)
                busy = {each.client for each in tasks.in_flight.values()} | current.contributed
                idle = sorted(set(members.reachable.all().tolist()) - busy)
                if 0 < count < len(idle):
                    assert current.draws == before + 1
                    rng = derive_rng(SETUP.config.run.seed, "cohort", current.version, before)
                    assert found == sorted(rng.choice(idle, count, replace=False))
                else:
                    assert found == (idle if count else [])
                for client in found:
                    name = f"aggregator/{next(names)}"
                    tasks.sent(name, client, current.version)
                    current.sent(name)
        view = tasks.view(current)
        expected = [each for each in tasks.in_flight.values() if each.client in members.reachable]
        ours = [
            each for each in expected if each.version == current.version and not each.past_deadline
        ]
        assert (view.in_flight, view.outstanding) == (len(expected), len(ours))
        assert not [*tasks.faults(current), *members.faults()]


@pytest.mark.parametrize("backwards", [False, True])
def test_a_result_costs_the_same_whatever_the_cohort(monkeypatch, backwards):
    """Unless it has to wait for those before it: then the last one adds up all of them."""
    asked = []
    is_expected = Tasks.is_expected

    def counted(self, name):
        asked.append(name)
        return is_expected(self, name)

    monkeypatch.setattr(Tasks, "is_expected", counted)
    setup = make_setup({"name": "rounds", "fraction": 1.0}, clients=CLIENTS, versions=2)
    fleet = Fleet(setup)
    while fleet.finished is None:
        fleet.hear(*fleet.work(*fleet.tasks.pop(-1 if backwards else 0)))
    assert fleet.counts == (2 * CLIENTS, 0, 0, 0)
    assert len(asked) <= 2 * 2 * CLIENTS


def fleet_of(clients, schedule, **run):
    """Return a run in which one node hosts all clients, and a function that answers a task."""
    one = Fleet(make_setup(schedule, clients=2))
    result, data = one.work(*one.tasks.pop(0))
    setup = make_setup(schedule, clients=clients, versions=1000, **run)
    fleet = Fleet(setup, join=False, workers=False)
    ends = [[0, clients - 1]]
    fleet.say("joined", {"node": "w0", "role": "worker", "clients": ends})

    def answer():
        task, _ = fleet.tasks.pop(0)
        about = {"re": task.id, "id": f"w0/{task.id}", "sender": "w0"}
        return changed(result, body={"client": task.body["client"]}, **about), data

    return fleet, answer


def calls_of(clients, schedule):
    """Return the function calls of 300 results with so many clients, and the checkpoint's size."""
    fleet, answer = fleet_of(clients, schedule, checkpoint_s=1e9)
    fleet.say("availability", {"back": [], "away": [[5, 9], [400, 420]]}, "w0")
    counted = 0

    def count(frame, event, arg):
        nonlocal counted
        counted += event in ("call", "c_call")

    for _ in range(300):
        message, data = answer()
        sys.setprofile(count)
        try:
            fleet.hear(message, data)
        finally:
            sys.setprofile(None)
    assert not [*fleet.core._faults()]
    return counted, len(msgspec.msgpack.encode(fleet.core._fold()))


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "buffered", "size": 10, "concurrency": 200},
        {"name": "rounds", "fraction": 0.0, "min_results": 200},
    ],
)
def test_a_result_costs_the_same_whatever_the_number_of_clients(monkeypatch, schedule):
    monkeypatch.setattr(Aggregator, "validate_state", lambda _: None)  # it looks at all clients
    (few, small), (many, large) = (calls_of(clients, schedule) for clients in (1_000, 100_000))
    assert abs(many - few) < 0.02 * few
    assert large - small < 100_000 // 8 + 500  # a bit for each client while some are away


def test_a_large_checkpoint_is_written_less_often():
    """One with 100 tasks in flight comes with every tenth message, at most."""
    schedule = {"name": "buffered", "size": 1, "concurrency": 100}
    fleet, answer = fleet_of(120, schedule, checkpoint_s=0.0)
    for _ in range(60):
        fleet.hear(*answer())
    places = [each.to for each in fleet.records if each.kind == "version"]
    assert len(places) == 60
    assert places.count("checkpoint") == 6
