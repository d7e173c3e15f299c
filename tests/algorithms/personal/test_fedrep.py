"""FedRep: the head on a frozen body, then the body under a frozen head; only the body travels."""

import dataclasses

import pytest
import torch

from fedmq.algorithms.base import Payload
from fedmq.algorithms.personal.fedrep import FedRep
from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.toolkit.sgd import batches
from fedmq.algorithms.toolkit.split_model import Split, scratch_split
from tests.algorithms.split_problems import (
    BODY,
    HEAD,
    Halves,
    Tracking,
    head_of,
    play,
    same,
    task_of,
    trained,
)
from tests.algorithms.tiny import client

HARD = {"momentum": 0.9, "weight_decay": 0.1}
"""What moves a parameter whose gradient is zero."""


def fitted(problem, part, epochs=2, **options):
    """Return all tensors of a model before and after a part of it was fitted."""
    algorithm = FedRep(head=options.pop("head", 1), batch_size=4, lr=0.1, **options)
    model = Split(problem, algorithm.head)
    before = {name: each.clone() for name, each in model.whole.module.state_dict().items()}
    torch.manual_seed(1)
    model.fit(part, problem.client(1), epochs, algorithm, client(problem, 1))
    return before, model.whole.module.state_dict()


# ---- frozen means frozen


@pytest.mark.parametrize(("part", "frozen"), [("head", "01"), ("body", "2")])
def test_frozen_is_bit_equal_also_under_momentum_and_weight_decay(part, frozen):
    """Zeroed gradients would not do: momentum and weight decay move what has none."""
    before, after = fitted(Halves(), part, **HARD)
    for name in before:
        assert torch.equal(before[name], after[name]) == (name[0] in frozen), name


def test_frozen_is_bit_equal_also_when_the_other_half_has_moved_before():
    """One momentum buffer over both phases would carry the first into the second."""
    problem = Halves()
    algorithm = FedRep(batch_size=2, **HARD)
    model, data, at = Split(problem, 1), problem.client(1), client(problem, 1)
    model.fit("head", data, 3, algorithm, at)
    model.fit("body", data, 3, algorithm, at)
    body = model.body_vectors().weights
    model.fit("head", data, 3, algorithm, at)
    assert torch.equal(model.body_vectors().weights, body)


@pytest.mark.parametrize(("part", "frozen"), [("head", "0123"), ("body", "4567")])
def test_what_is_frozen_keeps_its_running_statistics(part, frozen):
    """And what is trained does not."""
    before, after = fitted(Tracking(), part, head=3, **HARD)
    for name in before:
        assert torch.equal(before[name], after[name]) == (name[0] in frozen), name


def test_a_frozen_body_has_no_dropout():
    """The head is fitted to what the body says when it is evaluated, whatever torch draws."""
    problem, algorithm = Tracking(), FedRep(head=3)
    ends = []
    for seed in (1, 2):
        model = Split(problem, 3)
        torch.manual_seed(seed)
        model.fit("head", problem.client(1), 2, algorithm, client(problem, 1))
        ends.append(model.kept_tensors())
    assert same(*ends)


# ---- the two phases, against torch.optim.SGD


@pytest.mark.parametrize(
    "options", [{"momentum": 0.0}, HARD], ids=["plain", "momentum and weight decay"]
)
def test_a_task_is_head_epochs_then_body_epochs(options):
    problem = Halves()
    algorithm = FedRep(lr=0.1, head_epochs=3, epochs=2, batch_size=2, **options)
    result, kept = trained(algorithm, problem, 1, reply="model")
    module, data = problem.model(), problem.client(1)
    for layer, epochs, purpose in ((2, 3, "head batches"), (0, 2, "batches")):
        optimizer = torch.optim.SGD(module[layer].parameters(), lr=0.1, **options)
        for x, y in batches(data, 2, epochs, derive_rng(7, purpose)):
            module.zero_grad()
            problem.loss(module(x), y).backward()
            optimizer.step()
    expected = module.state_dict()
    for name in BODY:
        torch.testing.assert_close(result.weights[name], expected[name])
    for name in HEAD:
        torch.testing.assert_close(kept.exact[name], expected[name])


def test_an_update_is_the_body_less_the_one_that_came():
    problem, algorithm = Halves(), FedRep()
    state = algorithm.start(problem)
    update, _ = trained(algorithm, problem, 1)
    body, _ = trained(algorithm, problem, 1, reply="model")
    for name, before in algorithm.tensors(state).items():
        assert torch.equal(update.weights[name], body.weights[name] - before)
    assert update.numbers == {"reply": "update"}


def test_structured_updates_restrict_the_body_alone():
    """The uplink knows the names of what is sent; the head is trained without it."""
    problem, algorithm, seen = Halves(), FedRep(head_epochs=2, epochs=1), []

    def restrict(tensors):
        seen.append(set(tensors))
        tensors["0.weight"].zero_()

    at = dataclasses.replace(client(problem, 1), project=restrict)
    trained = algorithm.train(task_of(algorithm, algorithm.start(problem)), at)
    result, kept = trained.payload, trained.local_state
    assert seen == [set(BODY)]
    assert not result.weights["0.weight"].any()
    assert result.weights["0.bias"].any()
    assert not same(kept.exact, head_of(problem))


# ---- what travels, and what stays


@pytest.mark.parametrize("head", [1, 3])
def test_only_the_body_travels_down_and_up(head):
    problem, algorithm = Tracking(), FedRep(head=head)
    state = algorithm.start(problem)
    first = {1: 7, 3: 4}[head]
    body = {name for name in problem.model().state_dict() if int(name[0]) < first}
    result, kept = trained(algorithm, problem, 1)
    down = algorithm.task(state, 1)
    for sent in (down, result):
        assert set(sent.weights) | set(sent.exact) == body
        assert not sent.features
        assert not sent.logits
    assert set(kept.exact) == set(problem.model().state_dict()) - body
    assert set(algorithm.tensors(state)) == body


def test_the_bytes_are_those_of_the_body():
    """2 * 8 + 8 of 42 numbers."""
    problem, algorithm = Halves(), FedRep()
    result, _ = trained(algorithm, problem, 1)
    for sent in (algorithm.task(algorithm.start(problem), 0), result):
        assert sum(each.nbytes for each in sent.weights.values()) == 4 * 24
        assert not sent.exact


def test_averaging_all_keys_would_give_a_new_client_the_averaged_head():
    """A client that never trained starts with the initial head, to the bit."""
    problem, algorithm = Halves(4), FedRep(head_epochs=3, final_head_epochs=0)
    state, kept = play(algorithm, problem, 3)
    model = Split(problem, 1)
    model.load(algorithm.task(state, 3), None)
    assert same(model.kept_tensors(), head_of(problem))
    mean = torch.stack([each.exact["2.weight"] for each in kept.values()]).mean(dim=0)
    assert not torch.allclose(mean, head_of(problem)["2.weight"], atol=1e-3)


def test_a_client_goes_on_with_the_head_that_it_kept():
    problem, algorithm = Halves(), FedRep(head_epochs=1, epochs=1, lr=1e-6)
    head = {"2.weight": torch.full((2, 8), 0.5), "2.bias": torch.tensor([3.0, 4.0])}
    _, kept = trained(algorithm, problem, 1, Payload(exact=head))
    for name, before in head.items():
        torch.testing.assert_close(kept.exact[name], before, atol=1e-4, rtol=0)
        assert not torch.equal(kept.exact[name], before)


def test_one_clients_head_is_never_anothers():
    """Heads that alias one tensor would all be the last one that was trained."""
    problem, algorithm = Halves(3), FedRep()
    alone = [trained(algorithm, problem, index)[1].exact for index in range(3)]
    first = {name: each.clone() for name, each in alone[0].items()}
    trained(algorithm, problem, 2, Payload(exact=alone[0]))
    assert same(alone[0], first)
    assert same(trained(algorithm, problem, 0)[1].exact, first)
    assert not same(alone[0], alone[1])


# ---- evaluation


def test_a_client_is_evaluated_with_a_head_refitted_to_its_training_data():
    problem, algorithm = Halves(), FedRep(lr=0.1, momentum=0.0, final_head_epochs=3, batch_size=2)
    state, kept = play(algorithm, problem, 2)
    at = client(problem, 1, local=kept[1])
    found = algorithm.evaluate_client(task_of(algorithm, state), at)
    module, data = problem.model(), problem.client(1)
    module.load_state_dict({**algorithm.tensors(state), **kept[1].exact})
    test = problem.client_test(1)
    before = problem.metrics(module(test.x), test.y)["accuracy"]
    optimizer = torch.optim.SGD(module[2].parameters(), lr=0.1)
    for x, y in batches(data, 2, 3, derive_rng(7, "head batches")):
        module.zero_grad()
        problem.loss(module(x), y).backward()
        optimizer.step()
    expected = problem.metrics(module(test.x), test.y)
    assert found["accuracy_before"] == before
    assert found["accuracy"] == expected["accuracy"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


class OtherTest(Halves):
    def client_test(self, index):
        test = super().client_test(index)
        return Examples(test.x + 100, 1 - test.y)

    def test(self):
        raise AssertionError("nobody looks at the common test data")


def test_nothing_is_adapted_on_test_data():
    """Only the training part decides: with other test data, the refitted head is the same."""
    algorithm, heads = FedRep(final_head_epochs=2), []
    for problem in (Halves(), OtherTest()):
        state = algorithm.start(problem)
        algorithm.evaluate_client(task_of(algorithm, state), client(problem, 1))
        heads.append(scratch_split(problem, 1, "cpu").kept_tensors())
        assert not same(heads[-1], head_of(problem))
    assert same(*heads)


def test_an_evaluation_changes_neither_what_is_kept_nor_the_next_result():
    problem, algorithm = Tracking(), FedRep(head=3)
    state, kept = play(algorithm, problem, 1)
    before = {name: each.clone() for name, each in kept[1].exact.items()}
    first = trained(algorithm, problem, 1, kept[1])
    algorithm.evaluate_client(task_of(algorithm, state), client(problem, 1, local=kept[1]))
    assert same(kept[1].exact, before)
    again = trained(algorithm, problem, 1, kept[1])
    assert same(first[0].weights, again[0].weights)
    assert same(first[1].exact, again[1].exact)


def test_a_new_client_fits_a_head_to_the_final_body():
    problem, algorithm = Halves(3), FedRep(lr=0.3, final_head_epochs=30)
    state, _ = play(algorithm, problem, 5)
    new = client(problem, 7)
    found = algorithm.personalise(state, 5, new)
    assert found == algorithm.evaluate_client(task_of(algorithm, state, version=5), new)
    assert found["accuracy"] >= 0.8 > found["accuracy_before"]
