"""Jiang's personalised FedAvg at the clients: the steps of each phase, and fine-tuning."""

import dataclasses
import random

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from fedmq.algorithms.base import Result, Task
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.personal.personalised_fedavg import PersonalisedFedAvg
from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.toolkit.sgd import batches
from tests.algorithms.tiny import Dropping, Normed, Tiny, change, client
from tests.algorithms.two_phases import FOREVER, Local, move, train


class Halves(Tiny):
    """A linear model, squared error, and numbers so round that no float32 sum of them rounds."""

    def module(self):
        module = nn.Linear(2, 1, bias=False)
        module.weight.data = torch.tensor([[1.0, -2.0]])
        return module

    def client(self, index):
        x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 1.0]])
        return Examples(x, torch.tensor([1, 0, 1, -1]))

    def loss(self, outputs, y):
        return (outputs[:, 0] - y).square().sum() / 4


def vector(state, result):
    return change(state.layout, result)


# ---- the identity that the paper starts from


def point(problem, w, batch):
    """Return the gradient of the mean loss at w, by autograd."""
    w = w.detach().requires_grad_()
    outputs = batch.x @ w.view(-1, 1)
    return torch.autograd.grad(problem.loss(outputs, batch.y), w)[0]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_k_steps_are_the_fedsgd_gradient_and_the_fomaml_gradients_of_1_to_k_minus_1(steps):
    """To the bit. FOMAML(j): the gradient at what j steps of adaptation make of w."""
    problem = Halves()
    algorithm = PersonalisedFedAvg(switch=0, steps=steps, lr=0.5, batch_size=None)
    state = algorithm.start(problem)
    batch = problem.client(0)

    def adapted(j):
        w = state.weights.clone()
        for _ in range(j):
            w = w - 0.5 * point(problem, w, batch)
        return w

    fedsgd = point(problem, state.weights, batch)
    fomaml = [point(problem, adapted(j), batch) for j in range(1, steps)]
    found = vector(state, train(algorithm, problem, state)) / -0.5
    assert found.equal(fedsgd + sum(fomaml))
    assert all(each.any() for each in [fedsgd, *fomaml])


def test_each_of_the_k_steps_is_on_a_mini_batch_of_its_own_over_several_epochs():
    """12 examples, batches of 5: 5, 5, 2, and on from a new order."""
    problem = Local()
    algorithm = PersonalisedFedAvg(switch=0, steps=5, lr=0.3, batch_size=5)
    state = algorithm.start(problem)
    module, data = problem.model(), problem.client(0)
    for x, y in list(batches(data, 5, 2, derive_rng(7, "batches")))[:5]:
        layers = list(module.parameters())
        found = torch.autograd.grad(problem.loss(module(x), y), layers)
        with torch.no_grad():
            for layer, each in zip(layers, found, strict=True):
                layer.sub_(0.3 * each)
    expected = torch.cat([each.detach().reshape(-1) for each in module.parameters()])
    result = train(algorithm, problem, state)
    torch.testing.assert_close(state.weights + vector(state, result), expected)
    assert result.numbers == {"reply": "update", "phase": "reptile"}


def test_before_the_switch_clients_do_fedavgs_epochs():
    problem = Local()
    algorithm = PersonalisedFedAvg(switch=1, epochs=3, lr=0.3, batch_size=5)
    state = algorithm.start(problem)
    plain = FedAvg(lr=0.3, epochs=3, batch_size=5, momentum=0.0)
    expected = plain.train(Task(0, plain.task(plain.start(problem), 0)), client(problem)).payload
    result = train(algorithm, problem, state)
    assert vector(state, result).equal(vector(state, expected))
    assert result.numbers == {"reply": "update", "phase": "fedavg"}


@pytest.mark.parametrize("switch", [0, 1])
@pytest.mark.parametrize("problem", [Local(), Normed(), Dropping()])
def test_the_same_seed_gives_the_same_bytes_and_leaves_torch_alone(problem, switch):
    algorithm = PersonalisedFedAvg(switch=switch, batch_size=2, steps=4, epochs=2)
    state, before = algorithm.start(problem), torch.get_rng_state()
    one, other = (vector(state, train(algorithm, problem, state, 1)) for _ in range(2))
    assert one.numpy().tobytes() == other.numpy().tobytes()
    assert not one.equal(vector(state, train(algorithm, problem, state, 1, seed=8)))
    assert torch.get_rng_state().equal(before)


def test_what_the_uplink_cannot_send_is_left_out_of_each_of_the_k_steps():
    problem, algorithm = Local(), PersonalisedFedAvg(switch=0, batch_size=5)
    state = algorithm.start(problem)
    at = dataclasses.replace(client(problem), project=lambda tensors: tensors["2.bias"].zero_())
    result = algorithm.train(Task(0, algorithm.task(state, 0)), at).payload
    assert not result.weights["2.bias"].any()
    assert result.weights["0.weight"].all()


# ---- evaluation


def evaluated(algorithm, problem, index=0, seed=3, state=None):
    state = algorithm.start(problem) if state is None else state
    task = Task(state.version, algorithm.evaluation_task(state, index))
    return algorithm.evaluate_client(task, client(problem, index, seed))


@pytest.mark.parametrize("switch", [0, FOREVER])
def test_clients_fine_tune_with_the_optimizer_and_the_rate_of_training(switch):
    problem = Local()
    algorithm = PersonalisedFedAvg(switch=switch, lr=0.4, batch_size=5, personal_epochs=3)
    metrics = evaluated(algorithm, problem)
    plain = FedAvg(lr=0.4, epochs=3, batch_size=5, momentum=0.0)
    start = plain.start(problem)
    result = plain.train(Task(0, plain.task(start, 0), "model"), client(problem, 0, 3)).payload
    module, test = problem.model(), problem.client_test(0)
    before = problem.loss(module(test.x), test.y).item()
    module.load_state_dict(result.weights)
    assert metrics["loss_before"] == pytest.approx(before)
    assert metrics["loss"] == pytest.approx(problem.loss(module(test.x), test.y).item())
    assert set(metrics) == {"accuracy", "loss", "accuracy_before", "loss_before"}
    assert algorithm.evaluated_by == "clients"


def test_fine_tuning_never_sees_test_examples():
    class Mislabelled(Local):
        def client_test(self, index):
            points = super().client_test(index)
            return Examples(points.x, 1 - points.y)

    algorithm = PersonalisedFedAvg(lr=0.4)
    right, wrong = evaluated(algorithm, Local()), evaluated(algorithm, Mislabelled())
    assert right["accuracy"] + wrong["accuracy"] == pytest.approx(1.0)


def test_evaluation_changes_nothing():
    problem, algorithm = Local(), PersonalisedFedAvg(lr=0.4, switch=0)
    state = algorithm.start(problem)
    saved = state.weights.clone()
    one = evaluated(algorithm, problem, state=state)
    assert state.weights.equal(saved)
    assert evaluated(algorithm, problem, state=state) == one


def test_a_client_that_never_trained_fine_tunes_from_the_final_state():
    problem, algorithm = Local(), PersonalisedFedAvg(lr=0.4)
    state = move(algorithm, algorithm.start(problem), 0.1)
    metrics = algorithm.personalise(state, 1, client(problem, 1, 3))
    assert metrics == evaluated(algorithm, problem, 1, 3, state)


def test_both_phases_learn():
    problem = Local(4)
    algorithm = PersonalisedFedAvg(
        switch=5, lr=0.2, epochs=2, batch_size=4, server_momentum=0.0, reptile_lr=0.05
    )
    state = algorithm.start(problem)
    losses = []
    rng = random.Random(1)  # noqa: S311 - a cohort, not a secret
    for _ in range(12):
        cohort = rng.sample(range(4), 2)
        gathered = algorithm.new_accumulator(state)
        for index in cohort:
            result = train(algorithm, problem, state, index)
            algorithm.accumulate(gathered, state, Result(index, 0, result, 1), 1.0)
        state = algorithm.commit(state, gathered, 2.0)
        losses.append(evaluated(algorithm, problem, state=state)["loss_before"])
    assert losses[4] < 0.6 * losses[0]
    assert losses[-1] < 0.6 * losses[4]


@pytest.mark.parametrize("key", ["momentum", "weight_decay"])
def test_the_clients_sgd_is_plain(key):
    with pytest.raises(ValidationError, match="less than or equal to 0"):
        TypeAdapter(PersonalisedFedAvg).validate_python({key: 0.1})
