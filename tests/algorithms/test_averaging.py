"""The server half: what results add up to, by hand."""

import pytest
import torch

from fedmq.algorithms.base import Payload, Result, examples_of
from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.fedsgd import FedSGD
from fedmq.algorithms.schedules import Buffered, Rounds, Stream
from tests.algorithms.tiny import Normed, Tiny, payload


@pytest.fixture
def state():
    """Return version 0 of a model of six weights, all 1."""
    state = FedAvg().start(Tiny())
    state.weights.fill_(1.0)
    return state


def commit(algorithm, schedule, state, results):
    """Return the version that (payload, n, staleness) make under a schedule."""
    gathered, total = algorithm.new_accumulator(state), 0.0
    for result, n, staleness in results:
        weight = schedule.weight(n, staleness)
        gathered = algorithm.accumulate(gathered, state, Result(0, 0, result, 1), weight)
        total += weight
    return algorithm.commit(state, gathered, schedule.divisor(total, len(results)))


def test_two_clients_are_averaged_by_their_examples(state):
    """(1 * 2 + 3 * 6) / 4 = 5, on top of 1."""
    results = [(payload(state, 2.0), 1, 0), (payload(state, 6.0), 3, 0)]
    assert commit(FedAvg(), Rounds(), state, results).weights.tolist() == [6.0] * 6


def test_two_models_are_averaged_like_two_updates(state):
    """(1 * 3 + 3 * 7) / 4 = 6: the models are where those updates lead."""
    results = [
        (payload(state, 3.0, reply="model"), 1, 0),
        (payload(state, 7.0, reply="model"), 3, 0),
    ]
    assert commit(FedAvg(), Rounds(), state, results).weights.tolist() == [6.0] * 6


def test_the_server_learning_rate_scales_the_averaged_update(state):
    results = [(payload(state, 2.0), 1, 0), (payload(state, 6.0), 3, 0)]
    assert commit(FedAvg(server_lr=0.5), Rounds(), state, results).weights.tolist() == [3.5] * 6


def test_every_weight_keeps_its_place(state):
    results = [
        (payload(state, [0, 1, 2, 3, 4, 5]), 1, 0),
        (payload(state, [4, 0, 0, 0, 0, 8]), 1, 0),
    ]
    weights = commit(FedAvg(), Rounds(), state, results).weights
    assert weights.tolist() == [3.0, 1.5, 2.0, 2.5, 3.0, 7.5]


def test_fedsgd_steps_against_the_averaged_gradient(state):
    """1 - 0.5 * (1 * 2 + 3 * 6) / 4."""
    results = [(payload(state, 2.0), 1, 0), (payload(state, 6.0), 3, 0)]
    assert commit(FedSGD(lr=0.5), Rounds(), state, results).weights.tolist() == [-1.5] * 6


@pytest.mark.parametrize(("staleness", "alpha"), [(0, 0.5), (3, 0.25)])
def test_stream_mixes_a_model_in_as_the_equation_says(state, staleness, alpha):
    """x_t = (1 - alpha_t) x_{t-1} + alpha_t x_new, alpha_t = 0.5 / sqrt(1 + staleness)."""
    result = payload(state, [9.0, 1.0, 0.0, -7.0, 5.0, 3.0], reply="model")
    mixed = commit(FedAvg(), Stream(mixing=0.5), state, [(result, 1000, staleness)])
    expected = [(1 - alpha) * 1.0 + alpha * x for x in [9.0, 1.0, 0.0, -7.0, 5.0, 3.0]]
    assert mixed.weights.tolist() == expected


def test_buffered_adds_the_discounted_updates_over_their_number(state):
    """1 + 1/2 * (1 * 2 + 0.5 * 4) = 3: s(0) = 1, s(3) = 0.5, K = 2; n does not count."""
    results = [(payload(state, 2.0), 1, 0), (payload(state, 4.0), 100, 3)]
    assert commit(FedAvg(), Buffered(), state, results).weights.tolist() == [3.0] * 6
    half = commit(FedAvg(server_lr=0.5), Buffered(), state, results)
    assert half.weights.tolist() == [2.0] * 6


def test_a_late_result_of_a_round_is_discounted(state):
    """n s: (2 * 2 + 4 * 0.5 * 6) / (2 + 2) = 4, with s(3) = 0.5."""
    results = [(payload(state, 2.0), 2, 0), (payload(state, 6.0), 4, 3)]
    assert commit(FedAvg(), Rounds(), state, results).weights.tolist() == [5.0] * 6


def test_the_largest_counter_of_the_cohort_is_taken():
    state = FedAvg().start(Normed())
    results = [(payload(state, 0.0, counters=[c]), 1, 0) for c in (4, 2**53 + 1, 5)]
    new = commit(FedAvg(), Rounds(), state, results)
    assert new.counters.tolist() == [2**53 + 1]
    assert FedAvg().tensors(new)["1.num_batches_tracked"].item() == 2**53 + 1


def test_a_version_stays_what_it_was(state):
    """Its tensors may still be on the wire when the next one is made."""
    before, results = state.weights.clone(), [(payload(state, 2.0), 1, 0)] * 3
    new = commit(FedAvg(), Rounds(), state, results)
    commit(FedAvg(), Rounds(), new, results)
    assert torch.equal(state.weights, before)
    assert new.weights.tolist() == [3.0] * 6


def test_a_result_is_not_changed_by_adding_it(state):
    result = payload(state, 2.0)
    commit(FedAvg(), Rounds(), state, [(result, 3, 0), (result, 5, 0)])
    assert state.layout.flatten(result.weights).tolist() == [2.0] * 6


def test_a_thousand_results_take_no_more_memory_than_one():
    state = FedAvg().start(Normed())
    gathered = FedAvg().new_accumulator(state)
    memory = gathered.total.data_ptr(), gathered.counters.data_ptr()
    first = gathered
    for _ in range(1000):
        gathered = FedAvg().accumulate(gathered, state, Result(0, 0, payload(state, 1.0), 1), 1.0)
    assert gathered is first
    assert (gathered.total.data_ptr(), gathered.counters.data_ptr()) == memory
    assert set(vars(gathered)) == {"total", "counters", "models"}
    assert gathered.total.unique().tolist() == [1000.0]


def bad_results(state):
    """Yield results that cannot be used, by what is wrong with them."""
    good = payload(state, 1.0)
    weights, exact = dict(good.weights), dict(good.exact)
    first = next(iter(weights))
    for name, value in {"NaN": torch.nan, "infinity": torch.inf, "-infinity": -torch.inf}.items():
        vector = torch.ones(state.layout.dim)
        vector[-1] = value
        yield name, payload(state, vector), "NaN or infinite"
    both = torch.ones(state.layout.dim)
    both[0], both[1] = torch.inf, -torch.inf
    yield "both infinities", payload(state, both), "NaN or infinite"
    changes = {
        "wrong shape": (weights | {first: torch.ones(1)}, exact, "as torch.float32"),
        "transposed": (weights | {first: weights[first].t()}, exact, "as torch.float32"),
        "wrong dtype": (weights | {first: weights[first].double()}, exact, "as torch.float32"),
        "extra": (weights | {"more": torch.ones(1)}, exact, "expected no tensor 'more'"),
        "extra exact": (weights, exact | {"more": torch.ones(1)}, "expected no tensor 'more'"),
        "missing": ({n: t for n, t in weights.items() if n != first}, exact, "it is missing"),
        "nothing": ({}, {}, "it is missing"),
        "narrow counter": (weights, {n: t.int() for n, t in exact.items()}, "as torch.int64"),
    }
    for name, (new_weights, new_exact, message) in changes.items():
        yield name, Payload(new_weights, new_exact, {"n": 1, "reply": "model"}), message


BAD = ["NaN", "infinity", "-infinity", "both infinities", "wrong shape", "transposed"]
BAD += ["wrong dtype", "extra", "extra exact", "missing", "nothing"]
BAD += ["narrow counter"]


@pytest.mark.parametrize("which", BAD)
@pytest.mark.parametrize("algorithm", [FedAvg(), FedSGD()], ids=["fedavg", "fedsgd"])
def test_a_result_that_cannot_be_used_leaves_the_sum_as_it_was(algorithm, which):
    state = algorithm.start(Normed())
    gathered = algorithm.accumulate(
        algorithm.new_accumulator(state), state, Result(0, 0, payload(state, 0.1), 1), 3.0
    )
    before = gathered.total.clone(), gathered.counters.clone(), gathered.models
    bad = {name: (result, message) for name, result, message in bad_results(state)}
    assert set(bad) == set(BAD)
    result, message = bad[which]
    with pytest.raises(ResultError, match=message):
        algorithm.accumulate(gathered, state, Result(0, 0, result, 1), 2.0)
    assert torch.equal(gathered.total, before[0])
    assert torch.equal(gathered.counters, before[1])
    assert gathered.models == before[2]


def test_a_finite_result_cannot_make_the_model_infinite(state):
    """1e38 is finite, 1000 times that is not; one such client would end every run."""
    algorithm = FedAvg()
    gathered = algorithm.accumulate(
        algorithm.new_accumulator(state), state, Result(0, 0, payload(state, 0.5), 1), 1.0
    )
    huge = payload(state, [0, 0, 0, 0, 0, 1e38])
    with pytest.raises(ResultError):
        algorithm.accumulate(gathered, state, Result(0, 0, huge, 1), 1000.0)
    assert gathered.total.tolist() == [0.5] * 6


@pytest.mark.parametrize("n", [None, 0, -1, 1.0, True, "1", [1], 10**9 + 1, float("nan")])
def test_a_number_of_examples_that_is_none_is_refused(n):
    with pytest.raises(ResultError, match=r"expected n, the number of examples, from 1 to 10\^9"):
        examples_of({"n": n})


def test_a_number_of_examples_is_read():
    assert [examples_of({"n": n}) for n in (1, 10**9)] == [1, 10**9]
    with pytest.raises(ResultError, match="got None"):
        examples_of({})
