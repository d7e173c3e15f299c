"""What a user's code draws from the global generators is drawn again by a replay."""

import random
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
import torch

from fedmq.algorithms.base import Payload, Task
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.rng import seeded
from fedmq.broker.trace import Trace
from fedmq.nodes.carry_out import carry_out
from fedmq.nodes.personalise import Start, measure
from fedmq.nodes.replay.workers import Retraining
from fedmq.nodes.simulation import Chances, Simulation
from fedmq.nodes.worker import Evaluate, Train, Trained
from tests.algorithms.fleet import make_setup
from tests.algorithms.tiny import Tiny

STREAM = {"name": "stream", "concurrency": 2}


def drawn():
    """A number of each global generator."""
    return random.random() + np.random.random() + torch.rand(()).item()  # noqa: NPY002, S311


def state():
    """What all of them are in."""
    legacy = [np.asarray(each).tolist() for each in np.random.get_state()[1:]]  # noqa: NPY002
    return random.getstate(), legacy, torch.random.get_rng_state().tolist()


class Augmented(Tiny):
    """Data, loss and metrics that draw, as augmentation does."""

    def client(self, index):
        data = super().client(index)
        return Examples(data.x + drawn(), data.y)

    def loss(self, outputs, y):
        return super().loss(outputs * (1 + drawn()), y)

    def metrics(self, outputs, y):
        return {**super().metrics(outputs, y), "drawn": drawn()}


@dataclass(frozen=True)
class Careless(FedAvg):
    """It trains and draws without a generator of its own."""

    def train(self, task, client):
        result, local = super().train(task, client)
        noise = {name: each + torch.randn(each.shape) for name, each in result.weights.items()}
        return Payload(noise, result.exact, result.numbers), local

    def personalise(self, state, version, client):
        return {"accuracy": drawn() + client.data.x.sum().item()}


@pytest.fixture(scope="module")
def setup():
    made = make_setup(STREAM, versions=6, evaluate_every=2)
    algorithm = Careless(epochs=1)
    return type(made)(**{**vars(made), "problem": Augmented(), "algorithm": algorithm})


def actions_of(setup):
    task = Task(0, setup.algorithm.task(setup.algorithm.start(setup.problem), 0))
    return {"train": Train(0, task, None, 7), "evaluate": Evaluate(task, seed=7)}


def bits(event):
    if isinstance(event, Trained):
        return {name: each.tolist() for name, each in event.payload.weights.items()}
    return dict(event.metrics)


@pytest.mark.parametrize("which", ["train", "evaluate"])
def test_what_is_drawn_follows_from_the_seed_and_leaves_the_generators_as_they_were(setup, which):
    action = actions_of(setup)[which]
    found = []
    for _ in range(2):
        drawn()
        before = state()
        found.append(bits(carry_out(action, setup, "cpu")))
        assert state() == before
    assert found[0] == found[1]
    assert bits(carry_out(msgspec.structs.replace(action, seed=8), setup, "cpu")) != found[0]


def test_generators_are_as_they_were_after_a_task_that_fails(setup):
    action = msgspec.structs.replace(actions_of(setup)["train"], task=Task(0, Payload()))
    before = state()
    with pytest.raises(Exception, match="missing"):
        carry_out(action, setup, "cpu")
    assert state() == before


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_each_generator_is_seeded_with_the_whole_seed(seed):
    found = []
    for each in (seed, seed, seed ^ (1 << 40), seed ^ 8):
        with seeded(each):
            found.append((random.random(), np.random.random(), torch.rand(()).item()))  # noqa: NPY002, S311
    assert found[0] == found[1]
    # Of torch's on a CPU, the lower half makes all the difference.
    assert all(a != b for a, b in zip(found[0][:2], found[2][:2], strict=True))
    assert all(a != b for a, b in zip(found[0], found[3], strict=True))


def test_every_task_and_evaluation_of_a_run_replays_to_the_same_bytes(setup, tmp_path):
    simulation = Simulation(setup, 2, tmp_path, 5, Chances(train_s=0.3, crash=0.1))
    assert simulation.run(10.0, 400.0)
    simulation.broker.ledger.close()
    trace = Trace(tmp_path)
    for node in ("worker-0", "worker-1", "evaluator"):
        drawn()
        answers = list(Retraining(trace, setup, node).all())
        assert answers
        assert [each.message.re for each in answers if not each.same] == []


def test_a_new_client_is_measured_with_the_same_draws(setup):
    start = Start(setup.algorithm.start(setup.problem), 3, finished=True)
    found = []
    for _ in range(2):
        drawn()
        before = state()
        found.append(dict(measure(setup, start, [0, 1], "cpu")))
        assert state() == before
    assert found[0] == found[1]
    assert found[0][0]["accuracy"] != found[0][1]["accuracy"]
