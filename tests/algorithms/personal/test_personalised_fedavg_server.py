"""Jiang's personalised FedAvg at the server: two optimizers, what is refused, and what is saved."""

import dataclasses

import pytest
import torch
from torch import nn

from fedmq.algorithms.base import Result, Task
from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.personal.personalised_fedavg import PersonalisedFedAvg
from fedmq.algorithms.schedules import Buffered
from tests.algorithms.tiny import Normed, client, payload
from tests.algorithms.two_phases import FOREVER, Local, move, train

# ---- the server's optimizers


def by_torch(make, start, updates):
    """Return where a torch optimizer goes when it is given the updates as -gradients."""
    parameter = nn.Parameter(start.clone())
    optimizer = make([parameter])
    for update in updates:
        parameter.grad = -torch.as_tensor(update)
        optimizer.step()
    return parameter.detach()


def updates_of(state, count):
    rng = torch.Generator().manual_seed(5)
    return [torch.randn(state.layout.dim, generator=rng) * 0.1 for _ in range(count)]


def test_the_step_of_fedavg_is_sgd_with_momentum():
    algorithm = PersonalisedFedAvg(switch=FOREVER, server_lr=0.7, server_momentum=0.8)
    state = start = algorithm.start(Local())
    updates = updates_of(state, 4)
    for update in updates:
        state = move(algorithm, state, update)
    expected = by_torch(
        lambda each: torch.optim.SGD(each, lr=0.7, momentum=0.8), start.weights, updates
    )
    torch.testing.assert_close(state.weights, expected)


def test_the_step_of_reptile_is_adam_from_the_switch_on_without_what_was_before():
    algorithm = PersonalisedFedAvg(switch=2, reptile_lr=0.01, beta1=0.8, beta2=0.95)
    state = algorithm.start(Local())
    updates = updates_of(state, 6)
    for update in updates[:2]:
        state = move(algorithm, state, update)
    switched = state
    assert not any(each.any() for each in switched.moments.values())
    for update in updates[2:]:
        state = move(algorithm, state, update)
    expected = by_torch(
        lambda each: torch.optim.Adam(each, lr=0.01, betas=(0.8, 0.95)),
        switched.weights,
        updates[2:],
    )
    torch.testing.assert_close(state.weights, expected)
    assert state.version == 6


def test_plain_server_steps_are_fedavg():
    problem = Local()
    options = {"lr": 0.3, "epochs": 2, "batch_size": 5}
    one = PersonalisedFedAvg(switch=FOREVER, server_momentum=0.0, **options)
    other = FedAvg(momentum=0.0, **options)
    state, plain = one.start(problem), other.start(problem)
    for _ in range(3):
        result = train(one, problem, state)
        expected = other.train(Task(0, other.task(plain, 0)), client(problem)).payload
        gathered = one.accumulate(one.new_accumulator(state), state, Result(0, 0, result, 1), 12.0)
        state = one.commit(state, gathered, 12.0)
        gathered = other.accumulate(
            other.new_accumulator(plain), plain, Result(0, 0, expected, 1), 12.0
        )
        plain = other.commit(plain, gathered, 12.0)
    torch.testing.assert_close(state.weights, plain.weights)


@pytest.mark.parametrize("switch", [0, FOREVER])
def test_statistics_move_by_their_mean_whatever_the_optimizer(switch):
    """The last six of a BatchNorm's weights have no gradient."""
    algorithm = PersonalisedFedAvg(switch=switch, server_lr=0.5)
    state = algorithm.start(Normed())
    end = state.layout.parameters
    assert state.layout.dim - end == 6
    for _ in range(2):
        new = move(algorithm, state, 0.25)
        assert (new.weights - state.weights)[end:].tolist() == [0.25] * 6
        assert not torch.isclose(new.weights - state.weights, torch.tensor(0.25))[:end].any()
        state = new
    assert all(each.numel() == end for each in state.moments.values())


def test_a_version_stays_what_it_was():
    for switch in (0, FOREVER):
        algorithm = PersonalisedFedAvg(switch=switch)
        first = move(algorithm, algorithm.start(Local()), 0.5)
        weights = first.weights.clone()
        moments = {name: each.clone() for name, each in first.moments.items()}
        move(algorithm, first, -0.25)
        assert first.weights.equal(weights)
        assert all(first.moments[name].equal(each) for name, each in moments.items())


def test_in_a_buffer_a_late_update_is_discounted():
    algorithm = PersonalisedFedAvg(switch=FOREVER, server_momentum=0.0)
    state = algorithm.start(Local())
    new = move(algorithm, state, 0.5, Buffered(), staleness=3)
    torch.testing.assert_close(new.weights, state.weights + 0.25)


def test_a_stream_is_not_offered():
    """Its mixing rate would mean nothing: Adam's step does not grow with the update."""
    assert PersonalisedFedAvg.schedules == {"rounds", "buffered"}


# ---- results that cannot be used


@pytest.mark.parametrize(
    ("version", "phase", "expected"),
    [
        (1, "fedavg", "expected a result of phase 'reptile', got 'fedavg'"),
        (0, "reptile", "expected a result of phase 'fedavg', got 'reptile'"),
        (1, None, "expected a result of phase 'reptile', got None"),
        (1, ["reptile"], "expected a result of phase 'reptile', got"),
    ],
)
def test_a_result_of_the_other_phase_is_refused(version, phase, expected):
    algorithm = PersonalisedFedAvg(switch=1)
    state = algorithm.start(Local())
    if version:
        state = move(algorithm, state, 0.1)
    gathered = algorithm.new_accumulator(state)
    result = Result(0, 1, payload(state, 0.1, n=4, reply="update", phase=phase), 1)
    with pytest.raises(ResultError, match=expected.replace("(", r"\(")):
        algorithm.accumulate(gathered, state, result, 1.0)
    assert not gathered.total.any()


@pytest.mark.parametrize("switch", [0, FOREVER])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e35, -1e35])
def test_a_result_that_is_not_of_this_world_leaves_the_sum_as_it_was(switch, value):
    algorithm = PersonalisedFedAvg(switch=switch)
    phase = "fedavg" if switch else "reptile"
    state = algorithm.start(Local())
    gathered = algorithm.new_accumulator(state)
    good, bad = (payload(state, each, n=4, phase=phase) for each in (0.5, value))
    algorithm.accumulate(gathered, state, Result(0, 0, good, 1), 2.0)
    with pytest.raises(ResultError, match=r"NaN or infinite|as large as"):
        algorithm.accumulate(gathered, state, Result(0, 0, bad, 1), 2.0)
    assert gathered.total.tolist() == [1.0] * state.layout.dim


def test_the_largest_update_that_is_taken_leaves_adam_finite():
    algorithm = PersonalisedFedAvg(switch=0, reptile_lr=0.01)
    state = algorithm.start(Local())
    for update in (1e15, -1e15, 0.1):
        state = move(algorithm, state, update)
    assert state.weights.isfinite().all()
    assert all(each.isfinite().all() for each in state.moments.values())
    with pytest.raises(ResultError, match="as large as"):
        move(algorithm, state, 2e15)


# ---- states


@pytest.mark.slow
@pytest.mark.parametrize("versions", [0, 1, 2, 3, 5])
def test_a_saved_state_goes_on_to_the_bit(versions):
    problem, algorithm = Normed(), PersonalisedFedAvg(switch=2, steps=3, epochs=2, batch_size=2)

    def on(state, count):
        for _ in range(count):
            gathered = algorithm.new_accumulator(state)
            for index in range(2):
                result = train(algorithm, problem, state, index)
                algorithm.accumulate(gathered, state, Result(index, 0, result, 1), 1.0)
            state = algorithm.commit(state, gathered, 2.0)
        return state

    state = on(algorithm.start(problem), versions)
    again = algorithm.load(problem, algorithm.save(state))
    assert again.version == versions
    assert again.weights.equal(state.weights)
    one, other = on(state, 3), on(again, 3)
    assert one.weights.equal(other.weights)
    assert one.counters.equal(other.counters)
    assert all(one.moments[name].equal(other.moments[name]) for name in one.moments)


def damaged(saved):
    exact = dict(saved.exact)
    size = exact["server/first"].numel()
    for name in ("server/first", "server/second"):
        rest = {key: each for key, each in exact.items() if key != name}
        yield dataclasses.replace(saved, exact=rest), f"expected a tensor '{name}'"
        for each, message in (
            (torch.zeros(size - 1), rf"{name} as torch.float32 \[{size}\], got"),
            (torch.zeros(size, dtype=torch.float64), rf"{name} as torch.float32 \[{size}\], got"),
            (torch.full((size,), torch.nan), f"expected finite values of {name}"),
        ):
            yield dataclasses.replace(saved, exact={**exact, name: each}), message
    negative = {**exact, "server/second": torch.full((size,), -1.0)}
    yield dataclasses.replace(saved, exact=negative), "expected values of server/second"
    more = {**exact, "server/velocity": torch.zeros(size)}
    yield dataclasses.replace(saved, exact=more), "expected no tensor"
    for version in (-1, None, True, 1.0, 10**12):
        numbers = {"version": version}
        yield dataclasses.replace(saved, numbers=numbers), "expected version from 0 to"
    yield dataclasses.replace(saved, weights={}), "it is missing"


def test_a_state_of_something_else_is_refused():
    algorithm, problem = PersonalisedFedAvg(switch=0), Normed()
    saved = algorithm.save(move(algorithm, algorithm.start(problem), 0.5))
    algorithm.load(problem, saved)
    for wrong, message in damaged(saved):
        with pytest.raises(ResultError, match=message):
            algorithm.load(problem, wrong)


def test_the_optimizer_is_no_part_of_the_model():
    algorithm, problem = PersonalisedFedAvg(switch=0), Normed()
    state = algorithm.start(problem)
    assert set(algorithm.tensors(state)) == set(problem.model().state_dict())
