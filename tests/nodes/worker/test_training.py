"""A replay repeats what a user's code draws from the global generators."""

import functools
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from fedmq.algorithms.base import Payload, Task, TrainResult
from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.rng import seeded
from fedmq.algorithms.values import ReturnedError
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.link.events import Delivery
from fedmq.broker.wire.encoding import decode_message, encode_message
from fedmq.broker.wire.schema import Message
from fedmq.nodes.cli.personalise import StartingState, measure
from fedmq.nodes.messages.payloads import RAW, pack
from fedmq.nodes.process.signals import this_process
from fedmq.nodes.replay.workers import AnswerPort, Retraining
from fedmq.nodes.simulation.virtual_run import Chances, Simulation
from fedmq.nodes.worker.core import Evaluate, Failed, Train, Trained, Worker
from fedmq.nodes.worker.driver import WorkerDriver
from fedmq.nodes.worker.training import compute
from tests.algorithms.fleet import Fleet, make_setup
from tests.algorithms.tiny import Tiny

STREAM = {"name": "stream", "concurrency": 2}


def drawn():
    """Return a number from each global generator."""
    return random.random() + np.random.random() + torch.rand(()).item()  # noqa: NPY002, S311


def state():
    """Return the states of all global generators."""
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
    """An algorithm that draws from the global generators."""

    def train(self, task, client):
        trained = super().train(task, client)
        result = trained.payload
        noise = {name: each + torch.randn(each.shape) for name, each in result.weights.items()}
        return replace(trained, payload=Payload(noise, result.exact, result.numbers))

    def personalise(self, state, version, client):
        return {"accuracy": drawn() + client.data.x.sum().item()}


@pytest.fixture(scope="module")
def setup():
    made = make_setup(STREAM, versions=6, evaluate_every=2)
    algorithm = Careless(epochs=1)
    return type(made)(**{**vars(made), "problem": Augmented(), "algorithm": algorithm})


def port_of(setup):
    return AnswerPort(functools.partial(compute, setup=setup, device="cpu"))


def actions_of(setup):
    task = Task(0, setup.algorithm.task(setup.algorithm.start(setup.problem), 0))
    return {"train": Train(0, task, None, 7), "evaluate": Evaluate(task, seed=7)}


def bits(event):
    if isinstance(event, Trained):
        return {name: each.tolist() for name, each in event.payload.weights.items()}
    return dict(event.metrics)


@pytest.mark.parametrize("which", ["train", "evaluate"])
def test_draws_depend_on_the_seed_only_and_the_generators_are_restored(setup, which):
    action = actions_of(setup)[which]
    found = []
    for _ in range(2):
        drawn()
        before = state()
        found.append(bits(compute(action, setup, "cpu")))
        assert state() == before
    assert found[0] == found[1]
    assert bits(compute(msgspec.structs.replace(action, seed=8), setup, "cpu")) != found[0]


def test_generators_are_restored_after_a_failed_task(setup):
    action = msgspec.structs.replace(actions_of(setup)["train"], task=Task(0, Payload()))
    before = state()
    with pytest.raises(Exception, match="missing"):
        compute(action, setup, "cpu")
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


@pytest.mark.slow
def test_every_task_and_evaluation_of_a_run_replays_to_the_same_bytes(setup, tmp_path):
    simulation = Simulation(setup, 2, tmp_path, 5, Chances(train_s=0.3, crash=0.1))
    assert simulation.run(10.0, 400.0)
    simulation.close()
    trace = Trace(tmp_path)
    for node in ("worker-0", "worker-1", "evaluator"):
        drawn()
        answers = list(Retraining(trace, setup, node).train_all())
        assert answers
        assert [each.message.re for each in answers if not each.matches] == []


def test_a_new_client_is_evaluated_with_the_same_draws(setup):
    start = StartingState(setup.algorithm.start(setup.problem), 3, finished=True)
    found = []
    for _ in range(2):
        drawn()
        before = state()
        found.append(dict(measure(setup, start, [0, 1], "cpu")))
        assert state() == before
    assert found[0] == found[1]
    assert found[0][0]["accuracy"] != found[0][1]["accuracy"]


# ---- what a user's methods return


class Measured(Tiny):
    """Client 1 has no examples; the metrics are given values."""

    metric = np.float64(0.25)

    def client(self, index):
        data = super().client(index)
        return Examples(data.x[:0], data.y[:0]) if index == 1 else data

    def metrics(self, outputs, y):
        return {"loss": torch.tensor(0.5), "mae": self.metric}


@dataclass(frozen=True)
class Returning(FedAvg):
    """An algorithm that returns invalid values."""

    def train(self, task, client):
        result = super().train(task, client).payload
        numbers = {**result.numbers, "seen": torch.tensor(0.5)}
        return TrainResult(Payload(result.weights, result.exact, numbers), np.int64(3))


@dataclass(frozen=True)
class Forgetful(FedAvg):
    def train(self, task, client):
        return super().train(task, client).payload, None

    def evaluate(self, task, problem, device):
        return None


def returning(setup, algorithm, problem=None):
    fields = {**vars(setup), "problem": problem or Measured(), "algorithm": algorithm}
    return type(setup)(**fields)


def test_numbers_of_numpy_and_torch_in_a_result_and_in_metrics_are_numbers(setup):
    changed = returning(setup, Returning(epochs=1))
    actions = actions_of(changed)
    numbers = compute(actions["train"], changed, "cpu").payload.numbers
    assert [type(each) for each in numbers.values()] == [int, str, float]
    metrics = compute(actions["evaluate"], changed, "cpu").metrics
    assert metrics == {"loss": 0.5, "mae": 0.25}
    assert {type(each) for each in metrics.values()} == {float}


def test_the_error_for_an_invalid_result_or_metrics_names_the_method(setup):
    changed = returning(setup, Forgetful(epochs=1))
    actions = actions_of(changed)
    with pytest.raises(ReturnedError, match=r"^Forgetful\.train: expected TrainResult\("):
        compute(actions["train"], changed, "cpu")
    with pytest.raises(ReturnedError, match=r"^Forgetful\.evaluate: expected a map"):
        compute(actions["evaluate"], changed, "cpu")
    problem = Measured()
    problem.metric = None
    changed = returning(setup, FedAvg(epochs=1), problem)
    with pytest.raises(ReturnedError, match=r"^Measured\.metrics: .* for 'mae', got None$"):
        compute(actions["evaluate"], changed, "cpu")


def test_tasks_of_a_client_without_examples_fail(setup):
    changed = returning(setup, FedAvg(epochs=1))
    train = msgspec.structs.replace(actions_of(changed)["train"], client=1)
    with pytest.raises(ProblemError, match=r"^Measured\.client: expected at least one example"):
        compute(train, changed, "cpu")


@pytest.mark.slow
def test_invalid_metrics_end_a_node_at_its_first_evaluation_and_later_fail_one_evaluation(setup):
    problem = Measured()
    changed = returning(setup, FedAvg(epochs=1), problem)
    core = Worker(changed, "r", "evaluator")
    action = actions_of(changed)["evaluate"]

    def evaluated():
        packed = pack(action.task.payload, RAW, 0)
        about = {
            "kind": "evaluate",
            "id": "a/1",
            "run": "r",
            "sender": "aggregator",
            "to": "evaluator",
        }
        body = {**packed.body, "model_version": 0}
        message = Message(**about, body=body, blobs=packed.blobs)
        (asked,) = core.handle(Delivery(0, 0.0, message, dict(enumerate(packed.data))))
        port = port_of(changed)
        WorkerDriver(core, changed, port).carry_out([asked])
        return port.answer

    problem.metric = None
    with pytest.raises(ReturnedError, match=r"^Measured\.metrics: .* for 'mae', got None$"):
        evaluated()
    core = Worker(changed, "r", "evaluator")
    problem.metric = 0.5
    post = evaluated()
    assert post.message.body["metrics"] == {"loss": 0.5, "mae": 0.5}
    problem.metric = None
    post = evaluated()
    assert post.message.kind == "failed"
    assert "Measured.metrics: expected a number for 'mae', got None" in post.message.body["reason"]


def test_an_error_that_is_not_valid_utf_8_fails_only_its_task(setup):
    class Unreadable(Tiny):
        def client(self, index):
            raise OSError("no such file: photo\udc80.png")

    changed = returning(setup, FedAvg(epochs=1), Unreadable())
    core = Worker(changed, "r", "w0", [(0, 0)])
    task = actions_of(changed)["train"].task
    packed = pack(task.payload, RAW, 0)
    about = {"kind": "task", "id": "a/1", "run": "r", "sender": "aggregator", "to": "client/0"}
    body = {**packed.body, "client": 0, "model_version": 0}
    message = Message(**about, body=body, blobs=packed.blobs)
    (train,) = core.handle(Delivery(0, 0.0, message, dict(enumerate(packed.data))))
    port = port_of(changed)
    WorkerDriver(core, changed, port).carry_out([train])
    assert decode_message(encode_message(port.answer.message)).body["reason"] == (
        "OSError: no such file: photo\\udc80.png"
    )


@pytest.mark.parametrize(
    "raised", [SystemExit(3), KeyboardInterrupt(), BaseExceptionGroup("two", [GeneratorExit()])]
)
def test_exit_in_user_code_fails_the_task(setup, monkeypatch, raised):
    class Exits(Tiny):
        def client(self, index):
            raise raised

    changed = returning(setup, FedAvg(epochs=1), Exits())
    train = actions_of(changed)["train"]
    with this_process.taken(watchdog=False), pytest.raises(RuntimeError) as caught:
        compute(train, changed, "cpu")
    failed = Failed.of(caught.value, changed)
    assert failed.reason.startswith(f"RuntimeError: raised {type(raised).__name__}")
    assert Path(__file__).name in failed.where
    if isinstance(raised, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):  # SIGINT is Python's here: someone pressed Ctrl-C
            compute(train, changed, "cpu")
    monkeypatch.setattr(this_process, "count", 1)
    with pytest.raises(type(raised)):  # after a signal it is the signal's doing
        compute(train, changed, "cpu")


@dataclass(frozen=True)
class Odd(FedAvg):
    """An algorithm one of whose server methods returns an invalid value."""

    method: str = ""

    def task(self, state, client):
        return None if self.method == "task" else super().task(state, client)

    def evaluation_task(self, state, client=0):
        return None if self.method == "evaluation_task" else super().task(state, client)

    def save(self, state):
        return Payload({"w": 3}) if self.method == "save" else super().save(state)

    def result_bytes(self, state):
        return "many" if self.method == "result_bytes" else np.int64(super().result_bytes(state))

    def tensors(self, state):
        return {"w": [1.0]} if self.method == "tensors" else super().tensors(state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("task", "Odd.task: expected a Payload, got None"),
        ("evaluation_task", "Odd.evaluation_task: expected a Payload, got None"),
        ("save", "Odd.save: expected a tensor for 'w' of weights, got 3"),
        ("result_bytes", "Odd.result_bytes: expected a number of bytes, got a value of type 'str'"),
        (
            "tensors",
            "Odd.tensors: expected a tensor for 'w' of the model, got a value of type 'list'",
        ),
    ],
)
def test_the_error_for_an_invalid_value_of_the_server_half_names_the_method(setup, method, error):
    def run(algorithm):
        fleet = Fleet(type(setup)(**{**vars(setup), "problem": Tiny(), "algorithm": algorithm}))
        fleet.join_evaluator()
        fleet.run()
        return fleet

    assert not run(Odd(epochs=1)).core.failed
    if method in ("tensors", "result_bytes"):  # asked for before the run begins
        with pytest.raises(ReturnedError, match=re.escape(error)):
            run(Odd(epochs=1, method=method))
    else:
        fleet = run(Odd(epochs=1, method=method))
        assert fleet.core.failed
        assert error in fleet.finished
