"""FedGKT at the client: the objective, what is trained and sent, and evaluation."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from fedmq.algorithms.base import Client, Payload, Task
from fedmq.algorithms.errors import ProblemError, ResultError
from fedmq.algorithms.fedgkt.algorithm import FedGKT
from fedmq.algorithms.fedgkt.mutual_training import Batch, Objective, Optimizer, fit
from fedmq.algorithms.fedgkt.networks import shuffled, teacher_of
from fedmq.algorithms.problems.resnets import EDGES, initialised
from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.toolkit.flat_model import FlatModel
from tests.algorithms.bars import TINY, Bars, bits, commit, edge_with, one_round, server_of, train


@pytest.fixture
def problem():
    return Bars(3)


# ---- the objective and the optimizers


def test_the_loss_is_ce_plus_alpha_t_squared_kl_of_the_teacher_from_the_student():
    """In plain sums, and not with alpha on the cross-entropy or KL the other way round."""
    rng = torch.Generator().manual_seed(0)
    z, t = (torch.randn(5, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    y = torch.tensor([0, 2, 1, 1, 0])
    alpha, heat = 0.7, 3.0
    expected = 0.0
    for row in range(5):
        expected -= z[row].log_softmax(0)[y[row]].item()
        p, q = (t[row] / heat).softmax(0), (z[row] / heat).softmax(0)
        expected += (
            alpha
            * heat**2
            * sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
        )
    loss = Objective(alpha, heat).loss(z, Batch(torch.zeros(5), y, t))
    assert loss.item() == pytest.approx(expected / 5, rel=1e-12)


def test_the_gradient_of_the_second_part_is_t_times_the_difference_of_the_softened():
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    t, y = torch.eye(4, 3), torch.tensor([0, 1, 2, 0])
    objective = Objective(2.0, 3.0)
    loss = objective.loss(z, Batch(z, y, t)) - F.cross_entropy(z, y)
    (gradient,) = torch.autograd.grad(loss, z)
    expected = 2.0 * 3.0 * ((z / 3).softmax(1) - (t / 3).softmax(1)) / 4
    torch.testing.assert_close(gradient, expected)


def test_samples_without_a_teacher_count_nothing_in_the_second_part():
    z, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0])
    t = torch.eye(4, 3)
    objective, plain = Objective(1.0, 2.0), F.cross_entropy(z, y)
    unsaid = torch.full((4, 3), torch.nan)
    assert objective.loss(z, Batch(z, y, unsaid)).equal(plain)
    half = torch.cat([t[:2], unsaid[2:]])
    first, second = (
        F.kl_div((z[k] / 2).log_softmax(0), (t[k] / 2).softmax(0), reduction="sum") for k in (0, 1)
    )
    torch.testing.assert_close(objective.loss(z, Batch(z, y, half)), plain + first + second)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_optimizers_are_torch_s_and_go_on_where_they_were(kind):
    """Adam with amsgrad, as in the paper's code; the second half starts from what was kept."""
    problem = Bars(1)
    data = problem.points(1, 32)
    batches = [Batch(data.x[k : k + 4], data.y[k : k + 4]) for k in range(0, 32, 4)]
    optimizer = Optimizer(kind, 0.01, 0.9, 1e-2)
    model = FlatModel(initialised(EDGES["tiny"], 3, problem.shape, 3))
    trained = optimizer.first(model)
    for half in (batches[:4], batches[4:]):
        trained = fit(model, trained, optimizer, Objective(1.0, 3.0), half)
    module = initialised(EDGES["tiny"], 3, problem.shape, 3)
    theirs = (
        torch.optim.Adam(module.parameters(), 0.01, weight_decay=1e-2, amsgrad=True)
        if kind == "adam"
        else torch.optim.SGD(module.parameters(), 0.01, momentum=0.9, weight_decay=1e-2)
    )
    for batch in batches:
        theirs.zero_grad()
        F.cross_entropy(module(batch.x), batch.y).backward()
        theirs.step()
    expected = FlatModel(module)
    assert trained.steps == 8
    torch.testing.assert_close(trained.weights, expected.weights, rtol=1e-4, atol=1e-5)
    assert trained.counters.equal(expected.read_counters())


def test_each_pass_has_a_new_order_and_no_sample_twice():
    found = list(shuffled(10, 25, 4, derive_rng(0, "test")))
    assert [len(each) for each in found] == [4, 4, 2, 4, 4, 2, 5]
    passes = [[*found[k], *found[k + 1], *found[k + 2]] for k in (0, 3)]
    assert all(sorted(each) == list(range(10)) for each in passes)
    assert passes[0] != passes[1]


@pytest.mark.parametrize(("n", "samples", "size"), [(10, 21, 4), (9, 18, 4), (3, 4, 3), (1, 3, 2)])
def test_no_batch_is_of_one_sample_where_there_are_more(n, samples, size):
    """Neither the last one of a pass, nor a last pass of one sample."""
    lengths = [len(each) for each in shuffled(n, samples, size, derive_rng(0, "test"))]
    assert sum(lengths) == samples
    assert min(lengths) > 1 or n == 1


# ---- clients


def test_logits_are_keyed_by_sample_id_not_by_batch_index(problem):
    """The reference pairs batch k with the logits of the batch that was k-th before shuffling."""
    algorithm = FedGKT(**TINY, epochs=2)
    state, local = one_round(algorithm, problem, algorithm.start(problem))
    payload = algorithm.task(state, 1)
    ids, logits = payload.logits["ids"], payload.logits["logits"]
    order = torch.tensor([3, 9, 1, 0, 2, 8, 4, 6, 7, 5])
    moved = Payload(logits={"ids": ids[order], "logits": logits[order]})
    mixed = Payload(logits={"ids": ids, "logits": logits[order]})
    expected = train(algorithm, problem, state, 1, local[1], payload=payload)
    assert bits(train(algorithm, problem, state, 1, local[1], payload=moved)[0]) == bits(
        expected[0]
    )
    assert bits(train(algorithm, problem, state, 1, local[1], payload=mixed)[0]) != bits(
        expected[0]
    )
    assert teacher_of(moved.logits, 10, 3).equal(logits)


def test_the_first_round_is_cross_entropy_alone(problem):
    algorithm, without = FedGKT(**TINY), FedGKT(**TINY, alpha=0.0)
    start = algorithm.start(problem)
    assert algorithm.task(start, 0) == Payload()
    first = bits(train(algorithm, problem, start)[0])
    assert first == bits(train(without, problem, start)[0])
    state, local = one_round(algorithm, problem, start)
    second = bits(train(algorithm, problem, state, 0, local[0])[0])
    assert second != bits(train(without, problem, state, 0, local[0])[0])


def test_clients_do_train(problem):
    """The current example of the reference switches it off by mistake."""
    algorithm = FedGKT(**TINY)
    state = algorithm.start(problem)
    first = algorithm._edge(problem.shape, 3, "cpu").weights
    _, local = train(algorithm, problem, state)
    assert not local.exact["weights"].equal(first)
    assert local.exact["steps"].item() == 2


def test_all_edges_begin_alike_from_random_values_not_trained_in_one_place():
    algorithm = FedGKT(**TINY, seed=4)
    one, other = (algorithm._edge((1, 8, 8), 3, "cpu").weights for _ in range(2))
    assert one.equal(other)
    assert not one.equal(FedGKT(**TINY, seed=5)._edge((1, 8, 8), 3, "cpu").weights)


def test_an_edge_and_its_optimizer_go_on_from_task_to_task(problem):
    """Two tasks of one epoch, and moments that are neither lost nor sent."""
    algorithm = FedGKT(**TINY)
    state = algorithm.start(problem)
    result, local = train(algorithm, problem, state)
    _, second = train(algorithm, problem, state, local=local)
    forgetful = Payload(exact={**local.exact, "moments": torch.zeros_like(local.exact["moments"])})
    _, without = train(algorithm, problem, state, local=forgetful)
    assert second.exact["steps"].item() == 4
    assert not second.exact["weights"].equal(without.exact["weights"])
    assert (result.weights, result.exact) == ({}, {})


def test_features_are_of_the_images_that_were_trained_on_in_eval_mode(problem):
    """The reference makes them of other random crops than it trains on."""
    algorithm = FedGKT(**TINY)
    result, local = train(algorithm, problem, algorithm.start(problem), 1)
    edge, data = edge_with(algorithm, problem, local), problem.client(1)
    with torch.no_grad():
        features = edge.extractor(data.x)
        logits = edge.classifier(features)
    torch.testing.assert_close(result.features["features"], features)
    torch.testing.assert_close(result.logits["logits"], logits)
    assert result.features["labels"].equal(data.y)
    assert result.features["ids"].tolist() == list(range(10)) == result.logits["ids"].tolist()
    assert result.numbers == {}


def test_the_same_task_gives_the_same_bytes_and_torch_s_generator_is_left_alone(problem):
    algorithm = FedGKT(**TINY)
    state, local = one_round(algorithm, problem, algorithm.start(problem))
    before = torch.get_rng_state()
    one, other = (train(algorithm, problem, state, 2, local[2]) for _ in range(2))
    assert before.equal(torch.get_rng_state())
    assert [bits(each) for each in one] == [bits(each) for each in other]
    assert bits(train(algorithm, problem, state, 2, local[2], seed=8)[0]) != bits(one[0])


def test_more_samples_than_may_be_are_said_at_the_client(problem):
    algorithm = FedGKT(**{**TINY, "max_samples": 9})
    state = algorithm.start(problem)
    train(algorithm, problem, state, 0)
    with pytest.raises(
        ProblemError,
        match=r"client 1: expected at most 9 samples, got 10; raise",
    ):
        train(algorithm, problem, state, 1)


@pytest.mark.parametrize(
    ("logits", "ids", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 6]), "samples 0 to 5"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), "samples 0 to 5"),
        (torch.zeros(2, 4), torch.tensor([0, 1]), "expected logits as"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "expected ids as"),
    ],
)
def test_logits_of_other_samples_are_refused(problem, logits, ids, message):
    algorithm = FedGKT(**TINY)
    state = algorithm.start(problem)
    with pytest.raises(ResultError, match=message):
        train(algorithm, problem, state, payload=Payload(logits={"logits": logits, "ids": ids}))


# ---- evaluation


def test_a_client_is_evaluated_with_its_own_edge_before_the_server(problem):
    algorithm = FedGKT(**TINY)
    state, local = one_round(algorithm, problem, algorithm.start(problem))
    assert algorithm.evaluated_by == "clients"
    data, server = problem.test(), server_of(algorithm, state)
    task = Task(1, algorithm.evaluation_task(state, 1))
    client = Client(1, problem, problem.client(1), local[1], 0)
    before = bits(local[1])
    metrics = algorithm.evaluate_client(task, client)
    edge = edge_with(algorithm, problem, local[1])
    with torch.no_grad():
        features = edge.extractor(data.x)
        both, alone = server(features), edge.classifier(features)
    assert metrics["accuracy"] == (both.argmax(1) == data.y).float().mean().item()
    assert metrics["edge_accuracy"] == (alone.argmax(1) == data.y).float().mean().item()
    assert metrics["loss"] == pytest.approx(F.cross_entropy(both, data.y).item(), rel=1e-5)
    assert bits(local[1]) == before
    untrained = algorithm.evaluate_client(task, dataclasses.replace(client, local=None))
    assert untrained["edge_loss"] != metrics["edge_loss"]
    own = FedGKT(**TINY, test_on="own").evaluate_client(task, client)
    assert own["loss"] != metrics["loss"]


def test_what_is_sent_for_an_evaluation_is_the_server_exactly_and_no_features(problem):
    algorithm = FedGKT(**TINY)
    state, _ = one_round(algorithm, problem, algorithm.start(problem))
    payload = algorithm.evaluation_task(state)
    assert (payload.weights, payload.features, payload.logits) == ({}, {}, {})
    assert set(payload.exact) == set(algorithm.tensors(state))


def test_test_features_leave_the_client_only_if_it_is_told_so(problem):
    quiet, open_ = FedGKT(**TINY), FedGKT(**TINY, test_features=True, test_on="own")
    start = quiet.start(problem)
    assert train(quiet, problem, start)[0].exact == {}
    sent = train(open_, problem, start)[0].exact
    assert sent["test.labels"].equal(problem.client_test(0).y)
    with pytest.raises(ResultError, match="expected no tensors"):
        commit(quiet, start, {0: train(open_, problem, start)[0]})
    with pytest.raises(ResultError, match=r"expected test\.features"):
        commit(open_, start, {0: train(quiet, problem, start)[0]})


def test_the_evaluator_finds_what_the_clients_would(problem):
    """Of 40 test samples each, as all are tested on all."""
    algorithm = FedGKT(**TINY, test_features=True)
    assert algorithm.evaluated_by == "model"
    start = algorithm.start(problem)
    untrained = algorithm.evaluate(Task(0, algorithm.evaluation_task(start)), problem, "cpu")
    client = Client(0, problem, problem.client(0), None, 0)
    assert untrained == algorithm.evaluate_client(Task(0, algorithm.evaluation_task(start)), client)
    state, local = one_round(algorithm, problem, start)
    task = Task(1, algorithm.evaluation_task(state))
    found = algorithm.evaluate(task, problem, "cpu")
    each = [
        algorithm.evaluate_client(task, Client(k, problem, problem.client(k), local[k], 0))
        for k in range(3)
    ]
    for name in ("accuracy", "loss", "edge_accuracy", "edge_loss"):
        assert found[name] == pytest.approx(sum(one[name] for one in each) / 3, rel=1e-5)


def test_a_new_client_trains_its_edge_first(problem):
    algorithm = FedGKT(**TINY)
    state, _ = one_round(algorithm, problem, algorithm.start(problem))
    client = Client(5, problem, problem.client(2), None, 3)
    before = algorithm.evaluate_client(Task(1, algorithm.evaluation_task(state)), client)
    after = algorithm.personalise(state, 1, client)
    assert set(after) == {"accuracy", "loss", "edge_accuracy", "edge_loss"}
    assert after["edge_loss"] != before["edge_loss"]
