"""Jiang's personalised FedAvg: two phases, two server optimizers, and fine-tuning."""

import dataclasses
import random

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from fedmq.algorithms.base import Result, Task
from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.fedavg import FedAvg, batches
from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.reptile import PersonalisedFedAvg
from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.schedules import Buffered, Rounds
from tests.algorithms.tiny import Dropping, Normed, Tiny, client, payload

FOREVER = 10**9


class Local(Tiny):
    """Clients have test points of their own, and a hidden layer."""

    def module(self):
        return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2))

    def client(self, index):
        return self.points(100 + index, 12)

    def client_test(self, index):
        return self.points(500 + index, 20)


class Halves(Tiny):
    """A linear model, squared error, and numbers so round that no float32 sum of them rounds."""

    def module(self):
        module = nn.Linear(2, 1, bias=False)
        module.weight.data = torch.tensor([[1.0, -2.0]])
        return module

    def client(self, index):
        x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 1.0]])
        return Examples(x, torch.tensor([1, 0, 1, -1]))

    def loss(self, outputs, y):
        return (outputs[:, 0] - y).square().sum() / 4


def train(algorithm, problem, state, index=0, seed=7, local=None):
    task = Task(state.version, algorithm.task(state, index), "update")
    result, kept = algorithm.train(task, client(problem, index, seed, local))
    assert kept is None
    return result


def vector(state, result):
    return state.layout.flatten(result.weights)


def move(algorithm, state, update, schedule=None, staleness=0):
    """Return the version after one result, all of one number or a vector."""
    phase = "fedavg" if state.version < algorithm.switch else "reptile"
    result = Result(0, staleness, payload(state, update, n=4, reply="update", phase=phase))
    schedule = schedule or Rounds()
    weight = schedule.weight(4, staleness)
    gathered = algorithm.absorb(algorithm.gather(state), state, result, weight)
    return algorithm.commit(state, gathered, schedule.divisor(weight, 1))


# ---- the identity that the paper starts from


def point(problem, w, batch):
    """Return the gradient of the mean loss at w, by autograd."""
    w = w.detach().requires_grad_()
    outputs = batch.x @ w.view(-1, 1)
    return torch.autograd.grad(problem.loss(outputs, batch.y), w)[0]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_k_steps_are_the_fedsgd_gradient_and_the_fomaml_gradients_of_1_to_k_minus_1(steps):
    """To the bit. FOMAML(j): the gradient at what j steps of adaptation make of w."""
    problem = Halves()
    algorithm = PersonalisedFedAvg(switch=0, steps=steps, lr=0.5, batch_size=None)
    state = algorithm.start(problem)
    batch = problem.client(0)

    def adapted(j):
        w = state.weights.clone()
        for _ in range(j):
            w = w - 0.5 * point(problem, w, batch)
        return w

    fedsgd = point(problem, state.weights, batch)
    fomaml = [point(problem, adapted(j), batch) for j in range(1, steps)]
    found = vector(state, train(algorithm, problem, state)) / -0.5
    assert found.equal(fedsgd + sum(fomaml))
    assert all(each.any() for each in [fedsgd, *fomaml])


def test_each_of_the_k_steps_is_on_a_mini_batch_of_its_own_over_several_epochs():
    """12 examples, batches of 5: 5, 5, 2, and on from a new order."""
    problem = Local()
    algorithm = PersonalisedFedAvg(switch=0, steps=5, lr=0.3, batch_size=5)
    state = algorithm.start(problem)
    module, data = problem.model(), problem.client(0)
    for x, y in list(batches(data, 5, 2, derive_rng(7, "batches")))[:5]:
        layers = list(module.parameters())
        found = torch.autograd.grad(problem.loss(module(x), y), layers)
        with torch.no_grad():
            for layer, each in zip(layers, found, strict=True):
                layer.sub_(0.3 * each)
    expected = torch.cat([each.detach().reshape(-1) for each in module.parameters()])
    result = train(algorithm, problem, state)
    torch.testing.assert_close(state.weights + vector(state, result), expected)
    assert result.numbers == {"n": 25, "reply": "update", "phase": "reptile"}


def test_before_the_switch_clients_do_fedavgs_epochs():
    problem = Local()
    algorithm = PersonalisedFedAvg(switch=1, epochs=3, lr=0.3, batch_size=5)
    state = algorithm.start(problem)
    plain = FedAvg(lr=0.3, epochs=3, batch_size=5)
    expected, _ = plain.train(Task(0, plain.task(plain.start(problem), 0)), client(problem))
    result = train(algorithm, problem, state)
    assert vector(state, result).equal(vector(state, expected))
    assert result.numbers == {"n": 12, "reply": "update", "phase": "fedavg"}


@pytest.mark.parametrize("switch", [0, 1])
@pytest.mark.parametrize("problem", [Local(), Normed(), Dropping()])
def test_the_same_seed_gives_the_same_bytes_and_leaves_torch_alone(problem, switch):
    algorithm = PersonalisedFedAvg(switch=switch, batch_size=2, steps=4, epochs=2)
    state, before = algorithm.start(problem), torch.get_rng_state()
    one, other = (vector(state, train(algorithm, problem, state, 1)) for _ in range(2))
    assert one.numpy().tobytes() == other.numpy().tobytes()
    assert not one.equal(vector(state, train(algorithm, problem, state, 1, seed=8)))
    assert torch.get_rng_state().equal(before)


def test_what_the_uplink_cannot_send_is_left_out_of_each_of_the_k_steps():
    problem, algorithm = Local(), PersonalisedFedAvg(switch=0, batch_size=5)
    state = algorithm.start(problem)
    at = dataclasses.replace(client(problem), restrict=lambda tensors: tensors["2.bias"].zero_())
    result, _ = algorithm.train(Task(0, algorithm.task(state, 0)), at)
    assert not result.weights["2.bias"].any()
    assert result.weights["0.weight"].all()


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
    other = FedAvg(**options)
    state, plain = one.start(problem), other.start(problem)
    for _ in range(3):
        result = train(one, problem, state)
        expected, _ = other.train(Task(0, other.task(plain, 0)), client(problem))
        gathered = one.absorb(one.gather(state), state, Result(0, 0, result), 12.0)
        state = one.commit(state, gathered, 12.0)
        gathered = other.absorb(other.gather(plain), plain, Result(0, 0, expected), 12.0)
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
    gathered = algorithm.gather(state)
    result = Result(0, 1, payload(state, 0.1, n=4, reply="update", phase=phase))
    with pytest.raises(ResultError, match=expected.replace("(", r"\(")):
        algorithm.absorb(gathered, state, result, 1.0)
    assert not gathered.total.any()


@pytest.mark.parametrize("switch", [0, FOREVER])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e35, -1e35])
def test_a_result_that_is_not_of_this_world_leaves_the_sum_as_it_was(switch, value):
    algorithm = PersonalisedFedAvg(switch=switch)
    phase = "fedavg" if switch else "reptile"
    state = algorithm.start(Local())
    gathered = algorithm.gather(state)
    good, bad = (payload(state, each, n=4, phase=phase) for each in (0.5, value))
    algorithm.absorb(gathered, state, Result(0, 0, good), 2.0)
    with pytest.raises(ResultError, match=r"NaN or infinite|as large as"):
        algorithm.absorb(gathered, state, Result(0, 0, bad), 2.0)
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


@pytest.mark.parametrize("versions", [0, 1, 2, 3, 5])
def test_a_saved_state_goes_on_to_the_bit(versions):
    problem, algorithm = Normed(), PersonalisedFedAvg(switch=2, steps=3, epochs=2, batch_size=2)

    def on(state, count):
        for _ in range(count):
            gathered = algorithm.gather(state)
            for index in range(2):
                result = train(algorithm, problem, state, index)
                algorithm.absorb(gathered, state, Result(index, 0, result), 1.0)
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
        yield dataclasses.replace(saved, exact=rest), f"expected '{name[7:]}'"
        for each in (
            torch.zeros(size - 1),
            torch.zeros(size, dtype=torch.float64),
            torch.full((size,), torch.nan),
        ):
            yield dataclasses.replace(saved, exact={**exact, name: each}), f"{size} finite float32"
    negative = {**exact, "server/second": torch.full((size,), -1.0)}
    yield dataclasses.replace(saved, exact=negative), "expected 'second'"
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


# ---- evaluation


def evaluated(algorithm, problem, index=0, seed=3, state=None):
    state = algorithm.start(problem) if state is None else state
    task = Task(state.version, algorithm.examined(state, index))
    return algorithm.evaluate_client(task, client(problem, index, seed))


@pytest.mark.parametrize("switch", [0, FOREVER])
def test_clients_fine_tune_with_the_optimizer_and_the_rate_of_training(switch):
    problem = Local()
    algorithm = PersonalisedFedAvg(switch=switch, lr=0.4, batch_size=5, personal_epochs=3)
    metrics = evaluated(algorithm, problem)
    plain = FedAvg(lr=0.4, epochs=3, batch_size=5)
    start = plain.start(problem)
    result, _ = plain.train(Task(0, plain.task(start, 0), "model"), client(problem, 0, 3))
    module, test = problem.model(), problem.client_test(0)
    before = problem.loss(module(test.x), test.y).item()
    module.load_state_dict(result.weights)
    assert metrics["loss_before"] == pytest.approx(before)
    assert metrics["loss"] == pytest.approx(problem.loss(module(test.x), test.y).item())
    assert set(metrics) == {"accuracy", "loss", "accuracy_before", "loss_before"}
    assert algorithm.evaluated == "clients"


def test_fine_tuning_never_sees_test_examples():
    class Mislabelled(Local):
        def client_test(self, index):
            points = super().client_test(index)
            return Examples(points.x, 1 - points.y)

    algorithm = PersonalisedFedAvg(lr=0.4)
    right, wrong = evaluated(algorithm, Local()), evaluated(algorithm, Mislabelled())
    assert right["accuracy"] + wrong["accuracy"] == pytest.approx(1.0)


def test_evaluation_changes_nothing():
    problem, algorithm = Local(), PersonalisedFedAvg(lr=0.4, switch=0)
    state = algorithm.start(problem)
    saved = state.weights.clone()
    one = evaluated(algorithm, problem, state=state)
    assert state.weights.equal(saved)
    assert evaluated(algorithm, problem, state=state) == one


def test_a_client_that_never_trained_fine_tunes_from_the_final_state():
    problem, algorithm = Local(), PersonalisedFedAvg(lr=0.4)
    state = move(algorithm, algorithm.start(problem), 0.1)
    metrics = algorithm.personalise(state, 1, client(problem, 1, 3))
    assert metrics == evaluated(algorithm, problem, 1, 3, state)


def test_both_phases_learn():
    problem = Local(4)
    algorithm = PersonalisedFedAvg(
        switch=5, lr=0.2, epochs=2, batch_size=4, server_momentum=0.0, reptile_lr=0.05
    )
    state = algorithm.start(problem)
    losses = []
    rng = random.Random(1)  # noqa: S311 - a cohort, not a secret
    for _ in range(12):
        cohort = rng.sample(range(4), 2)
        gathered = algorithm.gather(state)
        for index in cohort:
            result = train(algorithm, problem, state, index)
            algorithm.absorb(gathered, state, Result(index, 0, result), 1.0)
        state = algorithm.commit(state, gathered, 2.0)
        losses.append(evaluated(algorithm, problem, state=state)["loss_before"])
    assert losses[4] < 0.6 * losses[0]
    assert losses[-1] < 0.6 * losses[4]


@pytest.mark.parametrize("key", ["momentum", "weight_decay"])
def test_the_clients_sgd_is_plain(key):
    with pytest.raises(ValidationError, match="less than or equal to 0"):
        TypeAdapter(PersonalisedFedAvg).validate_python({key: 0.1})
