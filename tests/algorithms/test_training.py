"""The client half: local SGD against torch's own, and the papers' equalities."""

import copy
from itertools import chain, pairwise

import pytest
import torch

from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.fedprox import FedProx
from fedmq.algorithms.fedsgd import FedSGD
from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.toolkit.sgd import batches, spans
from tests.algorithms.tiny import (
    Dropping,
    HalfFrozen,
    Normed,
    Plain,
    Tiny,
    change,
    client,
    one_round,
    task,
)


def vector(result, state):
    """Return a result's weights end to end."""
    return change(state.layout, result)


def trained_by_torch(problem, at, algorithm, mu=0.0):
    """Return what torch.optim.SGD makes of the same batches, as one vector of parameters."""
    module = problem.model().train()
    start = [each.detach().clone() for each in module.parameters()]
    optimizer = torch.optim.SGD(
        [each for each in module.parameters() if each.requires_grad],
        lr=algorithm.lr,
        momentum=algorithm.momentum,
        weight_decay=algorithm.weight_decay,
    )
    order = derive_rng(at.seed, "batches")
    for x, y in batches(at.data, algorithm.batch_size, algorithm.epochs, order):
        optimizer.zero_grad()
        loss = problem.loss(module(x), y)
        for parameter, anchor in zip(module.parameters(), start, strict=True):
            loss = loss + mu / 2 * (parameter - anchor).pow(2).sum()
        loss.backward()
        optimizer.step()
    return torch.cat([each.detach().reshape(-1) for each in module.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [None, 2], ids=["full batch", "batches of 2"])
@pytest.mark.parametrize(
    ("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.1), (0.9, 0.1)]
)
def test_local_sgd_is_torch_optim_sgd_step_by_step(epochs, batch_size, momentum, weight_decay):
    problem = Tiny()
    algorithm = FedAvg(0.1, epochs, batch_size, momentum, weight_decay)
    state, at = algorithm.start(problem), client(problem, 1)
    result = algorithm.train(task(state, reply="model"), at).payload
    expected = trained_by_torch(problem, at, algorithm)
    torch.testing.assert_close(vector(result, state), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(expected, state.weights)


def test_the_proximal_term_is_that_of_the_papers_objective():
    """F_k(w) + (mu/2) ||w - w_t||^2, differentiated by torch."""
    problem = Tiny()
    algorithm = FedProx(lr=0.1, epochs=5, batch_size=None, momentum=0.5, mu=2.0)
    state, at = algorithm.start(problem), client(problem, 1)
    result = algorithm.train(task(state, reply="model"), at).payload
    expected = trained_by_torch(problem, at, algorithm, mu=2.0)
    torch.testing.assert_close(vector(result, state), expected, rtol=1e-5, atol=1e-6)


def test_an_update_is_the_model_less_what_it_started_from():
    problem, algorithm = Tiny(), FedAvg(epochs=2)
    state = algorithm.start(problem)
    update = algorithm.train(task(state), client(problem)).payload
    model = algorithm.train(task(state, reply="model"), client(problem)).payload
    assert torch.equal(vector(update, state), vector(model, state) - state.weights)
    assert update.numbers == {"reply": "update"}
    assert model.numbers == {"reply": "model"}


def test_fedavg_with_one_epoch_of_one_batch_is_fedsgd():
    """E = 1, B = infinity: section 2 of the paper."""
    problem = Tiny()
    avg, sgd = FedAvg(lr=0.3, epochs=1, batch_size=None), FedSGD(lr=0.3)
    one, other = avg.start(problem), sgd.start(problem)
    for _ in range(3):
        one, other = one_round(avg, problem, one), one_round(sgd, problem, other)
        torch.testing.assert_close(one.weights, other.weights, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(one.weights, avg.start(problem).weights, atol=1e-3)


def test_fedsgd_sums_the_same_gradient_in_pieces(monkeypatch):
    problem = Tiny()
    state, at = FedSGD().start(problem), client(problem, 1)
    whole = FedSGD().train(task(state), at).payload
    monkeypatch.setattr("fedmq.algorithms.fedsgd._GRADIENT_BATCH", 2)
    pieces = FedSGD().train(task(state), at).payload
    torch.testing.assert_close(vector(whole, state), vector(pieces, state))


def test_fedprox_without_mu_is_fedavg_bit_for_bit():
    problem, options = Tiny(), {"epochs": 3, "batch_size": 2, "momentum": 0.5, "weight_decay": 0.1}
    one = other = FedAvg().start(problem)
    for _ in range(2):
        one = one_round(FedAvg(**options), problem, one)
        other = one_round(FedProx(mu=0.0, **options), problem, other)
    assert torch.equal(one.weights, other.weights)


def test_fedprox_with_a_large_mu_stays_nearer_to_where_it_started():
    problem = Tiny()
    state = FedAvg().start(problem)
    lengths = []
    for mu in (0.0, 1.0, 9.0):
        result = (
            FedProx(lr=0.1, epochs=20, batch_size=None, mu=mu)
            .train(task(state), client(problem, 1))
            .payload
        )
        lengths.append(vector(result, state).norm().item())
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[2] < lengths[0] / 3


def test_partial_work_is_from_one_to_all_epochs():
    problem = Tiny()
    drawn = [FedProx(epochs=4, partial=1.0).local_epochs(client(problem, 0, s)) for s in range(200)]
    assert set(drawn) == {1, 2, 3, 4}
    assert all(30 <= drawn.count(epochs) <= 70 for epochs in set(drawn))
    again = [FedProx(epochs=4, partial=1.0).local_epochs(client(problem, 0, s)) for s in range(200)]
    assert drawn == again


@pytest.mark.parametrize(("partial", "low", "high"), [(0.0, 0, 0), (0.5, 70, 130), (1.0, 200, 200)])
def test_partial_is_the_share_of_slow_clients(partial, low, high):
    """Of 1000 epochs almost nobody slow draws all."""
    algorithm, problem = FedProx(epochs=1000, partial=partial), Tiny()
    drawn = [algorithm.local_epochs(client(problem, 0, seed)) for seed in range(200)]
    assert low <= sum(epochs < 1000 for epochs in drawn) <= high


def test_fewer_epochs_are_fewer_steps():
    """Partial work is the first of the epochs that would have been done."""
    problem = Tiny()
    state = FedAvg().start(problem)
    slow = FedProx(epochs=50, partial=1.0, mu=0.0)
    epochs = slow.local_epochs(client(problem))
    assert 1 <= epochs < 50
    one = slow.train(task(state), client(problem)).payload
    other = FedAvg(epochs=epochs).train(task(state), client(problem)).payload
    assert torch.equal(vector(one, state), vector(other, state))


@pytest.mark.parametrize("algorithm", [FedAvg(epochs=2), FedSGD()], ids=["fedavg", "fedsgd"])
def test_training_follows_from_the_seed_and_touches_nobody_elses(algorithm):
    problem = Dropping()
    state = algorithm.start(problem)

    def updates(seed):
        result = algorithm.train(task(state), client(problem, 1, seed)).payload
        return vector(result, state).clone()

    before = torch.random.get_rng_state()
    first = updates(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert not torch.equal(updates(2), first)
    assert torch.equal(updates(1), first)


@pytest.mark.parametrize("algorithm", [FedAvg(epochs=2), FedSGD()], ids=["fedavg", "fedsgd"])
def test_training_leaves_the_task_as_it_was(algorithm):
    problem = Normed()
    state = algorithm.start(problem)
    before = copy.deepcopy(state)
    algorithm.train(task(state), client(problem, 1))
    assert torch.equal(state.weights, before.weights)
    assert torch.equal(state.counters, before.counters)


ONE_STEP = FedAvg(epochs=1, batch_size=None)


@pytest.mark.parametrize("algorithm", [ONE_STEP, FedSGD()], ids=["fedavg", "fedsgd"])
def test_running_statistics_are_averaged_by_examples_and_the_counter_is_the_largest(algorithm):
    """Clients with 2 and 6 examples; momentum 0.1 of BatchNorm."""
    problem = Normed()
    state = algorithm.start(problem)
    new = algorithm.tensors(one_round(algorithm, problem, state))
    mean, var = torch.zeros(3), torch.zeros(3)
    for index, n in ((0, 2), (1, 6)):
        module = problem.model()
        module.train()(problem.client(index).x)
        mean += n / 8 * module[1].running_mean
        var += n / 8 * module[1].running_var
    torch.testing.assert_close(new["1.running_mean"], mean)
    torch.testing.assert_close(new["1.running_var"], var)
    assert new["1.num_batches_tracked"].item() == 1
    before = algorithm.tensors(state)["1.running_mean"]
    assert not torch.allclose(before, mean)


def test_clients_with_more_batches_count_further():
    """6 examples by 3 are 2 batches; the client with 2 has one."""
    problem, algorithm = Normed(), FedAvg(epochs=1, batch_size=3)
    new = one_round(algorithm, problem, algorithm.start(problem))
    assert new.counters.tolist() == [2]


def test_weight_decay_leaves_frozen_parameters_alone():
    """As torch.optim.SGD does, which skips what has no gradient."""
    problem = HalfFrozen()
    algorithm = FedAvg(lr=0.1, epochs=3, batch_size=None, weight_decay=0.5)
    state, at = algorithm.start(problem), client(problem, 1)
    result = algorithm.train(task(state, reply="model"), at).payload
    expected = trained_by_torch(problem, at, algorithm)
    assert list(result.weights) == ["weight"]
    assert not result.exact
    new = torch.cat([result.weights["weight"].flatten(), problem.model().bias])
    torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-6)


def test_a_problem_that_is_a_plain_dataclass_can_be_trained():
    problem = Plain()
    state = FedAvg().start(problem)
    assert FedAvg().train(task(state), client(problem)).num_examples == 2


def test_every_epoch_has_every_example_once_in_a_new_order():
    data = Examples(torch.arange(7.0).view(7, 1), torch.arange(7))
    found = [y.tolist() for _, y in batches(data, 3, 2, derive_rng(1, "batches"))]
    assert [len(each) for each in found] == [3, 4, 3, 4]
    first, second = list(chain(*found[:2])), list(chain(*found[2:]))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert [len(y) for _, y in batches(data, None, 2, derive_rng(1, "batches"))] == [7, 7]


@pytest.mark.parametrize(
    ("n", "size", "lengths"),
    [
        (7, 3, [3, 4]),
        (8, 3, [3, 3, 2]),
        (6, 3, [3, 3]),
        (3, 2, [3]),
        (4, 3, [4]),
        (1, 3, [1]),
        (3, 1, [1, 1, 1]),
        (2, 5, [2]),
    ],
)
def test_a_last_batch_of_one_joins_the_one_before(n, size, lengths):
    """Not where batches are of one, nor where there is one example."""
    found = spans(n, size)
    assert [end - start for start, end in found] == lengths
    assert (found[0][0], found[-1][1]) == (0, n)
    assert all(one[1] == other[0] for one, other in pairwise(found))
