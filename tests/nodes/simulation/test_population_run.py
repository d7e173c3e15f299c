"""Runs over a population of clients: each is a device with times of its own."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from fedmq.broker.errors import NoSpace
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.link import node_link
from fedmq.broker.rejections import Code
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.virtual.side_tasks import SideTasks
from fedmq.nodes.cluster.view import closing_table
from fedmq.nodes.errors import NodeError, RunFailed
from fedmq.nodes.history.run import runs_of
from fedmq.nodes.population.table import FaultsTable
from fedmq.nodes.run.config import build
from fedmq.nodes.run.digests import model_digest
from fedmq.nodes.run.setup import set_up
from fedmq.nodes.run_folder.summary import summary_of
from fedmq.nodes.simulation import population_node, population_run
from fedmq.nodes.simulation.chances import Chances, chances_of
from fedmq.nodes.simulation.population_run import PopulationRun
from fedmq.nodes.simulation.trainers import InlineTrainer

DOWN_S, COMPUTE_S, UP_S = 0.25, 2.0, 0.5
START = 946_684_800.0


@dataclass
class Devices:
    """Devices of equal speed, apart from what a test sets."""

    compute: dict = field(default_factory=dict)
    dropping: frozenset = frozenset()
    availability: object = None

    def download_s(self, client, nbytes):
        return DOWN_S + nbytes * 1e-9

    def upload_s(self, client, nbytes):
        return UP_S + nbytes * 1e-9

    def compute_s(self, client, task):
        return self.compute.get(client, COMPUTE_S)

    def drops(self, client, task):
        return client in self.dropping


class Watched(InlineTrainer):
    """Keeps the clients of all started tasks."""

    def __init__(self, setup):
        super().__init__(setup, "cpu")
        self.started = []

    def start(self, action, due=0.0):
        self.started.append(action.client)
        return super().start(action, due)


def setup_of(schedule, clients=6, versions=3, **run):
    return set_up(
        build(
            {
                "run": {"id": "r", "versions": versions, "evaluate_every": 1, **run},
                "problem": {"name": "tests.sim.tally:Vector", "clients": clients},
                "algorithm": {"name": "tests.sim.tally:Tally"},
                "schedule": schedule,
            }
        )
    )


class Spells:
    """Each client may be away once: ``away`` has (from, until) by client."""

    def __init__(self, away, clients=6):
        self.away, self.available = away, np.ones(clients, bool)
        self.next_change = 0.0
        self.advance(0.0)

    def advance(self, now):
        before = self.available.copy()
        for client, (begin, end) in self.away.items():
            self.available[client] = not begin <= now < end
        times = [at for spell in self.away.values() for at in spell if at > now]
        self.next_change = min(times, default=math.inf)
        changed = np.flatnonzero(before != self.available)
        back = [(int(c), int(c)) for c in changed if self.available[c]]
        return back, [(int(c), int(c)) for c in changed if not self.available[c]]

    def work_until(self, client, begin, seconds):
        start, end = self.away.get(client, (math.inf, math.inf))
        if start <= begin < end:
            begin = end
        elif begin < start < begin + seconds:
            begin += end - start
        return begin + seconds


ROUNDS = {"name": "rounds", "fraction": 1.0}
STREAM = {"name": "stream", "concurrency": 3}


@pytest.fixture
def simulate(tmp_path):
    """Return a function that makes a run, which is closed after the test."""
    made = []

    def make(setup, devices, name="", *, checked=True, **options):
        folder = tmp_path / (name or str(len(made)))
        made.append(
            PopulationRun(setup, folder, devices, Watched(setup), checked=checked, **options)
        )
        return made[-1], folder

    yield make
    for each in made:
        each.close()


def messages(folder):
    """Return the (number, time, message) of all accepted messages."""
    return [
        (each.seq, each.at, each.read())
        for each in Trace(folder).entries()
        if isinstance(each, Accepted)
    ]


def durations(folder):
    """Return by task's id: client, when it was sent, and after how long its answer came."""
    found = messages(folder)
    sent = {m.id: (m.body["client"], at - START) for _, at, m in found if m.kind == "task"}
    return [(*sent[m.re], at - START - sent[m.re][1], m) for _, at, m in found if m.re in sent]


def ledger_bytes(folder):
    return {each.name: each.read_bytes() for each in sorted(folder.iterdir()) if each.suffix}


def test_clients_work_at_the_same_time_and_their_times_add_up(simulate):
    run, folder = simulate(setup_of(ROUNDS), Devices(compute={4: 7.0}))
    assert "3 versions" in run.run_to_end()
    run.close()
    found = durations(folder)
    assert len(found) == 18
    for client, _, seconds, message in found:
        work = 7.0 if client == 4 else COMPUTE_S
        assert seconds == pytest.approx(DOWN_S + work + UP_S, abs=1e-5)
        assert message.body["elapsed_s"] == pytest.approx(work)
    assert run.now_s == pytest.approx(3 * (DOWN_S + 7.0 + UP_S), abs=1e-3)


def test_a_run_has_the_same_ledger_each_time(simulate):
    found = []
    for folder in ("a", "b/with/a longer name"):
        devices = Devices(compute={1: 3.0})
        run, folder = simulate(setup_of(STREAM, versions=20), devices, name=folder)
        run.run_to_end()
        run.close()
        found.append((ledger_bytes(folder), model_digest(run.aggregator.core.tensors())))
    assert found[0] == found[1]
    assert found[0][0]


def test_tasks_of_one_client_follow_one_another(simulate):
    run, folder = simulate(setup_of(ROUNDS, clients=1, versions=4), Devices())
    run.run_to_end()
    run.close()
    begins = [begin for _, begin, _, _ in durations(folder)]
    assert np.diff(begins) == pytest.approx([DOWN_S + COMPUTE_S + UP_S] * 3, abs=1e-5)


def test_a_client_that_drops_out_fails_its_task_without_training(simulate):
    setup = setup_of({"name": "stream", "concurrency": 3}, versions=10)
    run, folder = simulate(setup, Devices(dropping=frozenset({2})))
    run.run_to_end()
    run.close()
    dropped = [m for client, _, _, m in durations(folder) if client == 2]
    assert dropped
    assert {m.kind for m in dropped} == {"failed"}
    assert {m.body["code"] for m in dropped} == {Code.DROPPED}
    assert 2 not in run._trainer.started


def test_the_work_of_a_client_pauses_while_it_is_away(simulate):
    devices = Devices(compute={2: 5.0}, availability=Spells({2: (3.0, 10.0)}))
    every_client = {"name": "stream", "concurrency": 6}
    run, folder = simulate(setup_of(every_client, versions=60), devices)
    run.run_to_end()
    run.close()
    [seconds] = [took for client, begin, took, _ in durations(folder) if client == 2][:1]
    [begin] = [begin for client, begin, _, _ in durations(folder) if client == 2][:1]
    assert begin < 3.0 < 10.0 < begin + seconds
    assert seconds == pytest.approx(DOWN_S + 5.0 + 7.0 + UP_S, abs=1e-5)


def test_a_client_that_never_comes_back_leaves_its_task_undone(simulate):
    devices = Devices(availability=Spells({2: (1.0, math.inf)}))
    run, folder = simulate(setup_of(ROUNDS, versions=4), devices)
    assert "4 versions" in run.run_to_end()
    run.close()
    assert 2 not in [client for client, *_ in durations(folder)]


def test_a_node_reports_its_clients_that_come_and_go(simulate):
    away = {0: (0.0, 5.0), 1: (0.0, 5.0), 4: (6.0, 9.0)}
    devices = Devices(availability=Spells(away))
    run, folder = simulate(setup_of(ROUNDS, versions=8), devices, nodes=2)
    run.run_to_end()
    run.close()
    found = [
        (at - START, m.sender, m.body["back"], m.body["away"])
        for _, at, m in messages(folder)
        if m.kind == "availability"
    ]
    assert found == [
        (0.0, "population-0", [[2, 2]], []),
        (0.0, "population-1", [[3, 5]], []),
        (5.0, "population-0", [[0, 0], [1, 1]], []),
        (6.0, "population-1", [], [[4, 4]]),
        (9.0, "population-1", [[4, 4]], []),
    ]


def sent_to_away(folder, devices):
    """Return the tasks of clients that were away when they were sent, and the number of all."""
    sent = [(at - START, m.body["client"]) for _, at, m in messages(folder) if m.kind == "task"]
    spells = devices.availability.away
    never = (math.inf, math.inf)
    return [(at, c) for at, c in sent if spells.get(c, never)[0] <= at < spells[c][1]], len(sent)


@pytest.mark.parametrize("schedule", [ROUNDS, STREAM])
def test_no_client_that_is_away_at_the_start_gets_a_task(simulate, schedule):
    devices = Devices(availability=Spells({0: (0.0, 4.0), 3: (0.0, 1e9), 4: (0.0, 6.0)}))
    run, folder = simulate(setup_of(schedule, versions=12), devices, nodes=2)
    run.run_to_end()
    run.close()
    wrong, total = sent_to_away(folder, devices)
    assert not wrong
    assert total >= 12


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_node_reports_many_ranges_in_messages_that_belong_together(simulate, monkeypatch, nodes):
    monkeypatch.setattr(population_node, "MOST_RANGES", 2)
    away = dict.fromkeys(range(0, 16, 2), (0.0, 1e9))
    devices = Devices(availability=Spells(away, 16))
    schedule = {"name": "buffered", "size": 1, "concurrency": 3}
    run, folder = simulate(setup_of(schedule, clients=16), devices, nodes=nodes)
    run.run_to_end()
    run.close()
    kinds = [(m.kind, m.body.get("more")) for _, _, m in messages(folder)]
    reports = [more for kind, more in kinds if kind == "availability"]
    assert reports == ([True, True, True, None] if nodes == 1 else [True, None, True, None])
    first_task = [kind for kind, _ in kinds].index("task")
    assert ("availability", None) not in kinds[first_task:]


@pytest.mark.parametrize(
    ("faults", "lease_s"),
    [
        ({"pause": 300.0, "pause_s": 30.0}, 2.0),  # longer than the lease
        ({"node_crash": 200.0, "disconnect": 200.0, "away_s": 5.0}, 2.0),
        ({"broker_crash": 100.0, "node_crash": 100.0, "pause": 100.0, "away_s": 20.0}, 600.0),
    ],
)
def test_a_node_reports_its_available_clients_whenever_it_joins(simulate, faults, lease_s):
    devices = Devices(availability=Spells({0: (0.0, 1e9), 3: (0.0, 1e9), 5: (40.0, 1e9)}))
    run, folder = simulate(
        setup_of(ROUNDS, versions=40),
        devices,
        nodes=2,
        chances=chances_of(FaultsTable(**faults)),
        settings=BrokerSettings(lease_s, lease_s / 10),
    )
    assert "40 versions" in run.run_to_end(limit_s=1e5)
    run.close()
    found = [m for _, _, m in messages(folder) if m.kind == "joined"]
    joined = [m.body["node"] for m in found if m.body.get("reports_availability")]
    assert len(joined) > 2
    wrong, _ = sent_to_away(folder, devices)
    assert not [each for each in wrong if each[1] != 5]


def test_a_stopped_run_returns_and_its_ledger_is_closed(simulate):
    run, folder = simulate(setup_of(STREAM, versions=10_000), Devices())

    def stop_later():
        if run.aggregator.core.version == 3:
            run.stop()

    assert run.run_to_end(stop_later) == ""
    run.close()
    assert any(m.kind == "result" for _, _, m in messages(folder))


CRASHES = [
    Chances(crash=0.02),
    Chances(crash=0.02, doom=0.02),
    chances_of(FaultsTable(node_crash=100, broker_crash=100, disconnect=50, pause=50)),
]


@pytest.mark.parametrize("chances", CRASHES)
def test_nodes_and_broker_may_be_killed(simulate, chances):
    setup = setup_of(ROUNDS, versions=10)
    run, folder = simulate(setup, Devices(), nodes=2, chances=chances)
    assert "10 versions" in run.run_to_end(limit_s=1e5)
    assert any("killed" in kind for kind in run.network.made)
    run.close()
    versions = [m.body["version"] for _, _, m in messages(folder) if "mean_staleness" in m.body]
    assert versions == list(range(1, 11))
    answers = [m.id for _, _, m in messages(folder) if m.kind == "result"]
    assert len(set(answers)) == len(answers)


@pytest.mark.parametrize("restarts", [True, False])
def test_bytes_on_the_wire_are_a_lower_bound_after_a_restart_of_the_broker(simulate, restarts):
    run, folder = simulate(setup_of(ROUNDS, versions=3), Devices())
    if restarts:
        run.network.after(1.0, run.broker.crash)
    run.run_to_end()
    run.close()
    (history,) = runs_of(read_entries(folder)).values()
    assert history.wire_at_least is restarts
    summary = summary_of(history)
    assert summary["bytes"]["wire_at_least"] is restarts
    rows = [value for key, value in closing_table(summary).rows if key.startswith("bytes")]
    assert [", at least " in row for row in rows] == [restarts, restarts]


def test_a_run_in_which_nothing_happens_any_more_fails(simulate, monkeypatch):
    monkeypatch.setattr(population_run, "_IDLE_S", 21_600.0)
    devices = Devices(availability=Spells(dict.fromkeys(range(6), (1.0, math.inf))))
    run, _ = simulate(setup_of(ROUNDS, versions=4), devices, checked=False)
    with pytest.raises(
        NodeError, match=r"nothing has happened for 0.25 virtual days: .*clients 0-5 are away"
    ):
        run.run_to_end()


def test_a_run_that_fails_raises_why(simulate):
    run, _ = simulate(setup_of(ROUNDS, failures=12), Devices(dropping=frozenset(range(6))))
    with pytest.raises(RunFailed):
        run.run_to_end()


def test_results_of_one_moment_wake_few_tasks_while_the_link_has_no_room(simulate, monkeypatch):
    """Each frame woke every task that waited to post: 10,000 results at once took minutes."""
    monkeypatch.setattr(node_link, "_MAX_UNACKNOWLEDGED", 8)
    waits = []
    wait = SideTasks.wait
    monkeypatch.setattr(SideTasks, "wait", lambda tasks: waits.append(1) or wait(tasks))
    clients = 200
    setup = setup_of(ROUNDS, clients=clients, versions=2)
    run, _ = simulate(setup, Devices(), checked=False)
    assert run.run_to_end() == "2 versions committed"
    assert 0 < len(waits) < 2 * clients


def test_long_work_is_no_idleness(simulate):
    setup = setup_of(ROUNDS, versions=2)
    run, _ = simulate(setup, Devices(compute={0: 5e6}), checked=False)
    assert run.run_to_end() == "2 versions committed"
    assert run.now_s > 1e7


def test_tasks_that_crashes_always_interrupt_end_the_run_with_the_reason(simulate, monkeypatch):
    monkeypatch.setattr(population_run, "_VERSION_STEPS", 20_000)
    chances = chances_of(FaultsTable(node_crash=3600))
    run, _ = simulate(setup_of(ROUNDS), Devices(compute={0: 1e5}), chances=chances, checked=False)
    with pytest.raises(NodeError, match=r"no progress: 20,120 events without a new version"):
        run.run_to_end()


def test_a_full_disk_ends_the_run_with_the_reason(simulate, monkeypatch):
    def full(*_):
        raise NoSpace("no space left on device")

    run, _ = simulate(setup_of(ROUNDS, versions=50), Devices())
    run.network.after(10.0, lambda: monkeypatch.setattr(Ledger, "commit", full))
    with pytest.raises(NodeError, match=r"the ledger cannot be written: .*no space left"):
        run.run_to_end()
    monkeypatch.undo()
