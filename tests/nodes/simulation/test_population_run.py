"""Runs over a population of clients: each is a device with times of its own."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.rejections import Code
from fedmq.nodes.run.config import build
from fedmq.nodes.run.digests import model_digest
from fedmq.nodes.run.setup import set_up
from fedmq.nodes.simulation.population_run import PopulationRun
from fedmq.nodes.simulation.virtual_run import Chances
from fedmq.nodes.worker.training import compute

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


class Inline:
    """Trains when the result is asked for."""

    def __init__(self, setup):
        self.setup, self.started = setup, []

    def start(self, action, due=0.0):
        self.started.append((action.client, due))
        return lambda: compute(action, self.setup, "cpu")


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


ROUNDS = {"name": "rounds", "fraction": 1.0}
STREAM = {"name": "stream", "concurrency": 3}


@pytest.fixture
def simulate(tmp_path):
    """Return a function that makes a run, which is closed after the test."""
    made = []

    def make(setup, devices, name="", **options):
        folder = tmp_path / (name or str(len(made)))
        made.append(PopulationRun(setup, folder, devices, Inline(setup), checked=True, **options))
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
    assert 2 not in {client for client, _ in run._trainer.started}


def test_a_stopped_run_returns_and_its_ledger_is_closed(simulate):
    run, folder = simulate(setup_of(STREAM, versions=10_000), Devices())

    def stop_later():
        if run.aggregator.core.version == 3:
            run.stop()

    assert run.run_to_end(stop_later) == ""
    run.close()
    assert any(m.kind == "result" for _, _, m in messages(folder))


@pytest.mark.parametrize("chances", [Chances(crash=0.02), Chances(crash=0.02, doom=0.02)])
def test_nodes_and_broker_may_be_killed(simulate, chances):
    run, _ = simulate(setup_of(ROUNDS, versions=10), Devices(), nodes=2, chances=chances)
    assert "10 versions" in run.run_to_end(limit_s=1e5)
    assert any("killed" in kind for kind in run.network.made)
    run.close()
    calm, _ = simulate(setup_of(ROUNDS, versions=10), Devices())
    calm.run_to_end()
    assert model_digest(calm.aggregator.core.tensors()) == model_digest(
        run.aggregator.core.tensors()
    )
