"""FedPer: body and head are trained together, the head stays."""

import pytest
import torch

from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.personal.fedper import FedPer
from fedmq.algorithms.personal.fedrep import FedRep
from tests.algorithms.split_problems import (
    BODY,
    HEAD,
    Halves,
    Tracking,
    head_of,
    play,
    same,
    task_of,
)
from tests.algorithms.tiny import client

OPTIONS = {"lr": 0.1, "epochs": 2, "batch_size": 4, "momentum": 0.5, "weight_decay": 0.1}


@pytest.mark.parametrize("problem", [Halves(), Tracking()], ids=["plain", "batch norm, dropout"])
def test_a_first_task_is_fedavgs_bit_for_bit_but_the_head_stays(problem):
    """Joint training is FedAvg's; what differs is what is sent."""
    per, avg = FedPer(**OPTIONS), FedAvg(**OPTIONS)
    at = client(problem, 1)
    trained = per.train(task_of(per, per.start(problem), "model"), at)
    result, kept = trained.payload, trained.local_state
    whole = avg.train(task_of(avg, avg.start(problem), "model"), at).payload
    expected = {**whole.weights, **whole.exact}
    assert same({**result.weights, **result.exact, **kept.exact}, expected)
    assert not set(kept.exact) & (set(result.weights) | set(result.exact))
    assert not torch.equal(kept.exact[f"{len(problem.model()) - 1}.weight"], torch.tensor(0.0))


def test_head_and_body_both_move_in_every_epoch():
    problem, algorithm = Halves(), FedPer(epochs=1)
    state = algorithm.start(problem)
    trained = algorithm.train(task_of(algorithm, state), client(problem, 1))
    result, kept = trained.payload, trained.local_state
    assert all(result.weights[name].any() for name in BODY)
    first = head_of(problem)
    assert all(not torch.equal(kept.exact[name], first[name]) for name in HEAD)


def test_heads_are_kept_apart_and_go_on_from_where_they_were():
    problem, algorithm = Halves(3), FedPer(**OPTIONS)
    state, kept = play(algorithm, problem, 2)
    heads = [each.exact for each in kept.values()]
    assert not any(same(heads[a], heads[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    task = task_of(algorithm, state)
    new = algorithm.train(task, client(problem, 1)).payload
    old = algorithm.train(task, client(problem, 1, local=kept[1])).payload
    assert not same(new.weights, old.weights)


def test_fedrep_and_fedper_share_the_same_body():
    """The same bytes travel; they differ in how a client trains."""
    problem = Halves()
    one, other = FedRep().start(problem), FedPer().start(problem)
    assert one.layout == other.layout
    assert torch.equal(one.weights, other.weights)


def test_without_finetuning_a_client_is_evaluated_as_it_was_left():
    problem, algorithm = Halves(), FedPer(finetune_epochs=0, lr=0.1)
    state, kept = play(algorithm, problem, 3)
    at = client(problem, 1, local=kept[1])
    module = problem.model()
    module.load_state_dict({**algorithm.tensors(state), **kept[1].exact})
    test = problem.client_test(1)
    expected = problem.metrics(module(test.x), test.y)
    found = algorithm.evaluate_client(task_of(algorithm, state), at)
    assert found == {**expected, "accuracy_before": expected["accuracy"]}


def test_finetuning_is_one_more_task_that_nobody_keeps():
    problem, algorithm = Halves(), FedPer(finetune_epochs=2, **OPTIONS)
    state, kept = play(algorithm, problem, 1)
    at = client(problem, 1, local=kept[1])
    before = {name: each.clone() for name, each in kept[1].exact.items()}
    found = algorithm.evaluate_client(task_of(algorithm, state), at)
    trained = algorithm.train(task_of(algorithm, state, "model"), at)
    result, head = trained.payload, trained.local_state
    module = problem.model()
    module.load_state_dict({**result.weights, **head.exact})
    test = problem.client_test(1)
    assert found["loss"] == problem.metrics(module(test.x), test.y)["loss"]
    assert same(kept[1].exact, before)


def test_a_state_is_saved_and_loaded_to_the_bit():
    problem, algorithm = Tracking(), FedPer()
    state, _ = play(algorithm, problem, 2)
    saved = algorithm.load(problem, algorithm.save(state))
    assert torch.equal(saved.weights, state.weights)
    assert torch.equal(saved.counters, state.counters)
