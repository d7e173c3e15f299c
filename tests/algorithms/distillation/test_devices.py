"""Federated distillation at the devices: what they step on, what they keep, and that they learn."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedmq.algorithms.base import Client, Payload, Task
from fedmq.algorithms.distillation.fd import Distillation
from fedmq.algorithms.errors import AlgorithmError
from tests.algorithms.distilling import (
    CLASSES,
    Blobs,
    Pictures,
    Scarce,
    absorbed,
    client,
    first_task,
    report,
    rounds,
)
from tests.algorithms.tiny import Normed

# ---- at the device


def by_hand(problem, data, soft, *, lr, gamma, steps):
    """Full-batch steps by torch.optim and autograd: the parameters, and the report."""
    model = problem.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    outputs = []
    for _ in range(steps):
        logits = model(data.x)
        outputs.append(logits.softmax(dim=1).detach())
        loss = F.cross_entropy(logits, data.y)
        for row, label in enumerate(data.y.tolist()):
            if soft[label] is not None:
                term = F.cross_entropy(logits[row : row + 1], soft[label].unsqueeze(0))
                loss = loss + gamma * term / len(data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    every, y = torch.cat(outputs), data.y.repeat(steps)
    of = F.one_hot(y, 3).float()
    means = of.T @ every / of.sum(dim=0).clamp(min=1).unsqueeze(1)
    return model, means, torch.bincount(y, minlength=3)


@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_a_device_steps_on_ce_plus_gamma_ce_to_the_others_means(gamma):
    """Against autograd; label 1 is absent, and its samples are trained on their labels alone."""
    problem = Blobs()
    data = problem.client(1)
    soft = torch.tensor([[0.8, 0.1, 0.1], [0.0, 0.0, 0.0], [0.2, 0.2, 0.6]])
    sent = Payload(logits={"logits": soft, "counts": torch.tensor([1, 0, 1])})
    algorithm = Distillation(lr=0.3, gamma=gamma, iterations=4, batch_size=None)
    trained = algorithm.train(Task(0, sent), client(problem, 1))
    result, local = trained.payload, trained.local_state
    model, means, counts = by_hand(
        problem, data, [soft[0], None, soft[2]], lr=0.3, gamma=gamma, steps=4
    )
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(local.weights[name], tensor)
    torch.testing.assert_close(result.logits["logits"], means)
    assert result.logits["counts"].equal(counts)
    assert result.numbers == {}
    assert trained.num_examples == len(data)


def test_soft_targets_are_probabilities_not_raw_logits_as_in_pfllib():
    algorithm, problem = Distillation(lr=0.5, iterations=3), Blobs()
    result = algorithm.train(first_task(algorithm, problem, 1), client(problem, 1)).payload
    torch.testing.assert_close(result.logits["logits"].sum(dim=1), torch.ones(3))
    assert (result.logits["logits"] >= 0).all()


def test_a_label_that_a_device_lacks_counts_0_and_has_no_row():
    algorithm, problem = Distillation(epochs=1), Blobs()
    result = algorithm.train(first_task(algorithm, problem, 0), client(problem)).payload
    assert result.logits["counts"].tolist() == [5, 4, 0]
    assert result.logits["logits"][2].tolist() == [0.0] * 3


@pytest.mark.parametrize(("iterations", "epochs", "seen"), [(7, 1, 28), (1, 9, 4), (None, 3, 36)])
def test_a_round_is_so_many_iterations_or_epochs(iterations, epochs, seen):
    problem = Blobs()
    algorithm = Distillation(iterations=iterations, epochs=epochs, batch_size=4)
    state = algorithm.start(problem)
    at = dataclasses.replace(client(problem, 1), data=problem.points(1, 12))
    result = algorithm.train(Task(0, algorithm.task(state, 1)), at).payload
    assert result.logits["counts"].sum() == seen


def test_a_device_goes_on_from_its_own_model_also_its_running_statistics():
    class NormedBlobs(Blobs):
        def module(self):
            return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))

    algorithm, problem = Distillation(iterations=2), NormedBlobs()
    task = first_task(algorithm, problem, 1)
    first = algorithm.train(task, client(problem, 1)).local_state
    second = algorithm.train(task, client(problem, 1, first, seed=8)).local_state
    assert first.exact["1.num_batches_tracked"].item() == 2
    assert second.exact["1.num_batches_tracked"].item() == 4
    assert not second.weights["0.weight"].equal(first.weights["0.weight"])


def test_with_gamma_0_what_others_say_changes_nothing():
    algorithm, problem = Distillation(gamma=0.0, iterations=3), Blobs()
    state = algorithm.start(problem)
    taught = absorbed(algorithm, state, {0: report(torch.eye(3)[[1, 2, 0]], [1, 1, 1])})
    one, other = (
        algorithm.train(Task(0, algorithm.task(each, 1)), client(problem, 1)).local_state
        for each in (state, taught)
    )
    assert all(one.weights[name].equal(other.weights[name]) for name in one.weights)


def test_the_same_seed_makes_the_same_bytes_and_leaves_torchs_own_chance_alone():
    algorithm, problem = Distillation(iterations=3, batch_size=2), Pictures()
    task = first_task(algorithm, problem, 1)
    before = torch.random.get_rng_state()
    one, two = (algorithm.train(task, client(problem, 1)) for _ in range(2))
    other = algorithm.train(task, client(problem, 1, seed=8)).payload
    assert torch.random.get_rng_state().equal(before)
    assert one.payload.logits["logits"].equal(two.payload.logits["logits"])
    kept, again = one.local_state.weights, two.local_state.weights
    assert all(kept[name].equal(again[name]) for name in kept)
    assert not one.payload.logits["logits"].equal(other.logits["logits"])


# ---- devices that differ


def test_two_architectures_teach_each_other_in_one_run():
    problem = Pictures(4)
    algorithm = Distillation(models=("mlp", "fd-cnn"), iterations=20, lr=0.05)
    state, locals_ = rounds(algorithm, problem, 3)
    sizes = [sum(each.numel() for each in local.weights.values()) for local in locals_]
    assert sizes[0] == sizes[2] != sizes[1] == sizes[3]
    assert state.counts.gt(0).all(dim=1).tolist() == [False, True, True, True]
    scores = [
        algorithm.evaluate_client(Task(3, Payload()), client(problem, k, locals_[k]))["accuracy"]
        for k in range(4)
    ]
    assert min(scores) > 0.55  # one of them has never seen the third label
    assert min(scores[1:]) > 0.75


def test_first_parameters_follow_from_the_seed_and_the_device():
    problem = Pictures(3)
    algorithm = Distillation(models=("mlp",), seed=3)
    one, two, other = (algorithm.own_model(client(problem, k)).weights for k in (0, 0, 2))
    assert one.equal(two)
    assert not one.equal(other)
    assert not one.equal(Distillation(models=("mlp",), seed=4).own_model(client(problem)).weights)


def test_an_unknown_model_is_refused():
    with pytest.raises(AlgorithmError, match=r"models: unknown model 'fd-cn'"):
        Distillation(models=("fd-cn",))


# ---- evaluation


def test_a_device_is_evaluated_with_what_it_keeps_on_the_whole_test_set():
    algorithm, problem = Distillation(lr=0.3, iterations=30), Blobs()
    assert algorithm.evaluated_by == "clients"
    state, locals_ = rounds(algorithm, problem, 2)
    task = Task(2, algorithm.evaluation_task(state, 1))
    assert task.payload == Payload()
    model = problem.model()
    model.load_state_dict(dict(locals_[1].weights))
    test = problem.test()
    expected = (model(test.x).argmax(dim=1) == test.y).float().mean().item()
    assert algorithm.evaluate_client(task, client(problem, 1, locals_[1]))["accuracy"] == expected


def test_a_device_that_never_trained_is_evaluated_as_it_begins():
    algorithm, problem = Distillation(), Blobs()
    test = problem.test()
    expected = problem.metrics(problem.model()(test.x), test.y)
    found = algorithm.evaluate_client(Task(0, Payload()), client(problem))
    assert found == pytest.approx(expected)


def test_a_new_device_learns_a_round_from_all_devices():
    algorithm, problem = Distillation(lr=0.3, iterations=30), Blobs(2)
    state, _ = rounds(algorithm, problem, 2)
    new = Client(5, problem, problem.client(1), None, 3)
    assert algorithm.task(state, 5).logits["counts"].tolist() == [2, 2, 1]
    assert algorithm.personalise(state, 2, new)["accuracy"] > 0.8


def test_a_problem_must_say_its_classes():
    with pytest.raises(AlgorithmError, match="defines classes"):
        Distillation().start(Normed())


# ---- learning


@pytest.mark.slow
def test_devices_that_distill_learn_more_than_devices_alone():
    """Four devices with 300 images of mnist-mini, of which three labels keep 5."""
    problem = Scarce()
    scores = []
    for gamma in (0.0, 0.5):
        algorithm = Distillation(gamma=gamma, lr=0.05, iterations=40, batch_size=32)
        _, locals_ = rounds(algorithm, problem, 8)
        each = [
            algorithm.evaluate_client(Task(8, Payload()), client(problem, k, locals_[k]))
            for k in range(4)
        ]
        scores.append({name: np.mean([one[name] for one in each]) for name in ("accuracy", "loss")})
    alone, together = scores
    assert together["accuracy"] > alone["accuracy"] + 0.004
    assert together["loss"] < 0.9 * alone["loss"]
