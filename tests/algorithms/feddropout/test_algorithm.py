"""Federated Dropout: what clients get, and how their results come together."""

import dataclasses

import numpy as np
import pytest
import torch

from fedmq.algorithms.base import Result, Task
from fedmq.algorithms.errors import ProblemError, ResultError
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.feddropout.algorithm import FedDropout
from fedmq.algorithms.schedules import Buffered, Rounds, Stream
from fedmq.codecs.formats.streamed import Streamed
from tests.algorithms.layered import (
    Hidden,
    Images,
    Mixing,
    Pair,
    commit,
    holder_of,
    sent,
    trained,
    units_of,
)
from tests.algorithms.tiny import Normed, change, client

GOLDEN_UNITS = [2, 7, 8, 15]


# ---- what clients get


def test_a_task_is_a_small_dense_model_of_weights_of_the_whole():
    algorithm = FedDropout(keep=0.5)
    state = algorithm.start(Hidden(5))
    payload, tensors = algorithm.task(state, 3), algorithm.tensors(state)
    units = units_of(algorithm, state, 3)
    assert len(units) == 8
    assert payload.weights["0.weight"].equal(tensors["0.weight"][units])
    assert payload.weights["0.bias"].equal(tensors["0.bias"][units])
    assert payload.weights["2.weight"].equal(tensors["2.weight"][:, units])
    assert payload.weights["2.bias"].equal(tensors["2.bias"])
    assert payload.numbers == {"version": 0, "client": 3}
    assert all(each.is_contiguous() for each in payload.weights.values())


def test_sub_models_differ_by_client_by_version_and_by_seed():
    algorithm = FedDropout(keep=0.5)
    state = algorithm.start(Hidden(9))
    found = {
        tuple(units_of(each, state, index, version))
        for each in (algorithm, FedDropout(keep=0.5, seed=1))
        for index in range(1, 9)
        for version in range(4)
    }
    assert len(found) == 2 * 8 * 4


def test_the_same_sub_model_follows_from_the_same_seed_version_and_client():
    problem, algorithm = Hidden(9), FedDropout(keep=0.5)
    one, other = (FedDropout(keep=0.5, lr=lr).start(problem) for lr in (0.1, 0.2))
    assert units_of(algorithm, one, 4) == units_of(algorithm, other, 4)
    assert (
        algorithm.task(one, 4).weights["0.bias"].equal(algorithm.task(other, 4).weights["0.bias"])
    )


def test_sub_models_never_change_between_releases():
    """Recorded runs replay only while this holds."""
    algorithm = FedDropout(keep=0.25)
    assert units_of(algorithm, algorithm.start(Hidden(9)), 4, 7) == GOLDEN_UNITS


@pytest.mark.slow
def test_every_unit_is_kept_in_a_share_of_the_versions():
    algorithm = FedDropout(keep=0.75)
    state = algorithm.start(Hidden())
    counts = np.zeros(16)
    for version in range(1500):
        counts[units_of(algorithm, state, 1, version)] += 1
    assert abs(counts / 1500 - 0.75).max() < 4 * np.sqrt(0.75 * 0.25 / 1500)


def test_the_whole_model_is_evaluated():
    problem, algorithm = Hidden(), FedDropout(keep=0.5)
    state = algorithm.start(problem)
    whole = FedAvg().evaluate(Task(0, FedAvg().task(state, 0)), problem, "cpu")
    assert algorithm.evaluate(Task(0, algorithm.evaluation_task(state)), problem, "cpu") == whole


def test_a_model_that_cannot_be_cut_is_refused_at_the_start():
    with pytest.raises(ProblemError, match=r"around layer '1' \(LayerNorm\)"):
        FedDropout().start(Mixing())


# ---- training


def test_a_sub_model_is_trained_as_fedavg_trains_a_small_model():
    """The whole with the other units silenced, by torch.optim.SGD."""
    problem = Hidden(3)
    algorithm = FedDropout(keep=0.5, lr=0.1, epochs=3, batch_size=None, momentum=0.5)
    state = algorithm.start(problem)
    units = units_of(algorithm, state, 2)
    result = trained(algorithm, problem, state, 2, "model")
    module, data = problem.model(), problem.client(2)
    mask = torch.zeros(16)
    mask[units] = 1.0
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        problem.loss(module[2](module[1](module[0](data.x)) * mask), data.y).backward()
        optimizer.step()
    expected = dict(module.named_parameters())
    torch.testing.assert_close(result.weights["0.weight"], expected["0.weight"][units])
    torch.testing.assert_close(result.weights["2.weight"], expected["2.weight"][:, units])
    torch.testing.assert_close(result.weights["2.bias"], expected["2.bias"])
    assert result.numbers == {"reply": "model", "version": 0, "client": 2}


@pytest.mark.slow
@pytest.mark.parametrize("problem", [Normed(3), Images(3), Hidden(3)])
@pytest.mark.parametrize("reply", ["update", "model"])
@pytest.mark.parametrize("absent", ["zero", "holders"])
def test_keeping_everything_is_fedavg_bit_for_bit(problem, reply, absent):
    options = {"epochs": 2, "batch_size": 4, "momentum": 0.5, "server_lr": 0.7}
    avg, dropout = FedAvg(**options), FedDropout(keep=1.0, absent=absent, **options)
    one, other = avg.start(problem), dropout.start(problem)
    for _ in range(3):
        results = []
        for index in range(problem.clients):
            task = Task(0, avg.task(one, index), reply)
            plain = avg.train(task, client(problem, index)).payload
            part = trained(dropout, problem, other, index, reply)
            assert all(part.weights[name].equal(plain.weights[name]) for name in plain.weights)
            results.append((plain, part, index + 1))
        one = commit(avg, Rounds(), one, [(each, n, 0) for each, _, n in results])
        other = commit(dropout, Rounds(), other, [(each, n, 0) for _, each, n in results])
        assert one.weights.equal(other.weights)
        assert one.counters.equal(other.counters)


# ---- how results come together


@pytest.fixture
def pair():
    """Return version 0 of a model of two hidden units of which clients get one; all 1."""
    state = FedDropout(keep=0.5).start(Pair(20))
    state.weights.fill_(1.0)
    return state


def places(state, unit):
    """Return where the weights of one hidden unit are, of the twelve."""
    whole = state.layout.views(torch.arange(12))
    own = whole["0.weight"][unit], whole["0.bias"][[unit]], whole["2.weight"][:, unit]
    return torch.cat(own).tolist()


@pytest.mark.parametrize(
    ("absent", "first", "second"), [("zero", 1 + 0.5, 1 + 4.5), ("holders", 1 + 2.0, 1 + 6.0)]
)
def test_two_clients_with_a_unit_each(pair, absent, first, second):
    """Updates 2 with n = 1, 6 with n = 3. The paper: 1 * 2 / 4 and 3 * 6 / 4.

    Over holders: 2 and 6. The bias of the logits is with both: (1 * 2 + 3 * 6) / 4 = 5.
    """
    algorithm = FedDropout(keep=0.5, absent=absent)
    one = holder_of(algorithm, pair, 0)
    other = holder_of(algorithm, pair, 1)
    results = [(sent(pair, 2, one), 1, 0), (sent(pair, 6, other), 3, 0)]
    weights = commit(algorithm, Rounds(), pair, results).weights
    assert weights[places(pair, 0)].tolist() == [first] * 5
    assert weights[places(pair, 1)].tolist() == [second] * 5
    assert weights[10:].tolist() == [6.0, 6.0]


@pytest.mark.parametrize(("absent", "held"), [("zero", 1 + 14 / 7), ("holders", 1 + 14 / 3)])
def test_what_nobody_holds_stays(pair, absent, held):
    """Two clients with the same unit, and a third whose update is nothing."""
    algorithm = FedDropout(keep=0.5, absent=absent)
    one = holder_of(algorithm, pair, 0)
    two = holder_of(algorithm, pair, 0, but=[one])
    results = [(sent(pair, 2, one), 1, 0), (sent(pair, 6, two), 2, 0)]
    if absent == "zero":
        results.append((sent(pair, 0, holder_of(algorithm, pair, 1)), 4, 0))
    weights = commit(algorithm, Rounds(), pair, results).weights
    assert weights[places(pair, 1)].tolist() == [1.0] * 5
    torch.testing.assert_close(weights[places(pair, 0)], torch.full((5,), held))


@pytest.mark.parametrize(
    ("absent", "expected"), [("zero", 1 + 2 / 2), ("holders", 1 + 2 / (2 * 1 / 1.5))]
)
def test_buffered_over_all_results_or_over_the_share_of_the_holders(pair, absent, expected):
    """s = 1 and 0.5, K = 2. Update 2 of s = 1: 2 / 2, or 2 / (2 * 1 / 1.5)."""
    algorithm = FedDropout(keep=0.5, absent=absent)
    one, other = holder_of(algorithm, pair, 0), holder_of(algorithm, pair, 1)
    results = [(sent(pair, 2, one), 1, 0), (sent(pair, 0, other), 1, 3)]
    weights = commit(algorithm, Buffered(), pair, results).weights
    torch.testing.assert_close(weights[places(pair, 0)], torch.full((5,), expected))


@pytest.mark.parametrize("absent", ["zero", "holders"])
def test_stream_mixes_in_what_a_sub_model_holds_and_leaves_the_rest(pair, absent):
    """0.75 * 1 + 0.25 * 9 = 3, with alpha = 0.5 and s(3) = 0.5."""
    algorithm = FedDropout(keep=0.5, absent=absent)
    result = sent(pair, 9, holder_of(algorithm, pair, 0), reply="model")
    weights = commit(algorithm, Stream(mixing=0.5), pair, [(result, 1, 3)]).weights
    assert weights[places(pair, 0)].tolist() == [3.0] * 5
    assert weights[10:].tolist() == [3.0, 3.0]
    assert weights[places(pair, 1)].tolist() == [1.0] * 5


@pytest.mark.parametrize("absent", ["zero", "holders"])
def test_models_and_updates_of_sub_models_lead_to_the_same(absent):
    problem, algorithm = Images(4), FedDropout(keep=0.5, absent=absent, epochs=2)
    state = algorithm.start(problem)
    updates, models = (
        commit(
            algorithm,
            Rounds(),
            state,
            [(trained(algorithm, problem, state, k, reply), k + 1, 0) for k in range(4)],
        )
        for reply in ("update", "model")
    )
    torch.testing.assert_close(updates.weights, models.weights)
    assert not updates.weights.equal(state.weights)


def test_a_result_comes_back_to_where_its_weights_were_taken_from():
    """An update that is the sub-model itself doubles the coordinates that it holds."""
    algorithm = FedDropout(keep=0.5)
    state = algorithm.start(Images(3))
    task = algorithm.task(state, 2)
    result = dataclasses.replace(task, numbers={**task.numbers, "n": 1, "reply": "update"})
    new = commit(algorithm, Rounds(), state, [(result, 1, 0)])
    index = algorithm._index(state.parts, 0, 2)
    expected = state.weights.clone()
    expected[index] *= 2
    assert new.weights.equal(expected)
    assert index.numel() < expected.numel()


def test_a_late_result_goes_where_its_own_version_had_it():
    algorithm = FedDropout(keep=0.5)
    start = algorithm.start(Hidden(3))
    result = sent(start, 1.0, 1)
    state = commit(algorithm, Rounds(), start, [(sent(start, 0.0, 2), 1, 0)])
    assert state.version == 1
    assert units_of(algorithm, state, 1) != units_of(algorithm, start, 1)
    late = commit(algorithm, Rounds(late="use"), state, [(result, 1, 1)])
    changed = (late.weights != state.weights).nonzero().flatten()
    assert changed.tolist() == sorted(algorithm._index(start.parts, 0, 1).tolist())


def test_counters_are_whole_and_the_largest_is_taken():
    algorithm = FedDropout(keep=0.5, epochs=1, batch_size=2)
    problem = Images(3)
    state = algorithm.start(problem)
    results = [(trained(algorithm, problem, state, k), 1, 0) for k in range(3)]
    assert commit(algorithm, Rounds(), state, results).counters.tolist() == [5]


def test_a_version_and_a_result_stay_what_they_were(pair):
    for absent in ("zero", "holders"):
        algorithm = FedDropout(keep=0.5, absent=absent)
        result = sent(pair, 2.0, 1)
        commit(algorithm, Rounds(), pair, [(result, 3, 0), (result, 5, 0)])
        assert pair.weights.tolist() == [1.0] * 12
        assert pair.parts.small.flatten(result.weights).unique().tolist() == [2.0]


def bad(state):
    good = sent(state, 0.1, 1)
    whole = state.layout.views(torch.ones(state.layout.dim))
    hostile = {
        "the whole model": ({"weights": whole}, "as torch.float32"),
        "no weights": ({"weights": {}}, "it is missing"),
        "not finite": ({"weights": sent(state, torch.nan, 1).weights}, "NaN or infinite"),
        "too large": ({"weights": sent(state, 1e35, 1).weights}, "as large as"),
        "no numbers": ({"numbers": {"n": 1}}, "expected version from 0 to"),
    }
    for value in (-1, True, 1.0, "0", None, 10**12, 1 << 70):
        numbers = {**good.numbers, "version": value}
        hostile[f"version {value!r}"] = ({"numbers": numbers}, "expected version from 0 to")
    for value in (-1, 3, False, None, [1]):
        numbers = {**good.numbers, "client": value}
        hostile[f"client {value!r}"] = ({"numbers": numbers}, "expected client from 0 to 2, got")
    for name, (wrong, message) in hostile.items():
        yield name, dataclasses.replace(good, **wrong), message


BAD = [name for name, *_ in bad(FedDropout(keep=0.5).start(Images(3)))]


@pytest.mark.parametrize("absent", ["zero", "holders"])
@pytest.mark.parametrize("which", BAD)
def test_a_result_that_cannot_be_used_leaves_the_sum_as_it_was(which, absent):
    algorithm = FedDropout(keep=0.5, absent=absent)
    state = algorithm.start(Images(3))
    gathered = algorithm.accumulate(
        algorithm.new_accumulator(state), state, Result(0, 0, sent(state, 0.1, 2), 1), 3.0
    )
    before = dataclasses.replace(gathered, total=gathered.total.clone())
    before.counters = gathered.counters.clone()
    before.held = None if gathered.held is None else gathered.held.clone()
    results = {name: (result, message) for name, result, message in bad(state)}
    result, message = results[which]
    with pytest.raises(ResultError, match=message):
        algorithm.accumulate(gathered, state, Result(0, 0, result, 1), 2.0)
    assert gathered.total.equal(before.total)
    assert gathered.counters.equal(before.counters)
    assert (gathered.weight, gathered.models) == (before.weight, before.models)
    assert gathered.held is before.held or gathered.held.equal(before.held)


def test_a_small_holder_among_large_ones_cannot_make_the_model_infinite(pair):
    """Its 1e29 is finite; times the weight of all, it would not be."""
    algorithm = FedDropout(keep=0.5, absent="holders")
    one, other = holder_of(algorithm, pair, 0), holder_of(algorithm, pair, 1)
    results = [(sent(pair, 1e29, one), 1, 0), (sent(pair, 0, other), 10**9, 0)]
    results += [(sent(pair, 0, other), 10**9, 0)] * 9
    assert commit(algorithm, Rounds(), pair, results).weights.isfinite().all()


@pytest.mark.parametrize("old", [True, False], ids=["all weights", "what is trained"])
@pytest.mark.parametrize("absent", ["zero", "holders"])
def test_a_result_that_is_read_in_pieces_is_added_up_alike(absent, old):
    """In ledgers of 0.1.0 running statistics are among the weights."""
    problem, algorithm = Images(3), FedDropout(keep=0.5, absent=absent)
    state = algorithm.start(problem)
    result = trained(algorithm, problem, state, 2)
    small = state.parts.small
    shapes = {slot.name: slot.shape for slot in (small.weights if old else small.trained)}
    size = small.dim if old else small.parameters
    data = change(small, result)[:size].numpy().tobytes()
    exact = {name: each for name, each in result.exact.items() if name not in shapes}
    pieces = Streamed(shapes, lambda: iter([data[:10], data[10:80], data[80:]]))
    whole = algorithm.accumulate(
        algorithm.new_accumulator(state), state, Result(0, 0, result, 1), 3.0
    )
    streamed = dataclasses.replace(result, weights=pieces, exact=exact)
    parts = algorithm.accumulate(
        algorithm.new_accumulator(state), state, Result(0, 0, streamed, 1), 3.0
    )
    assert parts.total.equal(whole.total)


def test_many_results_take_no_more_memory_than_one(pair):
    algorithm = FedDropout(keep=0.5, absent="holders")
    gathered = algorithm.new_accumulator(pair)
    memory = gathered.total.data_ptr(), gathered.held.data_ptr()
    for index in range(500):
        assert (
            algorithm.accumulate(gathered, pair, Result(0, 0, sent(pair, 1, index % 20), 1), 1.0)
            is gathered
        )
    assert (gathered.total.data_ptr(), gathered.held.data_ptr()) == memory
    assert gathered.total[10:].tolist() == gathered.held[10:].tolist() == [500.0, 500.0]


# ---- states


def test_a_saved_state_goes_on_with_the_sub_models_of_its_version():
    problem, algorithm = Images(3), FedDropout(keep=0.5)
    state = algorithm.start(problem)
    for _ in range(2):
        results = [(trained(algorithm, problem, state, k), 1, 0) for k in range(3)]
        state = commit(algorithm, Rounds(), state, results)
    again = algorithm.load(problem, algorithm.save(state))
    assert again.version == state.version == 2
    assert again.weights.equal(state.weights)
    assert again.parts == state.parts
    for index in range(3):
        one, other = algorithm.task(state, index), algorithm.task(again, index)
        assert one.numbers == other.numbers
        assert all(one.weights[name].equal(other.weights[name]) for name in one.weights)


@pytest.mark.parametrize("numbers", [{}, {"version": -1}, {"version": "1"}, {"version": True}])
def test_what_is_no_state_is_not_loaded(numbers):
    algorithm = FedDropout()
    saved = dataclasses.replace(algorithm.save(algorithm.start(Hidden())), numbers=numbers)
    with pytest.raises(ResultError, match="expected version from 0 to"):
        algorithm.load(Hidden(), saved)
