"""MOCHA against the paper: the dual, the relation of the tasks, and the w of each task."""

import dataclasses
import itertools

import numpy as np
import pytest

from fedmq.algorithms.base import Client, Task
from fedmq.algorithms.mocha import dual
from fedmq.algorithms.rng import derive_rng
from tests.algorithms.multitask import LOSSES, SIGMA, Points, combined, federation

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
    assert payload.numbers["steps"] == round(2.5 * n)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_is_the_best_for_its_coordinate(loss):
    """Against a fine grid of what it maximises."""
    rng, chosen = np.random.default_rng(1), dual.LOSSES[loss]
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
    chosen = dual.LOSSES[loss]
    assert chosen.step(0.0, 1.0, 0.0, 0.0) == 1.0


@pytest.mark.parametrize("loss", LOSSES)
def test_the_conjugate_is_that_of_the_loss(loss):
    """-l*(-a) = min_u l(u) + a u."""
    chosen, u = dual.LOSSES[loss], np.linspace(-30, 30, 600001)
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    sigma, gram = dual.relate(weights, 1e-7), weights @ weights.T
    root = np.linalg.svd(weights, compute_uv=False).sum()
    np.testing.assert_allclose(sigma @ sigma, gram / root**2, atol=1e-14)
    assert np.trace(sigma) == pytest.approx(1)
    assert np.array_equal(sigma, sigma.T)


def test_the_eigenvalue_floor_keeps_sigma_invertible_with_more_tasks_than_features():
    weights = np.random.default_rng(0).standard_normal((9, 2))
    weights[3] = weights[4]
    values = np.linalg.eigvalsh(dual.relate(weights, 1e-7))
    root = np.linalg.svd(weights, compute_uv=False).sum() + 7 * np.sqrt(1e-7)
    np.testing.assert_allclose(values[:7], np.sqrt(1e-7) / root, rtol=1e-5)
    np.testing.assert_allclose(dual.relate(np.zeros((4, 3)), 1e-7), np.eye(4) / 4)


@pytest.mark.parametrize("safety", ["rows", "eigenvalue"])
def test_sigma_prime_bounds_what_all_steps_together_can_do(safety):
    """tr(dB Sigma dB^T) <= sigma' sum_t Sigma_tt |db_t|^2; 1 for tasks on their own."""
    assert dual.SAFETY[safety](np.eye(4) / 4) == pytest.approx(1)
    assert dual.SAFETY[safety](np.full((4, 4), 0.25)) == pytest.approx(4)
    rng = np.random.default_rng(0)
    for _ in range(20):
        sigma = dual.relate(rng.standard_normal((6, 3)), 1e-7)
        bound = dual.SAFETY[safety](sigma)
        least = np.linalg.eigvalsh(bound * np.diag(np.diag(sigma)) - sigma)[0]
        assert least >= -1e-16
        assert dual.eigenvalue(sigma) <= dual.rows(sigma)


def test_a_learned_relation_is_updated_every_inner_versions_from_w():
    each = federation(related=False, inner=3)
    for version in range(1, 8):
        before = each.state.sigma
        each.round()
        if version % 3:
            assert np.array_equal(each.state.sigma, before)
        else:
            w = before @ combined(each) / each.algorithm.lam
            np.testing.assert_allclose(each.state.sigma, dual.relate(w, 1e-7), atol=1e-14)
    assert each.state.safe == dual.rows(each.state.sigma) > 1


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


# ---- evaluation and new clients


def test_each_client_is_evaluated_with_its_own_w_on_its_own_test_data():
    each = federation(epochs_low=2, epochs_high=2)
    for _ in range(20):
        each.round()
    for k in (0, 4):
        found = each.algorithm.evaluate_client(
            Task(20, each.algorithm.evaluation_task(each.state, k)), each.at(k)
        )
        test = each.problem.client_test(k)
        u = test.x.double().numpy() @ each.state.weights[k]
        right = np.mean((u > 0) == test.y.numpy())
        assert found["accuracy"] == pytest.approx(right)
        y = 2 * test.y.numpy() - 1
        assert found["loss"] == pytest.approx(np.maximum(0, 1 - y * u).mean(), rel=1e-5)
    assert each.algorithm.evaluated_by == "clients"


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
    assert each.algorithm.evaluation_task(each.state, 5).exact["w"].tolist() == mean.tolist()


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
