"""The worker's driver: errors of a user's code fail a task, not the worker."""

import contextlib

import pytest
import torch

from fedmq.algorithms.base import Payload, Task
from fedmq.algorithms.values import ReturnedError
from fedmq.broker.errors import LinkClosed
from fedmq.broker.wire.schema import Message
from fedmq.nodes.process.logs import SILENT
from fedmq.nodes.run.config import build
from fedmq.nodes.run.setup import set_up
from fedmq.nodes.worker.client_state import ClientStateStore, SavedClientState
from fedmq.nodes.worker.core import Evaluate, Failed, SaveClientState, Train
from fedmq.nodes.worker.driver import WorkerDriver
from fedmq.nodes.worker.training import RemoteError, RemoteReturnedError


class Core:
    evaluations = 0

    def __init__(self):
        self.events = []

    def handle(self, event):
        self.events.append(event)
        return []


class Port:
    log = SILENT
    away = contextlib.nullcontext

    def __init__(self, save):
        self.save = save

    def now(self):
        return 0.0


@pytest.fixture
def setup():
    return set_up(build({"problem": {"name": "tests.sim.tally:Vector"}}))


def save(value):
    message = Message(kind="result", id="a", run="r", sender="w", to="aggregator")
    state = SavedClientState("t", 1, Payload({"x": value}), message, ())
    return [SaveClientState(0, state)]


def test_a_state_that_cannot_be_encoded_fails_only_its_task(tmp_path, setup):
    core = Core()
    driver = WorkerDriver(core, setup, Port(ClientStateStore(tmp_path).put))
    driver.carry_out(save(torch.zeros(2, dtype=torch.complex64)))
    (failed,) = core.events
    assert isinstance(failed, Failed)
    assert "complex64" in failed.reason
    assert "complex64" in str(driver.error)


def test_the_end_of_the_link_fails_no_task(setup):
    def closed(*_):
        raise LinkClosed("over")

    core = Core()
    with pytest.raises(LinkClosed):
        WorkerDriver(core, setup, Port(closed)).carry_out(save(torch.zeros(2)))
    assert core.events == []


def remote(kind=RemoteError):
    return kind("text", "ValueError", "ValueError: text", "training-failed", "problem.py:7")


def computing(setup, error):
    """Return a core whose driver is given a port that raises this error, and the driver."""

    def compute(_):
        raise error

    core, port = Core(), Port(None)
    port.compute = compute
    return core, WorkerDriver(core, setup, port)


def test_an_error_in_another_process_fails_the_task_with_the_facts_from_there(setup):
    core, driver = computing(setup, remote())
    driver.carry_out([Train(0, Task(0, Payload()), None, 7)])
    assert core.events == [Failed("ValueError: text", "training-failed", "problem.py:7")]


def test_invalid_metrics_from_another_process_end_the_node_at_its_first_evaluation(setup):
    core, driver = computing(setup, remote(RemoteReturnedError))
    evaluation = Evaluate(Task(0, Payload()))
    with pytest.raises(ReturnedError, match=r"^text$"):
        driver.carry_out([evaluation])
    core.evaluations = 1
    driver.carry_out([evaluation])
    assert core.events == [Failed("ValueError: text", "training-failed", "problem.py:7")]
