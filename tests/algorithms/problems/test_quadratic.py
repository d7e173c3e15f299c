"""The stand-in for training: its closed form is SGD's, and it learns as SGD does."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from fedmq.algorithms.base import Client, Task
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.fedprox import FedProx
from fedmq.algorithms.problems import ImageClassification
from fedmq.algorithms.problems.quadratic import DIM, LocalSteps, QuadraticProblem
from fedmq.algorithms.tasks import Result

REAL = ImageClassification("mnist-mini", "mlp", 1000, "iid", 0)
HOW = LocalSteps(30, 10, 0.05, 0.5, 0.0, 0.0)
H = 0.8 / np.arange(1, DIM + 1)


def stand_in(heterogeneity: float = 0.5, noise: float = 0.0, seed: int = 0) -> QuadraticProblem:
    return QuadraticProblem(
        dataclasses.replace(REAL, seed=seed), lambda _: 100, heterogeneity, noise, 0.8
    )


def trained(algorithm, problem, client=0, seed=0, start=None):
    state = algorithm.start(problem) if start is None else start
    task = Task(0, algorithm.task(state, client))
    return algorithm.train(task, Client(client, problem, problem.client(client), None, seed))


def run(problem, algorithm, versions, cohort=10, staleness=0):
    """Return the accuracy after each version; results are of the version ``staleness`` before."""
    states, found = [algorithm.start(problem)], []
    for version in range(versions):
        state = states[-1]
        start = states[max(0, version - staleness)]
        accumulator = algorithm.new_accumulator(state)
        for client in range(version * cohort, (version + 1) * cohort):
            result = trained(algorithm, problem, client % 1000, client, start)
            late = Result(client, min(version, staleness), result.payload, 100)
            accumulator = algorithm.accumulate(accumulator, state, late, 1.0)
        states.append(algorithm.commit(state, accumulator, cohort))
        task = Task(version, algorithm.evaluation_task(states[-1]))
        found.append(algorithm.evaluate(task, problem, "cpu")["accuracy"])
    return found


def test_the_first_model_has_the_loss_and_accuracy_of_a_guess() -> None:
    problem = stand_in()
    metrics = problem.metrics(problem.model()(problem.test().x), problem.test().y)
    assert metrics["loss"] == pytest.approx(math.log(10))
    assert metrics["accuracy"] == pytest.approx(0.1)


def test_the_optimum_has_accuracy_1() -> None:
    problem = stand_in()
    best = torch.from_numpy(problem._optimum).float()[None]
    assert problem.metrics(best, torch.zeros(1))["accuracy"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    "how",
    [
        HOW,
        LocalSteps(1, 10, 0.05, 0.0, 0.0, 0.0),
        LocalSteps(25, 10, 0.1, 0.9, 0.01, 0.0),
        LocalSteps(40, 10, 0.3, 0.0, 0.0, 0.7),
        LocalSteps(17, 10, 0.2, 0.5, 0.1, 0.3),
    ],
)
def test_the_closed_form_ends_where_the_steps_end(how: LocalSteps) -> None:
    problem = stand_in()
    start = torch.linspace(-1, 1, DIM)
    own = problem._optimum + 0.5 * problem._scale * problem._difference(3)
    first = start.double().numpy()
    w, v = first.copy(), np.zeros(DIM)
    for _ in range(how.steps):
        gradient = H * (w - own) + how.weight_decay * w + how.proximal * (w - first)
        v = how.momentum * v + gradient
        w = w - how.lr * v
    np.testing.assert_allclose(problem.after_sgd(start, 3, 0, how).numpy(), w, rtol=1e-5, atol=1e-6)


def test_noise_has_the_variance_of_the_steps() -> None:
    quiet, noisy = stand_in(noise=0.0), stand_in(noise=2.0)
    start = torch.zeros(DIM)
    middle = quiet.after_sgd(start, 1, 0, HOW).numpy()
    ends = np.array([noisy.after_sgd(start, 1, seed, HOW).numpy() for seed in range(2000)])
    np.testing.assert_allclose(ends.mean(0), middle, atol=0.02)
    rng, steps = np.random.default_rng(0), []
    for _ in range(2000):
        w, v = np.zeros(DIM), np.zeros(DIM)
        for _ in range(HOW.steps):
            drawn = 2 * noisy._scale * np.sqrt(H / 10) * rng.standard_normal(DIM)
            v = 0.5 * v + H * w + drawn
            w = w - 0.05 * v
        steps.append(w)
    np.testing.assert_allclose(ends.std(0), np.std(steps, axis=0), rtol=0.1)


def test_a_result_depends_on_seed_client_and_task_alone() -> None:
    one, other = stand_in(noise=1.0), stand_in(noise=1.0)
    start = torch.zeros(DIM)
    assert torch.equal(one.after_sgd(start, 5, 7, HOW), other.after_sgd(start, 5, 7, HOW))
    for problem, client, seed in ((one, 6, 7), (one, 5, 8), (stand_in(noise=1.0, seed=1), 5, 7)):
        assert not torch.equal(
            problem.after_sgd(start, client, seed, HOW), one.after_sgd(start, 5, 7, HOW)
        )


def test_a_task_of_fedavg_is_the_closed_form_and_counts_the_examples() -> None:
    problem = stand_in(noise=1.0)
    found = trained(FedAvg(lr=0.1, epochs=3, batch_size=30), problem, client=2, seed=9)
    assert found.num_examples == 100
    expected = problem.after_sgd(torch.zeros(DIM), 2, 9, LocalSteps(12, 30, 0.1, 0.5, 0.0, 0.0))
    assert torch.equal(found.payload.weights["w"], expected)


def test_without_batches_a_step_has_all_examples() -> None:
    problem = stand_in(noise=1.0)
    found = trained(FedAvg(batch_size=None, epochs=1), problem).payload.weights["w"]
    expected = problem.after_sgd(torch.zeros(DIM), 0, 0, LocalSteps(1, 100, 0.05, 0.5, 0.0, 0.0))
    assert torch.equal(found, expected)


def test_fedprox_holds_clients_back() -> None:
    problem = stand_in()
    free, held = (trained(each, problem) for each in (FedAvg(), FedProx(mu=5.0)))
    assert held.payload.weights["w"].norm() < 0.7 * free.payload.weights["w"].norm()


def test_the_trial_step_before_the_first_task_works() -> None:
    problem = stand_in()
    FedAvg().try_model(problem, problem.client(0), "cpu")


def test_averaging_learns_and_more_differences_between_clients_slow_it() -> None:
    alike, different = (run(stand_in(each, 1.0), FedAvg(), 30)[-1] for each in (0.0, 2.0))
    assert alike > 0.9
    assert 0.1 < different < alike - 0.05


def test_stale_results_slow_it_and_too_stale_ones_never_settle() -> None:
    problem = stand_in(0.0)
    settings = FedAvg(lr=0.2, momentum=0.0)
    fresh, stale = (run(problem, settings, 6, staleness=each) for each in (0, 5))
    assert fresh[-1] > 0.9
    assert max(stale) < fresh[-1]


def test_labels_of_clients_are_spread_evenly_and_belong_to_their_optimum() -> None:
    problem = stand_in()
    positions = np.array([problem.label_position(each) for each in range(500)])
    assert positions.mean() == pytest.approx(0.5, abs=0.05)
    assert positions.std() == pytest.approx(math.sqrt(1 / 12), abs=0.02)
    firsts = [problem._difference(each)[0] for each in range(500)]
    assert np.corrcoef(positions, firsts)[0, 1] > 0.9
