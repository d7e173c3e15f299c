"""FedAvg + fine-tuning, and local training alone."""

import dataclasses

import pytest
import torch

from fedmq.algorithms.base import Payload, Result
from fedmq.algorithms.errors import ProblemError, ResultError
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.personal.fedavg_finetune import FedAvgFT, LocalOnly
from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.toolkit.sgd import batches
from fedmq.nodes.run.config import build
from fedmq.nodes.run.setup import set_up
from tests.algorithms.fleet import Fleet
from tests.algorithms.split_problems import Halves, Tracking, play, same, task_of
from tests.algorithms.tiny import client

OPTIONS = {"lr": 0.1, "batch_size": 4, "momentum": 0.5, "weight_decay": 0.1}


def scored(problem, index, *states):
    """Return a client's metrics of a model with these tensors."""
    module = problem.model()
    module.load_state_dict({name: each for state in states for name, each in state.items()})
    test = problem.client_test(index)
    return problem.metrics(module.eval()(test.x), test.y)


# ---- FedAvg + fine-tuning


def test_training_is_fedavgs_bit_for_bit():
    problem = Tracking()
    one, _ = play(FedAvg(epochs=2, **OPTIONS), problem, 2)
    other, kept = play(FedAvgFT(epochs=2, finetune_epochs=5, **OPTIONS), problem, 2)
    assert torch.equal(one.weights, other.weights)
    assert torch.equal(one.counters, other.counters)
    assert kept == {0: None, 1: None}


@pytest.mark.parametrize("problem", [Halves(), Tracking()], ids=["plain", "batch norm, dropout"])
def test_a_client_is_evaluated_after_epochs_like_those_of_training(problem):
    """The adapted model is the one that is tested: it is what a task would have made."""
    algorithm = FedAvgFT(finetune_epochs=3, **OPTIONS)
    state, _ = play(algorithm, problem, 1)
    at, task = client(problem, 1), task_of(algorithm, state, "model")
    found = algorithm.evaluate_client(task, at)
    result = FedAvg(epochs=3, **OPTIONS).train(task, at).payload
    expected = scored(problem, 1, result.weights, result.exact)
    assert (found["loss"], found["accuracy"]) == (expected["loss"], expected["accuracy"])
    assert found["accuracy_before"] == scored(problem, 1, algorithm.tensors(state))["accuracy"]


@pytest.mark.parametrize("head", [None, 1])
def test_without_finetuning_it_is_the_common_models_local_accuracy(head):
    problem, algorithm = Halves(), FedAvgFT(finetune_epochs=0, head=head)
    state, _ = play(algorithm, problem, 2)
    found = algorithm.evaluate_client(task_of(algorithm, state), client(problem, 1))
    expected = scored(problem, 1, algorithm.tensors(state))
    assert found == {**expected, "accuracy_before": expected["accuracy"]}


def test_the_head_alone_can_be_finetuned():
    """By torch.optim.SGD on the last layer."""
    problem, algorithm = Halves(), FedAvgFT(finetune_epochs=3, head=1, **OPTIONS)
    state, _ = play(algorithm, problem, 1)
    module, data = problem.model(), problem.client(1)
    module.load_state_dict(algorithm.tensors(state))
    optimizer = torch.optim.SGD(module[2].parameters(), lr=0.1, momentum=0.5, weight_decay=0.1)
    for x, y in batches(data, 4, 3, derive_rng(7, "head batches")):
        module.zero_grad()
        problem.loss(module(x), y).backward()
        optimizer.step()
    found = algorithm.evaluate_client(task_of(algorithm, state), client(problem, 1))
    expected = scored(problem, 1, module.state_dict())
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_model_without_a_head_is_refused_only_where_one_is_asked_for():
    FedAvgFT(head=None).start(Halves())
    with pytest.raises(ProblemError, match="fewer than the model's 2 trained layers"):
        FedAvgFT(head=2).start(Halves())


@pytest.mark.parametrize("algorithm", [FedAvgFT(), FedAvgFT(head=1), LocalOnly()])
def test_nothing_is_adapted_on_test_data(algorithm):
    """With other test examples the loss is that of the same adapted model."""

    class Flipped(Halves):
        def client_test(self, index):
            test = super().client_test(index)
            return dataclasses.replace(test, y=1 - test.y)

    found = []
    for problem in (Halves(), Flipped()):
        state = algorithm.start(problem)
        found.append(algorithm.evaluate_client(task_of(algorithm, state), client(problem, 1)))
    assert found[0]["accuracy"] == pytest.approx(1 - found[1]["accuracy"])
    assert found[0]["accuracy_before"] == pytest.approx(1 - found[1]["accuracy_before"])


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [FedAvgFT(), FedAvgFT(head=1), LocalOnly()])
def test_an_evaluation_follows_from_its_seed_and_leaves_the_task_as_it_was(algorithm):
    problem = Tracking()
    if algorithm.head == 1:
        algorithm = dataclasses.replace(algorithm, head=3)
    state = algorithm.start(problem)
    before, random = state.weights.clone(), torch.random.get_rng_state()
    found = [
        algorithm.evaluate_client(task_of(algorithm, state), client(problem, 1, seed))
        for seed in (1, 2, 1)
    ]
    assert found[0] == found[2] != found[1]
    assert torch.equal(state.weights, before)
    assert torch.equal(torch.random.get_rng_state(), random)


# ---- local training


def test_a_client_alone_goes_on_from_the_model_that_it_kept():
    """Two tasks are two of FedAvg's, each from where the last one ended."""
    problem, algorithm = Tracking(), LocalOnly(epochs=2, **OPTIONS)
    avg = FedAvg(epochs=2, **OPTIONS)
    state, local, weights = algorithm.start(problem), None, avg.start(problem)
    for seed in (1, 2):
        task = task_of(algorithm, state)
        trained = algorithm.train(task, client(problem, 1, seed, local))
        local = trained.local_state
        assert trained.payload == Payload(numbers={"reply": "update"})
        assert trained.num_examples == 12
        whole = avg.train(task_of(avg, weights, "model"), client(problem, 1, seed)).payload
        assert same(local.exact, {**whole.weights, **whole.exact})
        weights = avg.load(problem, whole)


def test_a_client_alone_is_evaluated_with_its_own_model():
    problem, algorithm = Halves(), LocalOnly(finetune_epochs=0, lr=0.3, epochs=5)
    state, kept = play(algorithm, problem, 2)
    for index in range(2):
        at = client(problem, index, local=kept[index])
        found = algorithm.evaluate_client(task_of(algorithm, state), at)
        assert found["loss"] == scored(problem, index, kept[index].exact)["loss"]
    before = kept[1].exact["0.weight"].clone()
    tuned = dataclasses.replace(algorithm, finetune_epochs=9)
    assert tuned.evaluate_client(task_of(tuned, state), at)["loss"] != found["loss"]
    assert torch.equal(kept[1].exact["0.weight"], before)


def test_nothing_that_clients_send_changes_the_state():
    problem, algorithm = Halves(), LocalOnly()
    first = algorithm.start(problem)
    state, _ = play(algorithm, problem, 2)
    assert torch.equal(state.weights, first.weights)
    whole = Payload(dict(algorithm.tensors(state)), numbers={"n": 1, "reply": "update"})
    gathered = algorithm.new_accumulator(state)
    with pytest.raises(ResultError, match="without tensors"):
        algorithm.accumulate(gathered, state, Result(0, 0, whole, 1), 1.0)
    assert not gathered.total.any()


@pytest.mark.parametrize("schedule", ["rounds", "buffered", "stream"])
def test_a_fleet_of_clients_alone_sends_no_tensors(schedule):
    options = {"rounds": {"fraction": 1.0}, "buffered": {"size": 2}, "stream": {}}[schedule]
    setup = set_up(
        build(
            {
                "run": {"versions": 3, "evaluate_every": 0},
                "problem": {"name": "tests.algorithms.split_problems:Halves", "clients": 2},
                "algorithm": {"name": "fedmq.algorithms.personal.fedavg_finetune:LocalOnly"},
                "schedule": {"name": schedule, **options},
            }
        )
    )
    fleet = Fleet(setup)
    while fleet.tasks:
        message, data = fleet.tasks.pop(0)
        answer, sent = fleet.work(message, data)
        assert not data
        assert not sent
        fleet.hear(answer, sent)
    assert fleet.core.version == 3
    assert fleet.counts[1:] == (0, 0, 0)
    assert all(fleet.locals[f"w{k}"].get(k).local.exact for k in range(2))
