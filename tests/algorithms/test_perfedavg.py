"""Per-FedAvg against autograd, and against what public re-implementations get wrong."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import nn

from fedmq.algorithms.base import Result, Task
from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.model import FlatModel
from fedmq.algorithms.perfedavg import PerFedAvg, gradient, hessian_product
from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.problems.models import MODELS
from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.schedules import Buffered, Rounds, Stream
from tests.algorithms.tiny import Dropping, Normed, Tiny, client, payload, task

VARIANTS = ["fo", "hf", "fedavg"]


class Local(Tiny):
    """Clients have test points of their own, and a smooth hidden layer to bend the loss."""

    def module(self):
        return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2))

    def client(self, index):
        return self.points(100 + index, 30)

    def client_test(self, index):
        return self.points(500 + index, 20)


class LocalNormed(Normed):
    def client_test(self, index):
        return self.points(500 + index, 20)


class Watched(Local):
    """Keeps the points that go through the model, and whether a gradient was taken there."""

    def __init__(self, clients=2, seed=0):
        super().__init__(clients, seed)
        self.seen, self.points_trained = [], []

    def loss(self, outputs, y):
        loss = super().loss(outputs, y)
        if outputs.requires_grad:
            self.seen.append(len(y))
        return loss

    def module(self):
        module = super().module()
        module.register_forward_pre_hook(self.keep)
        return module

    def keep(self, module, inputs):
        if torch.is_grad_enabled():
            self.points_trained.append(inputs[0])


def draw(data, size, rng):
    """Return a batch as the client draws it."""
    chosen = torch.from_numpy(rng.choice(len(data), size, replace=False))
    return Examples(data.x[chosen], data.y[chosen])


def f(v, batch):
    """Return the loss of `Local`'s model with the parameters v, float32 [32]."""
    first, bias, second, last = v.split([12, 6, 12, 2])
    hidden = torch.tanh(batch.x @ first.view(6, 2).T + bias)
    return F.cross_entropy(hidden @ second.view(2, 6).T + last, batch.y)


def grad(v, batch):
    v = v.detach().requires_grad_()
    return torch.autograd.grad(f(v, batch), v)[0]


def product(v, u, batch):
    """Return Hess(v; D) u, by autograd."""
    v = v.detach().requires_grad_()
    (first,) = torch.autograd.grad(f(v, batch), v, create_graph=True)
    return torch.autograd.grad(first @ u, v)[0]


def by_autograd(algorithm, at, start):
    """Return Algorithm 1's tau local steps, with the exact Hessian for ``hf``."""
    v, rng = start.clone(), derive_rng(at.seed, "batches")
    for _ in range(algorithm.steps):
        one, two = (draw(at.data, algorithm.batch_size, rng) for _ in range(2))
        z = v - algorithm.inner_lr * grad(v, one)
        u = grad(z, two)
        if algorithm.variant == "hf":
            three = draw(at.data, algorithm.batch_size, rng)
            u = u - algorithm.inner_lr * product(v, u, three)
        v = v - algorithm.lr * u
    return v


def update(algorithm, problem, index=0, seed=7, reply="update", state=None):
    """Return what a client sends, as one vector, and its numbers."""
    state = algorithm.start(problem) if state is None else state
    result, local = algorithm.train(task(state, reply=reply), client(problem, index, seed))
    assert local is None
    return state.layout.flatten(result.weights), result.numbers


def evaluated(algorithm, problem, index=0, seed=3, state=None):
    state = algorithm.start(problem) if state is None else state
    examined = Task(0, algorithm.examined(state, index))
    return algorithm.evaluate_client(examined, client(problem, index, seed))


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
    assert numbers == {"n": 5 * steps, "reply": "update"}


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

    at = dataclasses.replace(client(problem), restrict=body_only)
    result, _ = algorithm.train(task(state), at)
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

    monkeypatch.setattr("fedmq.algorithms.perfedavg.gradient", keep)
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


# ---- errors of public re-implementations


def test_the_adapted_weights_are_used_unlike_fedreps_local_update_maml():
    """There both losses are back-propagated at w; here the outer one is at z."""
    problem, data = Local(), client(Local()).data
    algorithm = PerFedAvg(variant="fo", steps=1, lr=1.0, inner_lr=2.0, batch_size=None)
    w = algorithm.start(problem).weights
    at_w = grad(w, data)
    found, _ = update(algorithm, problem)
    torch.testing.assert_close(found, -grad(w - 2.0 * at_w, data))
    assert (found + at_w).norm() > 0.1 * at_w.norm()


def test_inner_gradients_keep_their_shape_and_are_not_summed_over_dim_0_unlike_fedreps():
    """One step on the whole set, layer by layer."""
    problem = Local()
    algorithm = PerFedAvg(variant="fo", steps=1, lr=1.0, inner_lr=0.5, batch_size=None)
    module, data = problem.model(), client(problem).data
    names, layers = zip(*module.named_parameters(), strict=True)
    inner = torch.autograd.grad(problem.loss(module(data.x), data.y), layers)
    with torch.no_grad():
        for layer, each in zip(layers, inner, strict=True):
            assert each.shape == layer.shape
            layer.sub_(0.5 * each)
    outer = torch.autograd.grad(problem.loss(module(data.x), data.y), layers)
    result, _ = algorithm.train(task(algorithm.start(problem)), client(problem))
    for name, each in zip(names, outer, strict=True):
        torch.testing.assert_close(result.weights[name], -each)


def test_the_inner_rate_is_the_one_that_is_set_not_a_thousandth_of_lr_as_fedreps():
    problem = Local()
    found = [update(PerFedAvg(inner_lr=rate, lr=0.1), problem)[0] for rate in (1e-4, 0.1, 1.0)]
    assert not found[0].equal(found[1])
    assert (found[2] - found[0]).norm() > 5 * (found[1] - found[0]).norm()


def test_adaptation_is_on_training_examples_never_on_test_ones_unlike_fedbabus():
    problem = Watched()
    evaluated(PerFedAvg(), problem, 1)
    (only,) = problem.points_trained
    assert only.equal(problem.client(1).x)
    assert not torch.isin(only, problem.client_test(1).x).any()


def test_test_labels_do_not_change_the_adapted_model_unlike_fedbabus():
    class Mislabelled(Local):
        def client_test(self, index):
            points = super().client_test(index)
            return Examples(points.x, 1 - points.y)

    right, wrong = evaluated(PerFedAvg(), Local()), evaluated(PerFedAvg(), Mislabelled())
    assert right["accuracy"] + wrong["accuracy"] == pytest.approx(1.0)


def test_each_client_adapts_to_its_own_examples_not_to_a_leftover_index_as_fedbabus():
    problem = Watched(4)
    for index in (2, 0, 3):
        problem.points_trained.clear()
        evaluated(PerFedAvg(), problem, index)
        assert problem.points_trained[0].equal(problem.client(index).x)


@pytest.mark.parametrize("key", ["momentum", "weight_decay"])
def test_no_momentum_buffer_is_shared_by_inner_and_outer_steps_as_fedbabus(key):
    with pytest.raises(ValidationError, match="less than or equal to 0"):
        TypeAdapter(PerFedAvg).validate_python({key: 0.9})


def test_every_step_is_a_meta_step_not_one_in_some_as_behind_fedbabus_missing_modulo():
    problem = Watched()
    update(PerFedAvg(variant="fo", steps=5, batch_size=4), problem)
    assert len(problem.seen) == 10


def test_there_is_no_softmax_before_the_cross_entropy_and_no_elu_on_the_logits_unlike_flowers():
    model = MODELS["mlp-elu"]((1, 28, 28), 10)
    kinds = [type(each) for each in model]
    dense = [nn.Linear, nn.ELU] * 2 + [nn.Linear]
    assert kinds == [nn.Flatten, *dense]
    assert sum(each.numel() for each in model.parameters()) == 68_270
    with torch.no_grad():
        logits = model(10 * torch.randn(50, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    assert logits.min() < -1
    assert logits.shape == (50, 10)


def test_hf_is_there_and_is_not_fo_unlike_flowers_pflliband_pfedmes():
    problem = Local()
    options = {"lr": 0.5, "inner_lr": 0.7, "batch_size": 5}
    found = [update(PerFedAvg(variant=each, **options), problem)[0] for each in VARIANTS]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (found[one] - found[other]).norm() > 0.01 * found[one].norm()


@pytest.mark.parametrize("key", ["lr", "inner_lr"])
def test_a_rate_of_zero_is_refused_and_does_not_fall_back_to_another_as_pfedmes(key):
    with pytest.raises(ValidationError, match="greater than 0"):
        TypeAdapter(PerFedAvg).validate_python({key: 0.0})


# ---- at the server


def commit(algorithm, schedule, state, results):
    gathered, total = algorithm.gather(state), 0.0
    for index, (result, staleness) in enumerate(results):
        weight = schedule.weight(result.numbers["n"], staleness)
        gathered = algorithm.absorb(gathered, state, Result(index, staleness, result), weight)
        total += weight
    return algorithm.commit(state, gathered, schedule.divisor(total, len(results)))


def test_the_server_takes_the_plain_mean_however_many_examples_a_client_has():
    problem, algorithm = Tiny(3), PerFedAvg(steps=2, batch_size=2, lr=0.1)
    state = algorithm.start(problem)
    results = [algorithm.train(task(state), client(problem, k))[0] for k in range(3)]
    assert [len(problem.client(k)) for k in range(3)] == [2, 6, 10]
    assert [each.numbers["n"] for each in results] == [4, 4, 4]
    mean = torch.stack([state.layout.flatten(each.weights) for each in results]).mean(dim=0)
    new = commit(algorithm, Rounds(), state, [(each, 0) for each in results])
    torch.testing.assert_close(new.weights, state.weights + mean)


@pytest.mark.parametrize(("schedule", "move"), [(Buffered(), 1 / 2), (Stream(mixing=0.5), 1 / 4)])
def test_late_results_are_discounted_as_the_schedule_says(schedule, move):
    """Three versions late: s = 1/2 both times; under stream of a model, mixed in by 0.5."""
    problem, algorithm = Local(), PerFedAvg(variant="hf", batch_size=5, lr=0.5)
    state = algorithm.start(problem)
    result, _ = algorithm.train(task(state, reply=schedule.reply), client(problem))
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
    good = Result(0, 0, payload(state, 0.5, n=1, reply="update"))
    gathered = algorithm.absorb(algorithm.gather(state), state, good, 2.0)
    before = gathered.total.clone()
    with pytest.raises(ResultError, match=message):
        algorithm.absorb(gathered, state, Result(0, 0, payload(state, value, n=1)), 2.0)
    assert gathered.total.equal(before)


def test_a_state_comes_back_to_the_bit():
    problem, algorithm = LocalNormed(), PerFedAvg(lr=0.3, batch_size=2)
    state = algorithm.start(problem)
    result, _ = algorithm.train(task(state), client(problem, 1))
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
    assert algorithm.evaluated == "clients"


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
    average = FedAvg(lr=0.2, epochs=3, batch_size=None)
    found, expected = (update(each, problem)[0] for each in (plain, average))
    np.testing.assert_allclose(found, expected, atol=1e-6)
