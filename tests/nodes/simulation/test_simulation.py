"""Runs in virtual time: the real programs, on machines that fail."""

import dataclasses

import pytest
import torch

from fedmq.broker.errors import RunOver
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.virtual.disk import DiskFault
from fedmq.broker.virtual.network import Faults
from fedmq.nodes.run.digests import model_digest
from fedmq.nodes.simulation.virtual_node import apart
from fedmq.nodes.simulation.virtual_run import Chances, Simulation
from tests.sim.history import setup_of

LIMIT_S = 400.0
ROUNDS = 0
"""Index of a schedule whose model does not depend on the order of results."""


@pytest.fixture
def simulate(tmp_path):
    """Return a function that makes a simulation, which is closed after the test."""
    made = []

    def make(chances=None, seed=1, schedule=ROUNDS, setup=None):
        folder = tmp_path / str(len(made))
        made.append(Simulation(setup or setup_of(schedule, 0.0), 2, folder, seed, chances))
        return made[-1], folder

    yield make
    for each in made:
        each.close()


def model_of(simulation):
    return model_digest(simulation.aggregator.core.tensors())


def joined(folder, node):
    """Return how often a node was admitted."""
    messages = (each.read() for each in Trace(folder).entries() if isinstance(each, Accepted))
    return sum(each.kind == "joined" and each.body["node"] == node for each in messages)


def test_a_run_without_faults_needs_one_session_of_each_node(simulate):
    simulation, _ = simulate()
    assert simulation.run(0.0, LIMIT_S)
    assert [each.hello.node for each in simulation.sessions] == [
        "aggregator",
        "worker-0",
        "worker-1",
        "evaluator",
    ]
    assert "4 versions" in simulation.aggregator.finished
    simulation.run(0.0, 5.0)
    simulation.network.step()
    assert all(isinstance(each.ended, RunOver) for each in simulation.sessions)
    assert simulation.nodes == []


FAULTS = {
    "frames": Chances(faults=Faults(loss=0.1, duplicate=0.1, reorder=0.1)),
    "crash": Chances(crash=0.3),
    "doom": Chances(doom=0.3),
    "power": Chances(doom=0.2, power=0.2),
    "disk": Chances(disk={DiskFault.WRITE_ERROR: 0.02, DiskFault.SHORT_WRITE: 0.2}),
    "full": Chances(full=0.3, full_s=2.0),
    "pause": Chances(pause=0.3),
    "cut": Chances(cut=0.5),
    "partition": Chances(partition=0.2),
    "clocks": Chances(crash=0.2, jump=0.3, drift=0.1),
    "batches": Chances(batch_s=0.2),
    "shared files": Chances(crash=0.2, share_files=True),
    "chat": Chances(chat=1.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_with_a_fault_ends_the_same_way_each_time(simulate, fault):
    found = []
    for _ in range(2):
        simulation, folder = simulate(dataclasses.replace(FAULTS[fault], train_s=1.0))
        assert simulation.run(30.0, LIMIT_S)
        entries = list(Trace(folder).entries())
        sessions = [(each.hello, each.port.posted) for each in simulation.sessions]
        found.append((entries, sessions, model_of(simulation)))
        simulation.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("node", ["aggregator", "worker-0"])
def test_a_node_whose_clock_was_set_back_is_admitted_at_once_when_it_restarts(simulate, node):
    simulation, folder = simulate(Chances(away_s=0.1, train_s=30.0))
    simulation.run(0.0, 1.0)
    assert joined(folder, node) == 1
    simulation.machines[node].jump(-3600.0)
    [before] = [each for each in simulation.nodes if each.hello.node == node]
    before.port.kill()
    simulation.run(0.0, 1.0)
    assert joined(folder, node) == 2
    [after] = [each for each in simulation.nodes if each.hello.node == node]
    assert after.hello.session > before.hello.session
    assert simulation.run(0.0, 10 * LIMIT_S)


def test_a_paused_node_is_late_but_goes_on(simulate):
    simulation, _ = simulate(Chances(train_s=0.1))
    simulation.aggregator.port.pause()
    assert not simulation.run(0.0, 20.0)
    simulation.aggregator.port.resume()
    assert simulation.run(0.0, LIMIT_S)
    assert len(simulation.sessions) == 4


def test_an_unexpected_error_of_a_program_ends_the_simulation(simulate):
    class Broken(Exception):
        pass

    def handle(_):
        raise Broken

    simulation, _ = simulate()
    vars(simulation.aggregator.core)["handle"] = handle
    with pytest.raises(Broken):
        simulation.run(0.0, LIMIT_S)


def test_the_mode_of_torch_is_not_that_of_another_program():
    with torch.no_grad():
        with apart():
            assert torch.is_grad_enabled()
            torch.set_grad_enabled(True)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    with apart():
        pass
    assert torch.is_grad_enabled()
