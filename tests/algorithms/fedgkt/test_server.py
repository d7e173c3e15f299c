"""FedGKT at the server: training, hostile results, checkpoints."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from fedmq.algorithms.base import Payload, Result
from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.fedgkt.algorithm import FedGKT
from fedmq.algorithms.fedgkt.networks import shuffled
from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.toolkit.flat_model import FlatModel
from tests.algorithms.bars import TINY, Bars, bits, commit, one_round, server_of, train

pytestmark = pytest.mark.slow


@pytest.fixture
def problem():
    return Bars(3)


# ---- the server


def test_the_server_s_logits_are_of_the_trained_network_in_eval_mode(problem):
    """The reference keeps those of each batch before its own step, in train mode."""
    algorithm = FedGKT(**TINY)
    state, _ = one_round(algorithm, problem, algorithm.start(problem))
    server = server_of(algorithm, state)
    for k in range(3):
        payload = algorithm.task(state, k)
        with torch.no_grad():
            expected = server(state.store.uploads[k].features[:])
        torch.testing.assert_close(payload.logits["logits"], expected)
        assert payload.logits["ids"].equal(state.store.uploads[k].ids)


def test_a_commit_trains_on_all_samples_with_the_edges_as_teachers(problem):
    """Step by step by torch's SGD, on the features of the uploads."""
    options = {"optimizer": "sgd", "momentum": 0.5, "alpha": 0.5, "temperature": 2.0}
    algorithm = FedGKT(**TINY, server_epochs=2, server_lr=0.01, **options)
    start = algorithm.start(problem)
    results = {k: train(algorithm, problem, start, k)[0] for k in range(3)}
    state = commit(algorithm, start, results)
    features, labels, logits = (
        torch.cat([getattr(each, group)[name] for each in results.values()])
        for group, name in (("features", "features"), ("features", "labels"), ("logits", "logits"))
    )
    module = server_of(algorithm, start).train()
    sgd = torch.optim.SGD(module.parameters(), 0.01, momentum=0.5, weight_decay=1e-4)
    for rows in shuffled(30, 60, 4, derive_rng(0, "fedgkt", 0)):
        z = module(features[rows])
        softened = (logits[rows] / 2).softmax(1)
        kl = F.kl_div((z / 2).log_softmax(1), softened, reduction="batchmean")
        sgd.zero_grad()
        (F.cross_entropy(z, labels[rows]) + 0.5 * 4 * kl).backward()
        sgd.step()
    assert state.server.steps == 16
    expected = FlatModel(module).weights
    torch.testing.assert_close(state.server.weights, expected, rtol=1e-3, atol=1e-4)


def test_distillation_is_switched_off_in_either_direction(problem):
    plain = FedGKT(**TINY, distil_server=False)
    start = plain.start(problem)
    results = {k: train(plain, problem, start, k)[0] for k in range(3)}
    nothing = commit(FedGKT(**TINY, alpha=0.0), start, results)
    assert commit(plain, start, results).server.weights.equal(nothing.server.weights)
    both = commit(FedGKT(**TINY), start, results)
    assert not both.server.weights.equal(nothing.server.weights)
    silent = FedGKT(**TINY, distil_edge=False)
    state = commit(silent, start, results)
    assert state.server.weights.equal(both.server.weights)
    assert silent.task(state, 0) == Payload()


def test_a_commit_is_the_same_whenever_and_leaves_the_version_before_it_alone(problem):
    algorithm = FedGKT(**TINY)
    start = algorithm.start(problem)
    state, local = one_round(algorithm, problem, start)
    results = {k: train(algorithm, problem, state, k, local[k])[0] for k in (0, 2)}
    before, rng = bits(algorithm.save(state)), torch.get_rng_state()
    one, other = (commit(algorithm, state, results) for _ in range(2))
    reverse = commit(algorithm, state, dict(reversed(results.items())))
    assert rng.equal(torch.get_rng_state())
    assert bits(algorithm.save(state)) == before
    assert bits(algorithm.save(one)) == bits(algorithm.save(other)) == bits(algorithm.save(reverse))
    assert len(start.store) == 0


def test_what_spills_to_files_is_trained_on_alike(problem):
    saved = []
    for memory_mb in (0, 1024):
        algorithm = FedGKT(**TINY, memory_mb=memory_mb)
        state, local = one_round(algorithm, problem, algorithm.start(problem))
        state, _ = one_round(algorithm, problem, state, local)
        assert all(
            each.features.in_memory == bool(memory_mb) for each in state.store.uploads.values()
        )
        saved.append(bits(algorithm.save(state)))
    assert saved[0] == saved[1]


def test_an_upload_takes_the_place_of_the_client_s_last_and_the_server_trains_on_all(problem):
    """Asynchronous: one client's upload makes a version, and that client is answered."""
    algorithm = FedGKT(**TINY)
    first, local = one_round(algorithm, problem, algorithm.start(problem))
    result, _ = train(algorithm, problem, first, 1, local[1])
    second = commit(algorithm, first, {1: result})
    assert len(second.store) == 30
    assert second.store.uploads[1].features[:].equal(result.features["features"])
    assert second.store.uploads[0] is first.store.uploads[0]
    assert second.answers[0] is first.answers[0]
    assert not second.answers[1].equal(first.answers[1])
    assert first.store.uploads[1].features is not second.store.uploads[1].features


@pytest.mark.parametrize(("effort", "steps"), [("fresh", 3), ("held", 8)])
def test_effort_is_by_what_came_or_by_what_is_held(problem, effort, steps):
    """Client 1 has 10 samples, all have 30; batches of 4."""
    algorithm = FedGKT(**TINY, effort=effort)
    first, local = one_round(algorithm, problem, algorithm.start(problem))
    assert first.server.steps == 8
    result, _ = train(algorithm, problem, first, 1, local[1])
    second = commit(algorithm, first, {1: result})
    assert second.server.steps == 8 + steps
    assert (second.answers[0] is first.answers[0]) == (effort == "fresh")


def test_what_comes_during_a_commit_counts_for_the_next_version(problem):
    """It is gathered beside the old state, and not lost."""
    algorithm = FedGKT(**TINY)
    start = algorithm.start(problem)
    results = {k: train(algorithm, problem, start, k)[0] for k in range(2)}
    gathered = algorithm.accumulate(
        algorithm.new_accumulator(start), start, Result(0, 0, results[0], 6), 1.0
    )
    meanwhile = algorithm.accumulate(
        algorithm.new_accumulator(start), start, Result(1, 0, results[1], 10), 1.0
    )
    state = algorithm.commit(start, gathered, 1.0)
    assert list(state.store.uploads) == [0]
    assert list(algorithm.commit(state, meanwhile, 1.0).store.uploads) == [0, 1]


# ---- hostile results


def hostile(good):
    """Yield (name, change to a good result of 6 samples or another n, what is said)."""
    features, logits = good.features, good.logits

    def of(group, **tensors):
        return {group: {**getattr(good, group), **tensors}}

    flat = torch.zeros(6, 8 * 16)
    huge, nan = (torch.full((6, 8, 4, 4), value) for value in (1e6, math.nan))
    ids = torch.arange(6)
    yield "no features", {"features": {}}, "expected features, ids, labels, got none"
    yield "no labels", {"features": {"features": flat, "ids": ids}}, "expected features, ids, lab"
    yield "no logits", {"logits": {}}, "expected logits, ids, got none"
    yield "weights", {"weights": {"w": flat}}, "expected no tensors"
    yield "exact", {"exact": {"test.labels": ids}}, "expected no tensors"
    yield "n", 5, "expected features as"
    yield "too many", 51, "expected 1 to 50 samples"
    yield "flat", of("features", features=flat), "expected features as"
    yield "half", of("features", features=features["features"].half()), "expected features as"
    yield "huge", of("features", features=huge), "expected features from -65504 to 65504"
    yield "nan", of("features", features=nan), "expected features from"
    one = features["features"].clone()
    one[3, 2, 1, 0] = math.nan
    yield "one nan", of("features", features=one), "expected features from"
    yield "inf", of("logits", logits=torch.full((6, 3), -math.inf)), "expected logits from"
    yield "wide", of("logits", logits=torch.zeros(6, 4)), "expected logits as"
    yield "label 3", of("features", labels=torch.full((6,), 3)), "expected labels from 0 to 2"
    yield "label -1", of("features", labels=torch.full((6,), -1)), "expected labels from 0 to 2"
    yield "float labels", of("features", labels=torch.zeros(6)), "expected labels as"
    yield "other ids", of("logits", ids=ids + 1), "logits of the same samples"
    for name, bad in (("twice", ids // 2), ("beyond", ids + 45), ("negative", ids - 1)):
        change = of("features", ids=bad) | of("logits", ids=bad)
        yield name, change, "expected ascending ids from 0 to 49"
    assert set(logits) == {"logits", "ids"}


def example():
    problem, algorithm = Bars(3), FedGKT(**TINY)
    state = algorithm.start(problem)
    return algorithm, state, train(algorithm, problem, state)[0]


HOSTILE = list(hostile(example()[2]))


@pytest.mark.parametrize("index", range(len(HOSTILE)), ids=[name for name, *_ in HOSTILE])
def test_a_result_that_cannot_be_used_is_refused_and_leaves_what_was_there(index):
    algorithm, state, good = example()
    gathered = algorithm.accumulate(
        algorithm.new_accumulator(state), state, Result(0, 0, good, 6), 1.0
    )
    kept = gathered.fresh[0]
    _, change, message = HOSTILE[index]
    bad, n = (good, change) if isinstance(change, int) else (dataclasses.replace(good, **change), 6)
    with pytest.raises(ResultError, match=message):
        algorithm.accumulate(gathered, state, Result(0, 0, bad, n), 1.0)
    assert gathered.fresh == {0: kept}


def test_the_largest_values_that_are_let_in_leave_the_server_finite(problem):
    algorithm, state, good = example()
    wild = torch.full((6, 8, 4, 4), 65504.0)
    wild[::2] = -65504.0
    features = {**good.features, "features": wild}
    logits = {**good.logits, "logits": torch.full((6, 3), 65504.0) * torch.tensor([1, -1, 0])}
    result = dataclasses.replace(good, features=features, logits=logits)
    for _ in range(3):
        state = commit(algorithm, state, {0: result})
    assert all(each.isfinite().all() for each in algorithm.tensors(state).values())
    assert state.answers[0].isfinite().all()


@pytest.mark.parametrize("test_features", [False, True])
def test_the_bound_on_a_result_is_that_of_the_largest_honest_one(problem, test_features):
    """With as many samples as may be; the tests here have 40."""
    options = {**TINY, "max_samples": 40, "test_features": test_features}
    algorithm = FedGKT(**options)
    problem.client = lambda index: problem.points(index, 40)
    state = algorithm.start(problem)
    result = train(algorithm, problem, state)[0]
    groups = (result.exact, result.features, result.logits)
    size = sum(each.nbytes for group in groups for each in group.values())
    # Test samples have no ids.
    assert size + test_features * 40 * 2 * 8 == algorithm.result_bytes(state)


# ---- checkpoints


@pytest.mark.parametrize("test_features", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_saved_state_goes_on_to_the_same_bits(problem, optimizer, test_features):
    algorithm = FedGKT(**TINY, optimizer=optimizer, test_features=test_features)
    state, local = one_round(algorithm, problem, algorithm.start(problem))
    saved = algorithm.save(state)
    loaded = algorithm.load(problem, saved)
    assert bits(algorithm.save(loaded)) == bits(saved)
    assert bits(algorithm.task(loaded, 1)) == bits(algorithm.task(state, 1))
    results = {k: train(algorithm, problem, state, k, local[k])[0] for k in (1, 2)}
    on, again = (algorithm.save(commit(algorithm, each, results)) for each in (state, loaded))
    assert bits(on) == bits(again)


def wrong(saved):
    """Yield changes to what was saved, and what is said."""
    exact = saved.exact
    yield {"numbers": {}}, "expected version"
    yield {"exact": {**exact, "more": torch.zeros(1)}}, "expected no tensor"
    yield {"exact": {**exact, "answers.7": torch.zeros(1, 3)}}, "an answer to a client"
    yield {"exact": {**exact, "answers.0": torch.zeros(1, 3)}}, "expected answers as"
    yield {"exact": {**exact, "server.weights": torch.zeros(3)}}, "expected weights as"
    yield {"exact": {**exact, "server.steps": torch.tensor([-1])}}, "expected values of steps"
    yield {"exact": {**exact, "store.0.labels": torch.full((6,), 9)}}, "expected labels"
    yield {"exact": {**exact, "store.0.ids": torch.zeros(6, dtype=torch.int64)}}, "ascending"
    moved = {name.replace("store.0.", "store.5."): each for name, each in exact.items()}
    yield {"exact": moved}, "clients 0 to 2"
    yield (
        {"exact": {name: each for name, each in exact.items() if "moments" not in name}},
        "moments",
    )


@pytest.mark.parametrize("index", range(10))
def test_what_is_no_state_is_refused(problem, index):
    algorithm = FedGKT(**TINY)
    state = commit(algorithm, algorithm.start(problem), {0: example()[2]})
    change, message = list(wrong(algorithm.save(state)))[index]
    with pytest.raises(ResultError, match=message):
        algorithm.load(problem, dataclasses.replace(algorithm.save(state), **change))
