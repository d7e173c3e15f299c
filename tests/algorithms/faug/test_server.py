"""FAug at the server: what it refuses, what it saves, and that its seed decides."""

import dataclasses

import pytest
import torch

from fedmq.algorithms.base import Payload, Result
from fedmq.algorithms.errors import AlgorithmError, ResultError
from fedmq.algorithms.faug.algorithm import FAug
from tests.algorithms.augmenting import TINY, Run, Skewed

# ---- hostile results

SEEDS = {
    "features": torch.zeros(2, 1, 6, 6),
    "ids": torch.arange(2),
    "labels": torch.tensor([0, 1]),
}


def seeds(**changed):
    features = {name: each for name, each in {**SEEDS, **changed}.items() if each is not None}
    return Payload(numbers={"n": 5, "phase": "seeds"}, features=features)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (Payload(numbers={"n": 5}), "expected phase"),
        (Payload(numbers={"n": 5, "phase": "other"}), "expected phase"),
        (Payload({"w": torch.ones(1)}, numbers={"n": 5, "phase": "fill"}), "no tensors"),
        (dataclasses.replace(seeds(), weights={"w": torch.ones(1)}), "no tensors"),
        (seeds(labels=None), "features, ids and labels"),
        (seeds(labels=torch.tensor([0, 3])), "labels from 0 to 2"),
        (seeds(labels=torch.tensor([-1, 0])), "labels from 0 to 2"),
        (seeds(labels=torch.zeros(2)), "expected labels as"),
        (seeds(features=torch.zeros(2, 1, 5, 5)), "expected features as"),
        (seeds(features=torch.full((2, 1, 6, 6), float("nan"))), "pixels of at most"),
        (seeds(features=torch.full((2, 1, 6, 6), 1e9)), "pixels of at most"),
        (
            seeds(features=torch.zeros(6, 1, 6, 6), labels=torch.zeros(6, dtype=torch.int64)),
            "at most 5 seeds",
        ),
        (Payload(numbers={"n": 5, "phase": "then"}), "expected logits"),
    ],
)
def test_a_hostile_result_is_refused_and_nothing_of_it_stays(payload, reason):
    algorithm = FAug(**TINY)
    state = algorithm.start(Skewed(3))
    gathered = algorithm.new_accumulator(state)
    with pytest.raises(ResultError, match=reason):
        algorithm.accumulate(gathered, state, Result(0, 0, payload, 1), 1.0)
    assert gathered == algorithm.new_accumulator(state)


def test_seeds_that_come_too_late_change_nothing():
    run = Run(FAug(wait=0.6, **TINY), Skewed(3))
    run.round([0, 1])
    before = run.state
    gathered = run.algorithm.new_accumulator(before)
    run.algorithm.accumulate(gathered, before, Result(2, 1, seeds(), 1), 1.0)
    after = run.algorithm.commit(before, gathered, 1.0)
    assert after.gan is before.gan
    assert after.seeds == {}


# ---- state


@pytest.mark.slow
@pytest.mark.parametrize("then", ["fd", "fedavg"])
@pytest.mark.parametrize("script", [[], [[0, 1]], [[0, 1, 2]], [None] * 3])
def test_a_state_is_saved_and_restored_to_the_bit(then, script):
    run = Run(FAug(then=then, **TINY), Skewed(3))
    for devices in script:
        run.round(devices)
    saved = run.algorithm.save(run.state)
    run2 = Run(run.algorithm, run.problem)
    run2.state, run2.version = run.algorithm.load(run.problem, saved), run.version
    run2.locals = list(run.locals)
    again = run.algorithm.save(run2.state)
    assert again.numbers == saved.numbers
    for group in ("weights", "exact"):
        one, other = getattr(saved, group), getattr(again, group)
        assert list(one) == list(other)
        assert all(one[name].equal(other[name]) for name in one)
    run.rounds(2)
    run2.rounds(2)
    one, other = (run.algorithm.tensors(each.state) for each in (run, run2))
    assert list(one) == list(other)
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("name", ["given", "seeds.x", "seeds.sizes", "gan.labels"])
def test_a_damaged_state_is_refused(name):
    run = Run(FAug(**TINY), Skewed(3)).rounds(1)
    saved = run.algorithm.save(run.state)
    without = {key: each for key, each in saved.exact.items() if key != name}
    for exact in (without, {**without, name: torch.ones(7)}):
        with pytest.raises(ResultError, match="expected"):
            run.algorithm.load(run.problem, dataclasses.replace(saved, exact=exact))


def test_the_same_seed_makes_the_same_bytes():
    one, two = (Run(FAug(**TINY), Skewed(3)).rounds(3) for _ in range(2))
    other = Run(FAug(**{**TINY, "seed": 2}), Skewed(3)).rounds(3)
    for name, tensor in one.algorithm.tensors(one.state).items():
        assert two.algorithm.tensors(two.state)[name].equal(tensor)
    assert not other.state.gan.weights.equal(one.state.gan.weights)


def test_whose_seeds_come_first_does_not_matter():
    states = []
    for order in ([0, 1, 2], [2, 0, 1]):
        run = Run(FAug(**TINY), Skewed(3))
        run.round(order)
        states.append(run.state.gan.weights)
    assert states[0].equal(states[1])


def test_averaging_has_one_model_for_all():
    with pytest.raises(AlgorithmError, match="all devices have one model"):
        FAug(then="fedavg", models=("mlp",))
