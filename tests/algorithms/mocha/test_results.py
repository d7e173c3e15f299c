"""MOCHA on what may go wrong: results late, lost or hostile, small budgets, and foreign states."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from torch import nn

from fedmq.algorithms.base import Payload, Result
from fedmq.algorithms.errors import AlgorithmError, ProblemError, ResultError
from fedmq.algorithms.mocha.algorithm import Mocha
from tests.algorithms.multitask import LOSSES, Federation, Heights, Points, combined, federation
from tests.algorithms.tiny import Tiny

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
        gathered = each.algorithm.new_accumulator(each.state)
        for k in rng.sample(sorted(flying), rng.randint(1, 3)):
            payload, alpha = flying.pop(k)
            try:
                each.algorithm.accumulate(gathered, each.state, Result(k, 1, payload, 1), 0.3)
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
            each.algorithm.accumulate(gathered, each.state, Result(1, 0, payload, 1), 1.0)
            break
        except ResultError:
            assert gathered == {}
    np.testing.assert_allclose(gathered[1][0], counted, atol=0.1)


def bad():
    b = torch.zeros(3, dtype=torch.float64)
    numbers = {"dual": 0.5, "steps": 1}
    yield "no b", {}, numbers, "expected a tensor 'b', it is missing"
    yield "float32", {"b": b.float()}, numbers, "got torch.float32"
    yield "longer", {"b": torch.zeros(4).double()}, numbers, "got torch.float64 [4]"
    yield "another", {"b": b, "c": b}, numbers, "expected no tensor 'c'"
    for value in (torch.nan, torch.inf, 1e300):
        yield f"b of {value}", {"b": b + value}, numbers, "expected values of b up to 1e+12"
    for value in (None, True, 1, "1", float("nan"), float("inf"), 1e200):
        yield f"dual {value}", {"b": b}, {**numbers, "dual": value}, "expected dual as a finite"
    yield "too good", {"b": b}, {**numbers, "dual": 1.5}, "from 0 to 1, got 1.5"
    yield "below 0", {"b": b}, {**numbers, "dual": -0.5}, "from 0 to 1, got -0.5"
    yield "far away", {"b": b + 1e6}, numbers, "got one that lowers it by"
    yield "no use", {"b": b}, {**numbers, "dual": 0.0}, "as results of older versions may"


@pytest.mark.parametrize("which", [name for name, *_ in bad()])
def test_a_result_that_cannot_be_used_leaves_everything_as_it_was(which):
    each = federation()
    each.round()
    cases = {name: rest for name, *rest in bad()}
    exact, numbers, message = cases[which]
    gathered = {1: (np.ones(3), 0.5)}
    with pytest.raises(ResultError) as caught:
        each.algorithm.accumulate(
            gathered, each.state, Result(0, 0, Payload({}, exact, numbers), 1), 1.0
        )
    assert message in str(caught.value)
    assert list(gathered) == [1]
    assert gathered[1][0].tolist() == [1, 1, 1]


def test_a_clients_second_result_replaces_its_first_and_takes_no_more_memory():
    each = federation()
    gathered = each.algorithm.new_accumulator(each.state)
    for _ in range(4):
        payload, alpha = each.work(2)
        each.algorithm.accumulate(gathered, each.state, Result(2, 0, payload, 1), 1.0)
    assert list(gathered) == [2]
    each.alphas[2] = alpha
    before = each.state.b.copy()
    new = each.algorithm.commit(each.state, gathered, 4.0)
    np.testing.assert_allclose(new.b, combined(each), atol=1e-15)
    assert np.array_equal(each.state.b, before)


def test_a_result_says_nothing_but_b_and_two_numbers():
    """d floats, as in the paper; labels, alpha and examples stay with the client."""
    each = federation()
    task = each.algorithm.task(each.state, 0)
    payload, _ = each.work(0)
    assert set(payload.exact) == {"b"}
    assert payload.exact["b"].shape == task.exact["v"].shape == (3,)
    assert set(payload.numbers) == {"dual", "steps"}
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
    gathered = each.algorithm.accumulate({}, each.state, Result(1, 0, payload, 1), 1.0)
    new = each.algorithm.commit(each.state, gathered, 1.0)
    assert np.array_equal(new.weights, each.state.weights)


def test_the_bounds_must_be_in_order():
    with pytest.raises(AlgorithmError, match=r"epochs_low: expected at most epochs_high, got 2"):
        Mocha(epochs_low=2, epochs_high=1)


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
        ({"b": torch.zeros(4, 3).double()}, "expected b as torch.float64"),
        ({"duals": torch.zeros(5)}, "expected duals as torch.float64"),
        ({"duals": torch.full((5,), torch.nan).double()}, "expected finite values of duals"),
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
    with pytest.raises(ResultError, match=r"expected alpha as torch.float64 \[6\]"):
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
    with pytest.raises(ProblemError, match="expected numbers as y for the squared loss"):
        Federation(Mocha(loss="squared"), Points())
    with pytest.raises(ProblemError, match="expected classes 0 and 1 as y for the hinge loss"):
        Federation(Mocha(), Heights())
