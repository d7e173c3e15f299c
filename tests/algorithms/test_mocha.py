"""MOCHA: the dual, what server and clients hold of it, and what is done with bad results."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

from fedmq.algorithms import mtl
from fedmq.algorithms.base import Client, Payload, Result, Task
from fedmq.algorithms.errors import AlgorithmError, ProblemError, ResultError
from fedmq.algorithms.mocha import Mocha
from fedmq.algorithms.rng import derive_rng
from tests.algorithms.multitask import PROBLEMS, Federation, Heights, Points
from tests.algorithms.tiny import Tiny

LOSSES = ["hinge", "squared"]
SIGMA = np.array(
    [
        [0.30, 0.10, 0.20, -0.05, 0.01],
        [0.10, 0.25, 0.00, 0.15, 0.02],
        [0.20, 0.00, 0.20, -0.02, 0.00],
        [-0.05, 0.15, -0.02, 0.20, 0.03],
        [0.01, 0.02, 0.00, 0.03, 0.05],
    ]
)
"""Five tasks that help, and hinder, each other; its eigenvalues are above 0."""


def federation(loss="hinge", *, related=True, **options):
    """Return five tasks; at SIGMA for ever, unless they are not to be related."""
    algorithm = Mocha(loss=loss, **{"lam": 0.05, "inner": 10**6, **options})
    problem = PROBLEMS[loss]()
    start = algorithm.start(problem)
    state = algorithm._state(start.b, start.duals, SIGMA, 0) if related else None
    return Federation(algorithm, problem, state)


def combined(each):
    """Return B from all the alpha that the server has counted, [m, d]."""
    return np.array([x.T @ a / len(a) for (x, _), a in zip(each.data, each.alphas, strict=True)])


# ---- one task's ascent


@pytest.mark.parametrize("safety", ["rows", "eigenvalue"])
def test_a_clients_steps_are_those_of_the_paper_with_its_dw_and_db(safety):
    """The reference: u = y x^T (w + sigma' dw), dw += Sigma_tt da x / (lambda n)."""
    each = federation(epochs_low=2.5, epochs_high=2.5, safety=safety)
    for _ in range(3):
        each.round()
    t, lam = 3, each.algorithm.lam
    state, (x, y), alpha = each.state, each.data[t], each.alphas[t].copy()
    n, own, safe = len(y), state.sigma[t, t], state.safe
    payload, found = each.work(t)
    rng = derive_rng(each.at(t).seed, "mocha")
    each.algorithm.budget(n, rng)
    dw, db = np.zeros(3), np.zeros(3)
    orders = [rng.permutation(n) for _ in range(3)]
    for i in np.concatenate(orders)[: round(2.5 * n)]:
        u = y[i] * x[i] @ (state.weights[t] + safe * dw)
        new = lam * n * (1 - u) / (own * safe * (x[i] @ x[i])) + alpha[i] * y[i]
        change = y[i] * np.clip(new, 0, 1) - alpha[i]
        alpha[i] += change
        dw += own * change * x[i] / (lam * n)
        db += change * x[i] / n
    np.testing.assert_allclose(found, alpha, atol=1e-12)
    np.testing.assert_allclose(payload.exact["b"].numpy(), state.b[t] + db, atol=1e-12)
    assert payload.numbers["n"] == n
    assert payload.numbers["steps"] == round(2.5 * n)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_is_the_best_for_its_coordinate(loss):
    """Against a fine grid of what it maximises."""
    rng, chosen = np.random.default_rng(1), mtl.LOSSES[loss]
    for _ in range(50):
        y = float(rng.choice([-1, 1])) if loss == "hinge" else rng.normal()
        alpha = y * rng.random()
        u, curvature = rng.normal(), rng.exponential()
        grid = y * np.linspace(0, 1, 20001) if loss == "hinge" else np.linspace(-9, 9, 90001)
        values = chosen.dual(grid, y) - u * (grid - alpha) - curvature * (grid - alpha) ** 2 / 2
        best = grid[values.argmax()]
        assert abs(chosen.step(alpha, y, u, curvature) - best) < 3e-4


@pytest.mark.parametrize("loss", LOSSES)
def test_an_example_of_zeros_does_no_harm(loss):
    chosen = mtl.LOSSES[loss]
    assert chosen.step(0.0, 1.0, 0.0, 0.0) == 1.0


@pytest.mark.parametrize("loss", LOSSES)
def test_the_conjugate_is_that_of_the_loss(loss):
    """-l*(-a) = min_u l(u) + a u."""
    chosen, u = mtl.LOSSES[loss], np.linspace(-30, 30, 600001)
    for y, a in ((1.0, 0.3), (-1.0, -0.9), (1.0, 0.0)):
        least = (chosen.value(u, np.float64(y)) + a * u).min()
        assert abs(least - chosen.dual(np.array([a]), np.array([y]))[0]) < 1e-6


# ---- the objective


@pytest.mark.parametrize("safety", ["rows", "eigenvalue"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_dual_objective_never_falls_when_30_percent_of_nodes_drop_each_round(loss, safety):
    """Of every alpha there is, not of what the server says; its own sum is the same."""
    each = federation(loss, epochs_low=0.1, epochs_high=1.0, drop=0.3, safety=safety)
    values, dropped = [each.dual], 0
    for _ in range(40):
        before = [alpha.copy() for alpha in each.alphas]
        each.round()
        dropped += sum(map(np.array_equal, before, each.alphas))
        values.append(each.dual)
        assert each.algorithm.dual(each.state) == pytest.approx(values[-1], abs=1e-12)
    assert dropped >= 40
    assert np.diff(values).min() >= -1e-13
    assert values[-1] > 0.1 + values[0]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gap_shrinks_to_nothing_and_is_what_the_clients_say_it_is(loss):
    each, gaps = federation(loss, epochs_low=1, epochs_high=1), []
    for _ in range(5):
        for _ in range(25):
            each.round()
        gaps.append(each.primal - each.dual)
        assert 5 * each.metrics()["gap"] == pytest.approx(gaps[-1], abs=1e-10)
    assert gaps[0] > 0
    assert gaps[-1] < min(3e-3, gaps[0])
    assert min(gaps) > -1e-12


def test_with_the_squared_loss_w_is_that_of_the_normal_equations():
    """(1/n_t) X_t^T (X_t w_t - y_t) + lambda sum_t' Omega_tt' w_t' = 0 for every task."""
    each = federation("squared", epochs_low=2, epochs_high=2)
    for _ in range(300):
        each.round()
    m, d, omega = 5, 3, np.linalg.inv(SIGMA)
    system = np.kron(each.algorithm.lam * omega, np.eye(d))
    right = np.zeros(m * d)
    for t, (x, y) in enumerate(each.data):
        here = slice(t * d, (t + 1) * d)
        system[here, here] += x.T @ x / len(y)
        right[here] = x.T @ y / len(y)
    expected = np.linalg.solve(system, right).reshape(m, d)
    np.testing.assert_allclose(each.state.weights, expected, atol=1e-6)


def test_with_the_hinge_loss_the_objective_is_that_of_a_direct_solver():
    """Projected gradient ascent over all alpha of all tasks at once."""
    each = federation(epochs_low=2, epochs_high=2)
    for _ in range(200):
        each.round()
    rows = np.concatenate([y[:, None] * x / len(y) for x, y in each.data])
    task = np.repeat(np.arange(5), [len(y) for _, y in each.data])
    weight = np.concatenate([np.full(len(y), 1 / len(y)) for _, y in each.data])
    kernel = SIGMA[task][:, task] * (rows @ rows.T) / each.algorithm.lam
    step, z = 1 / np.linalg.eigvalsh(kernel)[-1], np.zeros(len(task))
    for _ in range(20000):
        z = np.clip(z + step * (weight - kernel @ z), 0, 1)
    best = weight @ z - z @ kernel @ z / 2
    assert each.dual == pytest.approx(best, abs=1e-5)


def test_local_tasks_know_nothing_of_each_other():
    alone = federation(related=False, relation="local")
    other = federation(related=False, relation="local")
    alone.round()
    other.turn = 2
    other.round(who=[2, 3])
    assert np.array_equal(alone.state.sigma, np.eye(5) / 5)
    assert alone.state.safe == 1.0
    assert np.array_equal(alone.state.weights[2:4], other.state.weights[2:4])
    assert not other.state.weights[[0, 1, 4]].any()
    assert alone.state.weights.all()


def test_a_global_relation_is_one_w_that_fits_all_tasks():
    """(1/m) sum_t of the normal equations, and a ridge of lambda."""
    options = {"relation": "global", "lam": 0.5, "epochs_low": 2, "epochs_high": 2}
    each = federation("squared", related=False, **options)
    for _ in range(200):
        each.round()
    assert np.ptp(each.state.weights, axis=0).max() < 1e-12
    system = each.algorithm.lam * np.eye(3)
    system += np.mean([x.T @ x / len(y) for x, y in each.data], axis=0)
    right = np.mean([x.T @ y / len(y) for x, y in each.data], axis=0)
    np.testing.assert_allclose(each.state.weights[0], np.linalg.solve(system, right), atol=1e-6)


# ---- the relation of the tasks


def test_sigma_is_the_root_of_the_gram_matrix_with_trace_1():
    weights = np.random.default_rng(0).standard_normal((4, 6))
    sigma, gram = mtl.relate(weights, 1e-7), weights @ weights.T
    root = np.linalg.svd(weights, compute_uv=False).sum()
    np.testing.assert_allclose(sigma @ sigma, gram / root**2, atol=1e-14)
    assert np.trace(sigma) == pytest.approx(1)
    assert np.array_equal(sigma, sigma.T)


def test_the_eigenvalue_floor_keeps_sigma_invertible_with_more_tasks_than_features():
    weights = np.random.default_rng(0).standard_normal((9, 2))
    weights[3] = weights[4]
    values = np.linalg.eigvalsh(mtl.relate(weights, 1e-7))
    root = np.linalg.svd(weights, compute_uv=False).sum() + 7 * np.sqrt(1e-7)
    np.testing.assert_allclose(values[:7], np.sqrt(1e-7) / root, rtol=1e-5)
    np.testing.assert_allclose(mtl.relate(np.zeros((4, 3)), 1e-7), np.eye(4) / 4)


@pytest.mark.parametrize("safety", ["rows", "eigenvalue"])
def test_sigma_prime_bounds_what_all_steps_together_can_do(safety):
    """tr(dB Sigma dB^T) <= sigma' sum_t Sigma_tt |db_t|^2; 1 for tasks on their own."""
    assert mtl.SAFETY[safety](np.eye(4) / 4) == pytest.approx(1)
    assert mtl.SAFETY[safety](np.full((4, 4), 0.25)) == pytest.approx(4)
    rng = np.random.default_rng(0)
    for _ in range(20):
        sigma = mtl.relate(rng.standard_normal((6, 3)), 1e-7)
        bound = mtl.SAFETY[safety](sigma)
        least = np.linalg.eigvalsh(bound * np.diag(np.diag(sigma)) - sigma)[0]
        assert least >= -1e-16
        assert mtl.eigenvalue(sigma) <= mtl.rows(sigma)


def test_a_learned_relation_is_updated_every_inner_versions_from_w():
    each = federation(related=False, inner=3)
    for version in range(1, 8):
        before = each.state.sigma
        each.round()
        if version % 3:
            assert np.array_equal(each.state.sigma, before)
        else:
            w = before @ combined(each) / each.algorithm.lam
            np.testing.assert_allclose(each.state.sigma, mtl.relate(w, 1e-7), atol=1e-14)
    assert each.state.safe == mtl.rows(each.state.sigma) > 1


@pytest.mark.parametrize("loss", LOSSES)
def test_w_and_alpha_belong_together_after_sigma_has_changed(loss):
    """And between two changes the dual objective never falls."""
    each, values = federation(loss, related=False, inner=4, drop=0.3), []
    for _ in range(24):
        each.round()
        values.append(each.dual)
        expected = each.state.sigma @ combined(each) / each.algorithm.lam
        np.testing.assert_allclose(each.state.weights, expected, atol=1e-12)
    rises = [b - a for v, (a, b) in enumerate(itertools.pairwise(values), 2) if v % 4]
    assert min(rises) >= -1e-13


# ---- results that are late, lost or wrong


def test_a_lost_result_is_made_up_for_by_the_next():
    """All of b travels: had it been the change, W and alpha would never meet again."""
    each = federation()
    each.round()
    each.work(2)
    each.work(2)
    assert not np.allclose(each.locals[2].exact["alpha"].numpy(), each.alphas[2])
    each.round()
    np.testing.assert_allclose(each.state.b, combined(each), atol=1e-15)
    assert each.alphas[2].tolist() == each.locals[2].exact["alpha"].tolist()


@pytest.mark.parametrize("loss", LOSSES)
def test_late_results_never_lower_the_dual_objective_and_it_still_converges(loss):
    """Each result is of a version up to six before it is counted, one to three at a time."""
    each = federation(loss, epochs_low=1, epochs_high=1)
    rng, flying, refused, values = random.Random(3), {}, 0, [0.0]  # noqa: S311
    for _ in range(200):
        for k in set(range(5)) - set(flying):
            flying[k] = each.work(k)
        gathered = each.algorithm.gather(each.state)
        for k in rng.sample(sorted(flying), rng.randint(1, 3)):
            payload, alpha = flying.pop(k)
            try:
                each.algorithm.absorb(gathered, each.state, Result(k, 1, payload), 0.3)
                each.alphas[k] = alpha
            except ResultError:
                refused += 1
        each.state = each.algorithm.commit(each.state, gathered, 1.0)
        values.append(each.dual)
    np.testing.assert_allclose(each.state.b, combined(each), atol=1e-15)
    assert np.diff(values).min() >= -1e-13
    assert each.primal - each.dual < 0.01 * values[-1]
    assert refused < 100


def test_a_client_that_lost_its_alpha_is_not_counted_until_it_has_caught_up():
    each = federation(epochs_low=1, epochs_high=1)
    for _ in range(30):
        each.round()
    each.locals[1], counted = None, each.state.b[1].copy()
    for _ in range(50):
        payload, _ = each.work(1)
        gathered = {}
        try:
            each.algorithm.absorb(gathered, each.state, Result(1, 0, payload), 1.0)
            break
        except ResultError:
            assert gathered == {}
    np.testing.assert_allclose(gathered[1][0], counted, atol=0.1)


def bad():
    b = torch.zeros(3, dtype=torch.float64)
    numbers = {"n": 3, "dual": 0.5, "steps": 1}
    yield "no b", {}, numbers, "expected b as float64 [3], got none"
    yield "float32", {"b": b.float()}, numbers, "got torch.float32"
    yield "longer", {"b": torch.zeros(4).double()}, numbers, "got torch.float64 [4]"
    yield "another", {"b": b, "c": b}, numbers, "expected no tensor 'c'"
    for value in (torch.nan, torch.inf, 1e300):
        yield f"b of {value}", {"b": b + value}, numbers, "expected b to be finite"
    for value in (None, True, 1, "1", float("nan"), float("inf"), 1e200):
        yield f"dual {value}", {"b": b}, {**numbers, "dual": value}, "expected dual as a finite"
    yield "too good", {"b": b}, {**numbers, "dual": 1.5}, "from 0 to 1, got 1.5"
    yield "below 0", {"b": b}, {**numbers, "dual": -0.5}, "from 0 to 1, got -0.5"
    yield "n", {"b": b}, {**numbers, "n": 0}, "the number of examples"
    yield "far away", {"b": b + 1e6}, numbers, "this lowers it by"
    yield "no use", {"b": b}, {**numbers, "dual": 0.0}, "one of an older version may"


@pytest.mark.parametrize("which", [name for name, *_ in bad()])
def test_a_result_that_cannot_be_used_leaves_everything_as_it_was(which):
    each = federation()
    each.round()
    cases = {name: rest for name, *rest in bad()}
    exact, numbers, message = cases[which]
    gathered = {1: (np.ones(3), 0.5)}
    with pytest.raises(ResultError) as caught:
        each.algorithm.absorb(gathered, each.state, Result(0, 0, Payload({}, exact, numbers)), 1.0)
    assert message in str(caught.value)
    assert list(gathered) == [1]
    assert gathered[1][0].tolist() == [1, 1, 1]


def test_a_clients_second_result_replaces_its_first_and_takes_no_more_memory():
    each = federation()
    gathered = each.algorithm.gather(each.state)
    for _ in range(4):
        payload, alpha = each.work(2)
        each.algorithm.absorb(gathered, each.state, Result(2, 0, payload), 1.0)
    assert list(gathered) == [2]
    each.alphas[2] = alpha
    before = each.state.b.copy()
    new = each.algorithm.commit(each.state, gathered, 4.0)
    np.testing.assert_allclose(new.b, combined(each), atol=1e-15)
    assert np.array_equal(each.state.b, before)


def test_a_result_says_nothing_but_b_and_three_numbers():
    """d floats, as in the paper; labels, alpha and examples stay with the client."""
    each = federation()
    task = each.algorithm.task(each.state, 0)
    payload, _ = each.work(0)
    assert set(payload.exact) == {"b"}
    assert payload.exact["b"].shape == task.exact["v"].shape == (3,)
    assert set(payload.numbers) == {"n", "dual", "steps"}
    assert each.algorithm.result_bytes(each.state) == 24


# ---- budgets


def test_a_budget_is_uniform_between_its_bounds_and_dropped_nodes_do_nothing():
    algorithm = Mocha(epochs_low=0.1, epochs_high=1.0, drop=0.3)
    rng = np.random.default_rng(0)
    steps = np.array([algorithm.budget(1000, rng) for _ in range(4000)])
    assert abs((steps == 0).mean() - 0.3) < 0.03
    worked = steps[steps > 0]
    assert (worked.min(), worked.max()) == (100, 1000)
    assert abs(worked.mean() - 550) < 20


def test_cocoa_is_the_same_budget_for_all():
    algorithm, rng = Mocha(epochs_low=0.7, epochs_high=0.7), np.random.default_rng(0)
    assert {algorithm.budget(10, rng) for _ in range(50)} == {7}


def test_a_dropped_node_sends_what_it_sent_and_its_alpha_stays():
    each = federation()
    each.round()
    kept, counted = each.locals[1], each.state.b[1].copy()
    each.algorithm = dataclasses.replace(each.algorithm, drop=0.999999)
    payload, alpha = each.work(1)
    assert payload.numbers["steps"] == 0
    assert np.array_equal(payload.exact["b"].numpy(), counted)
    assert alpha.tolist() == kept.exact["alpha"].tolist()
    gathered = each.algorithm.absorb({}, each.state, Result(1, 0, payload), 1.0)
    new = each.algorithm.commit(each.state, gathered, 1.0)
    assert np.array_equal(new.weights, each.state.weights)


def test_the_bounds_must_be_in_order():
    with pytest.raises(AlgorithmError, match="epochs_low of at most epochs_high, got 2 and 1"):
        Mocha(epochs_low=2, epochs_high=1)


# ---- evaluation and new clients


def test_each_client_is_evaluated_with_its_own_w_on_its_own_test_data():
    each = federation(epochs_low=2, epochs_high=2)
    for _ in range(20):
        each.round()
    for k in (0, 4):
        found = each.algorithm.evaluate_client(
            Task(20, each.algorithm.examined(each.state, k)), each.at(k)
        )
        test = each.problem.client_test(k)
        u = test.x.double().numpy() @ each.state.weights[k]
        right = np.mean((u > 0) == test.y.numpy())
        assert found["accuracy"] == pytest.approx(right)
        y = 2 * test.y.numpy() - 1
        assert found["loss"] == pytest.approx(np.maximum(0, 1 - y * u).mean(), rel=1e-5)
    assert each.algorithm.evaluated == "clients"


def test_a_client_that_never_trained_can_be_evaluated():
    each = federation()
    assert each.metrics()["gap"] == pytest.approx(1.0)


def test_a_new_task_gets_a_w_near_the_mean_of_the_others():
    """Against the normal equations of (1/2n) |Xw - y|^2 + (lambda m / 2) |w - mean|^2."""
    each = federation("squared", epochs_low=2, epochs_high=2, personal_epochs=200)
    for _ in range(20):
        each.round()
    new = Client(5, each.problem, each.problem.client(5), None, 3)
    found = each.algorithm.personalise(each.state, 20, new)
    x, y = each.algorithm._examples(new.data)
    ridge, mean = each.algorithm.lam * 5, each.state.weights.mean(axis=0)
    w = np.linalg.solve(x.T @ x / len(y) + ridge * np.eye(3), x.T @ y / len(y) + ridge * mean)
    test = each.problem.client_test(5)
    error = np.mean((test.x.double().numpy() @ w - test.y.numpy()) ** 2)
    assert found["loss"] == pytest.approx(error / 2, rel=1e-4)
    assert each.algorithm.examined(each.state, 5).exact["w"].tolist() == mean.tolist()


def test_adapting_uses_the_new_clients_training_data_alone():
    each = federation()
    each.round()
    new = Client(5, each.problem, each.problem.client(5), None, 3)
    before = each.algorithm.personalise(each.state, 1, new)
    asked = []

    class Watched(Points):
        def client_test(self, index):
            asked.append(index)
            data = super().client_test(index)
            return dataclasses.replace(data, y=1 - data.y)

    other = each.algorithm.personalise(each.state, 1, dataclasses.replace(new, problem=Watched()))
    assert other["accuracy"] == pytest.approx(1 - before["accuracy"], abs=1e-6)
    assert asked == [5]


# ---- states, seeds, problems


@pytest.mark.parametrize("relation", ["learned", "local", "global"])
def test_a_state_is_loaded_as_it_was_saved(relation):
    each = federation(related=False, inner=2, relation=relation)
    for _ in range(5):
        each.round()
    saved = each.algorithm.save(each.state)
    found = each.algorithm.load(each.problem, saved)
    for field in dataclasses.fields(each.state):
        one, other = getattr(each.state, field.name), getattr(found, field.name)
        assert np.array_equal(one, other), field.name
    tensors = each.algorithm.tensors(found)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "w": (5, 3),
        "b": (5, 3),
        "duals": (5,),
        "sigma": (5, 5),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.zeros(4, 3).double()}, "expected b as float64"),
        ({"duals": torch.zeros(5)}, "expected duals as float64"),
        ({"duals": torch.full((5,), torch.nan).double()}, "expected duals to be finite"),
        ({"sigma": torch.zeros(5, 5).double()}, "its diagonal above 0"),
        ({"sigma": torch.ones(5, 5).double().tril()}, "to be symmetric"),
        ({"version": -1}, "expected version"),
        ({"version": 1.0}, "expected version"),
    ],
)
def test_what_is_no_state_is_not_loaded(change, message):
    each = federation()
    saved = each.algorithm.save(each.state)
    numbers = change if "version" in change else saved.numbers
    exact = dict(saved.exact) | ({} if "version" in change else change)
    with pytest.raises(ResultError, match=message):
        each.algorithm.load(each.problem, Payload({}, exact, numbers))


def test_a_local_alpha_of_other_data_is_refused():
    each = federation()
    each.locals[0] = Payload(exact={"alpha": torch.zeros(7).double()})
    with pytest.raises(ResultError, match=r"expected alpha as float64 \[6\]"):
        each.work(0)


def test_the_same_seed_makes_the_same_bytes_and_another_others():
    found = []
    for seed in (1, 1, 2):
        each = federation(epochs_low=0.1, epochs_high=1.0)
        each.seed = seed
        payload, _ = each.work(4)
        found.append((payload.exact["b"].numpy().tobytes(), payload.numbers))
    assert found[0] == found[1] != found[2]


def test_only_linear_models_of_one_output_and_fitting_labels_are_learned():
    with pytest.raises(ProblemError, match=r"MOCHA learns linear models.*\[2, 2\], \[2\]"):
        Mocha().start(Tiny())

    class Deep(Points):
        def model(self):
            return nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 1))

    with pytest.raises(ProblemError, match="expected one weight of shape"):
        Mocha().start(Deep())
    with pytest.raises(ProblemError, match="the squared loss needs numbers as y"):
        Federation(Mocha(loss="squared"), Points())
    with pytest.raises(ProblemError, match="the hinge loss needs classes 0 and 1"):
        Federation(Mocha(), Heights())
