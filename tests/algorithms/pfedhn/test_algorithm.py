"""pFedHN at its clients: what travels, what is trained, kept and measured."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from fedmq.algorithms.base import Task
from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.pfedhn.algorithm import PFedHN
from fedmq.algorithms.problems.image import ImageClassification
from fedmq.algorithms.schedules import Rounds
from fedmq.nodes.messages.payloads import RAW, pack
from tests.algorithms.hyper import (
    Counted,
    Local,
    OneLayer,
    SameTest,
    Tracked,
    Untestable,
    at,
    bits,
    commit,
    reference,
    sent,
    small,
    theta,
    trained,
)

# ---- what travels


def test_a_task_is_theta_of_the_client_and_differs_by_client():
    algorithm, problem = small(), Local(3)
    state = algorithm.start(problem)
    module = reference(state.net, state.phi)
    for k in range(3):
        expected = module(state.embeddings[k]).detach()
        torch.testing.assert_close(theta(algorithm.task(state, k)), expected)
        assert theta(algorithm.evaluation_task(state, k)).equal(theta(algorithm.task(state, k)))
    assert not theta(algorithm.task(state, 0)).equal(theta(algorithm.task(state, 1)))


@pytest.mark.parametrize("hidden", [6, 60])
def test_messages_are_4_d_bytes_each_way_whatever_the_size_of_phi(hidden):
    algorithm, problem = small(hidden=hidden), Local(3)
    state = algorithm.start(problem)
    result, _ = trained(algorithm, problem, state)
    for payload in (algorithm.task(state, 0), result):
        assert sum(each.size for each in pack(payload, RAW, 0).blobs) == 4 * 22
    assert algorithm.result_bytes(state) == 4 * 22
    assert len(state.phi) > 22 * hidden


def test_clients_send_how_their_model_changed_whatever_the_schedule_asks_for():
    algorithm, problem = small(), Local(2)
    state = algorithm.start(problem)
    assert algorithm.fixed_reply == "update"
    task = Task(0, algorithm.task(state, 1))
    one = algorithm.train(task, at(problem, 1)).payload
    other = algorithm.train(dataclasses.replace(task, reply="model"), at(problem, 1)).payload
    assert bits(one) == bits(other)
    assert one.numbers == {}


# ---- training at a client


@pytest.mark.parametrize("clip", [50.0, 0.05])
def test_local_steps_are_those_of_torch(clip):
    """SGD with momentum and weight decay on clipped gradients, by torch.optim."""
    algorithm = small(batches=5, batch_size=100, clip=clip, lr=0.1, weight_decay=0.01)
    problem = Local(2)
    state = algorithm.start(problem)
    result, local = trained(algorithm, problem, state, 1)
    module, data = problem.model(), problem.client(1)
    before = algorithm.task(state, 1).weights
    module.load_state_dict(before)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        problem.loss(module(data.x), data.y).backward()
        nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    after = module.state_dict()
    for name, change in result.weights.items():
        torch.testing.assert_close(change, after[name] - before[name], rtol=1e-4, atol=1e-5)
    assert local is None


def test_k_batches_are_successive_ones_of_shuffled_epochs_not_k_random_first_ones(monkeypatch):
    """Seven batches of four of twelve examples: two whole epochs, and one batch of a third."""
    problem = Counted(2)
    algorithm = small(batches=7, batch_size=4)
    state = algorithm.start(problem)
    seen = []
    loss = problem.loss
    monkeypatch.setattr(problem, "loss", lambda out, y: seen.append(len(y)) or loss(out, y))
    batches = []
    monkeypatch.setattr(
        nn.Sequential,
        "forward",
        lambda self, x: batches.append(x[:, 0].int().tolist()) or self[2](self[1](self[0](x))),
    )
    trained(algorithm, problem, state)
    epochs = [[*itertools.chain(*batches[start : start + 3])] for start in (0, 3)]
    assert seen == [4] * 7
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert len(set(batches[6])) == 4


def test_a_client_with_less_than_a_batch_still_takes_k_steps():
    problem = Local(2)
    algorithm = small(batches=6, batch_size=64, weight_decay=0.0, momentum=0.0, lr=1e-3)
    state = algorithm.start(problem)
    six, _ = trained(algorithm, problem, state)
    one, _ = trained(dataclasses.replace(algorithm, batches=1), problem, state)
    assert 5 < theta(six).norm() / theta(one).norm() < 7


def test_the_test_data_are_never_touched_while_it_trains():
    problem = Untestable(2)
    for algorithm in (small(), small(personal_classifier=True)):
        state = algorithm.start(problem)
        result, _ = trained(algorithm, problem, state)
        commit(algorithm, Rounds(), state, [(0, result, 2, 0)])


def test_two_class_clients_have_two_classes_and_no_share_is_left_undealt():
    """The public code cuts one share too many of each class, and may deal a class twice."""
    problem = ImageClassification("mnist-mini", "mlp", 50, "classes(2)", 3)
    hands = [problem.client(k).y for k in range(50)]
    assert all(len(hand.unique()) == 2 for hand in hands)
    assert sum(map(len, hands)) == 5000


def test_the_same_task_and_seed_give_the_same_bytes_and_another_seed_others():
    for options in ({}, {"personal_classifier": True}):
        algorithm, problem = small(**options), Tracked(2)
        state = algorithm.start(problem)
        first, again, other = (trained(algorithm, problem, state, 1, s)[0] for s in (7, 7, 8))
        assert bits(first) == bits(again)
        assert bits(first) != bits(other)


# ---- the classifier that stays


def test_a_personal_classifier_never_travels():
    problem, algorithm = Tracked(2), small(personal_classifier=True)
    state = algorithm.start(problem)
    result, local = trained(algorithm, problem, state)
    kept = {"4.weight", "4.bias"}
    names = {"0.weight", "1.weight", "1.bias", "3.weight", "3.bias"}
    tracked = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    task = algorithm.task(state, 0)
    assert set(task.weights) == set(result.weights) == names
    assert set(task.exact) == {"0.bias"} | tracked
    assert set(result.exact) == tracked  # the bias is frozen
    assert set(local.exact) == kept | {f"momentum.{name}" for name in kept}
    assert state.partition.theta == 8 + 4 + 4 + 12 + 3


def test_a_personal_classifier_starts_as_the_problems_and_goes_on_with_its_momentum():
    """Two tasks of one step each, on the whole client: by torch, one optimizer for both."""
    problem = Local(2)
    algorithm = small(personal_classifier=True, batches=1, batch_size=100, lr=0.1)
    state = algorithm.start(problem)
    module, data = problem.model(), problem.client(1)
    own = torch.optim.SGD(module[2].parameters(), lr=0.1, momentum=0.9, weight_decay=5e-5)
    local = None
    for _ in range(3):
        module.load_state_dict(algorithm.task(state, 1).weights, strict=False)
        module.zero_grad()
        problem.loss(module(data.x), data.y).backward()
        own.step()
        _, local = trained(algorithm, problem, state, 1, local=local)
        torch.testing.assert_close(local.exact["2.weight"], module[2].weight.data)
        buffer = own.state[module[2].weight]["momentum_buffer"]
        torch.testing.assert_close(local.exact["momentum.2.weight"], buffer)


def test_with_a_personal_classifier_the_hypernetwork_learns_faster():
    assert PFedHN()._server_lr == 0.01
    assert PFedHN(personal_classifier=True)._server_lr == 0.05
    assert PFedHN(personal_classifier=True, server_lr=0.2)._server_lr == 0.2


def test_a_model_of_one_layer_has_nothing_to_send_beside_its_classifier():
    assert small().start(OneLayer(2)).partition.theta == 6
    with pytest.raises(ProblemError, match="more than one trained layer"):
        small(personal_classifier=True).start(OneLayer(2))


# ---- evaluation, and clients that never took part


@pytest.mark.parametrize("personal", [False, True])
def test_a_client_is_measured_on_its_own_test_data_with_what_it_keeps(personal):
    problem, algorithm = Local(2), small(personal_classifier=personal)
    state = algorithm.start(problem)
    assert algorithm.evaluated_by == "clients"
    local = None
    if personal:
        _, local = trained(algorithm, problem, state, 1)
        before = bits(local)
    found = algorithm.evaluate_client(
        Task(0, algorithm.evaluation_task(state, 1)), at(problem, 1, local=local)
    )
    module = problem.model()
    module.load_state_dict({**algorithm.task(state, 1).weights}, strict=False)
    if personal:
        kept = {name: each for name, each in local.exact.items() if "momentum" not in name}
        module.load_state_dict(kept, strict=False)
        assert bits(local) == before
    test = problem.client_test(1)
    assert found == pytest.approx(problem.metrics(module(test.x), test.y))


@pytest.mark.slow
@pytest.mark.parametrize("personal", [False, True])
def test_a_new_client_finds_its_embedding_with_phi_frozen(personal):
    problem = SameTest(2)
    algorithm = small(personal_classifier=personal, new_rounds=30, new_lr=0.5, batches=5, lr=0.05)
    state = algorithm.start(problem)
    state = commit(algorithm, Rounds(), state, [(0, sent(state, 0.1), 1, 0)])
    before = bits(algorithm.save(state))
    new = at(problem, 2)
    found = algorithm.personalise(state, 1, new)
    assert bits(algorithm.save(state)) == before
    assert found == algorithm.personalise(state, 1, new)
    unmoved = dataclasses.replace(algorithm, new_rounds=0).personalise(state, 1, new)
    assert unmoved == algorithm.evaluate_client(Task(1, algorithm.task(state, 2)), new)
    assert found["loss"] < unmoved["loss"]


def test_a_new_client_starts_from_the_mean_of_the_trained_embeddings():
    problem, algorithm = Local(3), small()
    state = algorithm.start(problem)
    mean = state.net.theta(state.phi, state.embeddings.mean(dim=0))
    assert theta(algorithm.task(state, 3)).equal(mean)
    results = [(k, sent(state, 0.1), 1, 0) for k in (0, 2)]
    state = commit(algorithm, Rounds(), state, results)
    mean = state.net.theta(state.phi, state.embeddings[[0, 2]].mean(dim=0))
    assert theta(algorithm.task(state, 3)).equal(mean)


def test_structured_updates_restrict_the_gradient_of_what_travels():
    problem = Local(2)
    algorithm = small(personal_classifier=True, weight_decay=0.0)
    state = algorithm.start(problem)

    def no_bias(gradient):
        assert list(gradient) == ["0.weight", "0.bias"]
        gradient["0.bias"].zero_()

    client = dataclasses.replace(at(problem, 1), project=no_bias)
    trained = algorithm.train(Task(0, algorithm.task(state, 1)), client)
    result, local = trained.payload, trained.local_state
    assert not result.weights["0.bias"].any()
    assert result.weights["0.weight"].any()
    assert local.exact["momentum.2.weight"].any()
