"""Per-FedAvg against autograd, at the server, and in evaluation."""

import dataclasses

import numpy as np
import pytest
import torch

from fedmq.algorithms.base import Result
from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.personal.perfedavg import PerFedAvg, gradient, hessian_product
from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.schedules import Buffered, Rounds, Stream
from fedmq.algorithms.toolkit.flat_model import FlatModel
from tests.algorithms.meta import (
    VARIANTS,
    Local,
    Watched,
    by_autograd,
    draw,
    evaluated,
    f,
    grad,
    product,
    update,
)
from tests.algorithms.tiny import Dropping, Normed, Tiny, client, payload, task


class LocalNormed(Normed):
    def client_test(self, index):
        return self.points(500 + index, 20)


# ---- the local steps


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("variant", "close"), [("fo", 1e-6), ("hf", 2e-4)])
def test_local_steps_are_algorithm_1_with_three_independent_batches(variant, close, steps):
    problem = Local()
    algorithm = PerFedAvg(variant=variant, steps=steps, lr=0.5, inner_lr=0.7, batch_size=5)
    state = algorithm.start(problem)
    expected = by_autograd(algorithm, client(problem), state.weights) - state.weights
    found, numbers = update(algorithm, problem)
    torch.testing.assert_close(found, expected, rtol=0, atol=close)
    assert found.norm() > 100 * close
    assert numbers == {"reply": "update"}


def test_hf_on_all_local_data_is_the_gradient_of_the_meta_objective():
    """Grad of f(w - alpha grad f(w)), by autograd through the inner step."""
    problem, data = Local(), client(Local()).data
    algorithm = PerFedAvg(variant="hf", steps=1, lr=1.0, inner_lr=0.8, batch_size=None)
    w = algorithm.start(problem).weights
    at = w.clone().requires_grad_()
    (inner,) = torch.autograd.grad(f(at, data), at, create_graph=True)
    exact = -torch.autograd.grad(f(at - 0.8 * inner, data), at)[0]
    found, _ = update(algorithm, problem)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)
    first_order, _ = update(dataclasses.replace(algorithm, variant="fo"), problem)
    assert (first_order - exact).norm() > 30 * (found - exact).norm()


def test_fedavg_and_an_update_takes_plain_steps_on_one_batch_each():
    problem, at = Local(), client(Local())
    algorithm = PerFedAvg(variant="fedavg", steps=3, lr=0.5, batch_size=5)
    rng = derive_rng(at.seed, "batches")
    start = v = algorithm.start(problem).weights
    for _ in range(3):
        v = v - 0.5 * grad(v, draw(at.data, 5, rng))
    torch.testing.assert_close(update(algorithm, problem)[0], v - start)


@pytest.mark.parametrize(("variant", "gradients"), [("fedavg", 1), ("fo", 2), ("hf", 4)])
def test_each_step_takes_so_many_gradients(variant, gradients):
    problem = Watched()
    update(PerFedAvg(variant=variant, steps=3, batch_size=4), problem)
    assert problem.seen == [4] * 3 * gradients


def test_batches_are_drawn_anew_and_differ():
    """D, D' and D'' of two steps; both gradients of the product are on D''."""
    problem = Watched()
    update(PerFedAvg(variant="hf", steps=2, batch_size=4), problem)
    first, second, above, below, *rest = problem.points_trained
    assert above.equal(below)
    batches = [first, second, above, *rest[:3]]
    assert len({each.numpy().tobytes() for each in batches}) == 6
    own = {row.numpy().tobytes() for row in problem.client(0).x}
    for batch in batches:
        rows = {row.numpy().tobytes() for row in batch}
        assert len(rows) == 4
        assert rows <= own


def test_a_model_is_the_start_and_the_update():
    problem, algorithm = Local(), PerFedAvg(variant="hf", batch_size=5)
    state = algorithm.start(problem)
    whole, numbers = update(algorithm, problem, reply="model")
    torch.testing.assert_close(whole, state.weights + update(algorithm, problem)[0])
    assert numbers["reply"] == "model"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("problem", [Local(), Normed(), Dropping()])
def test_the_same_seed_gives_the_same_bytes_and_leaves_torch_alone(problem, variant):
    algorithm = PerFedAvg(variant=variant, batch_size=2, steps=3)
    before = torch.get_rng_state()
    one, other = (update(algorithm, problem, 1)[0] for _ in range(2))
    assert one.numpy().tobytes() == other.numpy().tobytes()
    assert not one.equal(update(algorithm, problem, 1, seed=8)[0])
    assert torch.get_rng_state().equal(before)


def test_what_the_uplink_cannot_send_is_left_out_of_every_step():
    problem, algorithm = Local(), PerFedAvg(variant="hf", batch_size=5, lr=0.5)
    state = algorithm.start(problem)

    def body_only(tensors):
        for name, each in tensors.items():
            if name.startswith("2."):
                each.zero_()

    at = dataclasses.replace(client(problem), project=body_only)
    result = algorithm.train(task(state), at).payload
    assert not result.weights["2.weight"].any()
    assert result.weights["0.weight"].all()


# ---- the product with the Hessian


@pytest.fixture
def net():
    """Return (model, v, u, batch, client) of a small net."""
    problem = Local()
    model, at = FlatModel(problem.model()), client(Local())
    u = gradient(model, problem.client(1), at)
    return model, model.trained.clone(), u, at.data, at


@pytest.mark.parametrize(("perturbation", "close"), [(1e-3, 1e-3), (1e-2, 1e-3), (1e-1, 1e-2)])
def test_the_product_is_autograds(net, perturbation, close):
    model, v, u, batch, at = net
    exact = product(v, u, batch)
    found = hessian_product(model, v, u, batch, at, perturbation)
    assert (found - exact).norm() < close * exact.norm()


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_the_difference_is_of_a_stated_size_not_delta_1e_3_on_an_unnormalised_vector(net, scale):
    """KarhouTam's: a long vector leaves the neighbourhood, a short one drowns in rounding."""
    model, v, u, batch, at = net
    exact = product(v, u * scale, batch)
    found = hessian_product(model, v, u * scale, batch, at, 1e-3)
    assert (found - exact).norm() < 2e-3 * exact.norm()


def test_the_two_points_lie_as_far_from_v_as_it_says(net, monkeypatch):
    model, v, u, batch, at = net
    points = []

    def keep(model, batch, client):
        points.append(model.trained.clone())
        return gradient(model, batch, client)

    monkeypatch.setattr("fedmq.algorithms.personal.perfedavg.gradient", keep)
    hessian_product(model, v, u, batch, at, 0.05)
    above, below = points
    torch.testing.assert_close((above - v).norm(), torch.tensor(0.05), rtol=1e-4, atol=0)
    torch.testing.assert_close(v - below, above - v, rtol=0, atol=1e-6)
    torch.testing.assert_close((above - v) / 0.05, u / u.norm(), rtol=0, atol=1e-4)


def test_the_product_with_nothing_is_nothing(net):
    model, v, u, batch, at = net
    assert not hessian_product(model, v, torch.zeros_like(u), batch, at, 1e-3).any()


def test_dropout_is_the_same_at_both_points():
    """Else the difference would be that of two sub-models, times 1 / delta."""
    problem = Dropping()
    model, at = FlatModel(problem.model().train()), client(Dropping(), 1)
    v, u = model.trained.clone(), gradient(model, at.data, at)
    lengths = [hessian_product(model, v, u, at.data, at, size).norm() for size in (1e-3, 1e-2) * 4]
    assert max(lengths) < 10 * u.norm()


# ---- at the server


def commit(algorithm, schedule, state, results):
    gathered, total = algorithm.new_accumulator(state), 0.0
    for index, (trained, staleness) in enumerate(results):
        weight = schedule.weight(trained.num_examples, staleness)
        result = Result(index, staleness, trained.payload, trained.num_examples)
        gathered = algorithm.accumulate(gathered, state, result, weight)
        total += weight
    return algorithm.commit(state, gathered, schedule.divisor(total, len(results)))


def test_the_server_takes_the_plain_mean_however_many_examples_a_client_has():
    problem, algorithm = Tiny(3), PerFedAvg(steps=2, batch_size=2, lr=0.1)
    state = algorithm.start(problem)
    results = [algorithm.train(task(state), client(problem, k)) for k in range(3)]
    assert [len(problem.client(k)) for k in range(3)] == [2, 6, 10]
    assert [each.num_examples for each in results] == [4, 4, 4]
    changes = [state.layout.flatten(each.payload.weights) for each in results]
    mean = torch.stack(changes).mean(dim=0)
    new = commit(algorithm, Rounds(), state, [(each, 0) for each in results])
    torch.testing.assert_close(new.weights, state.weights + mean)


@pytest.mark.parametrize(("schedule", "move"), [(Buffered(), 1 / 2), (Stream(mixing=0.5), 1 / 4)])
def test_late_results_are_discounted_as_the_schedule_says(schedule, move):
    """Three versions late: s = 1/2 both times; under stream of a model, mixed in by 0.5."""
    problem, algorithm = Local(), PerFedAvg(variant="hf", batch_size=5, lr=0.5)
    state = algorithm.start(problem)
    result = algorithm.train(task(state, reply=schedule.reply), client(problem))
    expected = state.weights + move * update(algorithm, problem)[0]
    new = commit(algorithm, schedule, state, [(result, 3)])
    torch.testing.assert_close(new.weights, expected)


HOSTILE = {
    "nan": (torch.nan, "NaN or infinite"),
    "infinite": (-torch.inf, "NaN or infinite"),
    "huge": (1e35, "as large as"),
}


@pytest.mark.parametrize("which", HOSTILE)
def test_a_result_that_cannot_be_used_leaves_the_sum_as_it_was(which):
    value, message = HOSTILE[which]
    algorithm = PerFedAvg()
    state = algorithm.start(Local())
    good = Result(0, 0, payload(state, 0.5, n=1, reply="update"), 1)
    gathered = algorithm.accumulate(algorithm.new_accumulator(state), state, good, 2.0)
    before = gathered.total.clone()
    with pytest.raises(ResultError, match=message):
        algorithm.accumulate(gathered, state, Result(0, 0, payload(state, value, n=1), 1), 2.0)
    assert gathered.total.equal(before)


def test_a_state_comes_back_to_the_bit():
    problem, algorithm = LocalNormed(), PerFedAvg(lr=0.3, batch_size=2)
    state = algorithm.start(problem)
    result = algorithm.train(task(state), client(problem, 1))
    state = commit(algorithm, Rounds(), state, [(result, 0)])
    again = algorithm.load(problem, algorithm.save(state))
    assert again.weights.equal(state.weights)
    assert again.counters.equal(state.counters)
    assert state.counters.tolist() == [20]


# ---- evaluation


def test_evaluation_takes_one_alpha_step_on_the_whole_local_training_set():
    problem = Local()
    algorithm = PerFedAvg(inner_lr=0.9)
    w = algorithm.start(problem).weights
    adapted = w - 0.9 * grad(w, problem.client(1))
    metrics = evaluated(algorithm, problem, 1)
    test = problem.client_test(1)
    assert metrics["loss_before"] == pytest.approx(f(w, test).item())
    assert metrics["loss"] == pytest.approx(f(adapted, test).item())
    assert metrics["loss"] < metrics["loss_before"]
    assert set(metrics) == {"accuracy", "loss", "accuracy_before", "loss_before"}
    assert algorithm.evaluated_by == "clients"


def test_evaluation_on_some_examples_draws_them_from_the_clients_seed():
    problem, algorithm = Watched(), PerFedAvg(adapt_examples=7, adapt_steps=2)
    one = evaluated(algorithm, problem, seed=3)
    assert problem.seen == [7, 7]
    assert evaluated(algorithm, problem, seed=3) == one
    assert evaluated(algorithm, problem, seed=4) != one


def test_all_variants_are_evaluated_alike():
    """FedAvg + update is compared at the same number of gradient steps and examples."""
    problem = Local()
    found = [evaluated(PerFedAvg(variant=each), problem) for each in VARIANTS]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("problem", [Local(), LocalNormed()])
def test_evaluation_changes_nothing(problem):
    algorithm = PerFedAvg(inner_lr=0.9, batch_size=2)
    state = algorithm.start(problem)
    saved, before = state.weights.clone(), torch.get_rng_state()
    trained, _ = update(algorithm, problem)
    evaluated(algorithm, problem, state=state)
    assert state.weights.equal(saved)
    assert torch.get_rng_state().equal(before)
    assert update(algorithm, problem)[0].equal(trained)


def test_a_client_that_never_trained_adapts_from_the_final_state():
    problem = Local()
    algorithm = PerFedAvg(inner_lr=0.9)
    state = algorithm.start(problem)
    at = dataclasses.replace(client(problem, 1), index=7)
    metrics = algorithm.personalise(state, 3, at)
    adapted = state.weights - 0.9 * grad(state.weights, at.data)
    assert metrics["loss"] == pytest.approx(f(adapted, problem.client_test(7)).item())


def test_keeping_to_plain_steps_over_an_epoch_is_fedavg():
    """One batch of everything a step: the order of examples is all that differs."""
    problem = Local()
    plain = PerFedAvg(variant="fedavg", steps=3, lr=0.2, batch_size=None)
    average = FedAvg(lr=0.2, epochs=3, batch_size=None, momentum=0.0)
    found, expected = (update(each, problem)[0] for each in (plain, average))
    np.testing.assert_allclose(found, expected, atol=1e-6)
