"""Co-distillation: outputs by sample, on a public set, keyed by sample id."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedmq.algorithms.base import Client, Payload, Result, Task
from fedmq.algorithms.distillation.codistillation import Codistillation
from fedmq.algorithms.distillation.fd import Distillation
from fedmq.algorithms.errors import ProblemError, ResultError
from fedmq.codecs.registry import make_codec
from tests.algorithms.distilling import Blobs, accuracy, client, rounds

SAMPLES = 40


class Shared(Blobs):
    """With public points."""

    def public(self):
        return self.points(55, SAMPLES)


def report(rows, ids=None, n=5):
    ids = torch.arange(len(rows)) if ids is None else ids
    return Payload(numbers={"n": n}, logits={"logits": rows.float(), "ids": ids})


def outputs(seed):
    rows = np.random.default_rng(seed).dirichlet(np.ones(3), SAMPLES)
    return torch.from_numpy(rows).float()


def absorbed(algorithm, state, reports):
    gathered = algorithm.new_accumulator(state)
    for device, payload in reports.items():
        algorithm.accumulate(gathered, state, Result(device, 0, payload, 1), 1.0)
    return algorithm.commit(state, gathered, 1.0)


def test_a_device_is_sent_the_mean_of_the_others_outputs_by_sample():
    algorithm, problem = Codistillation(), Shared(3)
    rows = [outputs(seed) for seed in range(3)]
    state = absorbed(algorithm, algorithm.start(problem), dict(enumerate(map(report, rows))))
    sent = algorithm.task(state, 1).logits
    assert sent["ids"].equal(torch.arange(SAMPLES))
    torch.testing.assert_close(sent["logits"], (rows[0] + rows[2]) / 2)


def test_outputs_are_keyed_by_sample_id_whatever_their_order():
    algorithm, problem = Codistillation(), Shared()
    rows, order = outputs(1), torch.from_numpy(np.random.default_rng(1).permutation(SAMPLES))
    state = algorithm.start(problem)
    straight, shuffled = (
        absorbed(algorithm, state, {0: each}) for each in (report(rows), report(rows[order], order))
    )
    assert straight.means.equal(shuffled.means)


def test_a_batch_of_public_samples_meets_the_outputs_of_its_own_images():
    """Full batches by autograd, with the outputs of a part of the samples, in another order."""
    problem = Shared()
    order = torch.from_numpy(np.random.default_rng(2).permutation(SAMPLES)[:25])
    soft = outputs(3)[order]
    sent = Payload(logits={"logits": soft, "ids": order})
    algorithm = Codistillation(lr=0.3, gamma=0.7, iterations=3, batch_size=None)
    trained = algorithm.train(Task(0, sent), client(problem, 1))
    result, local = trained.payload, trained.local_state
    model, data, public = problem.model(), problem.client(1), problem.public()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(3):
        loss = F.cross_entropy(model(data.x), data.y)
        loss = loss + 0.7 * F.cross_entropy(model(public.x[order]), soft)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(local.weights[name], tensor)
    torch.testing.assert_close(result.logits["logits"], model(public.x).softmax(dim=1).detach())
    assert result.logits["ids"].equal(torch.arange(SAMPLES))


def test_before_anybody_reports_a_device_trains_alone():
    problem = Shared()
    algorithm, alone = (
        each(lr=0.3, iterations=3, batch_size=4) for each in (Codistillation, Distillation)
    )
    sent = algorithm.task(algorithm.start(problem), 1)
    assert not len(sent.logits["ids"])
    one = algorithm.train(Task(0, sent), client(problem, 1)).local_state
    start = alone.start(problem)
    other = alone.train(Task(0, alone.task(start, 1)), client(problem, 1)).local_state
    assert all(one.weights[name].equal(other.weights[name]) for name in one.weights)


def test_it_sends_outputs_by_sample_where_federated_distillation_sends_them_by_label():
    problem, codec = Shared(), make_codec("logits(float32)")
    sizes = []
    for algorithm in (Codistillation(), Distillation()):
        task = Task(0, algorithm.task(algorithm.start(problem), 1))
        result = algorithm.train(task, client(problem, 1)).payload
        sizes.append(codec.encode(result.logits, 0).nbytes)
    assert sizes[0] == SAMPLES * 3 * 4  # ids from 0 on take no bytes
    assert sizes[1] == 3 * 3 * 4  # nor do equal counts


def test_memory_is_bounded_by_devices_and_public_samples():
    algorithm, problem = Codistillation(), Shared()
    state = algorithm.start(problem)
    gathered = algorithm.new_accumulator(state)
    for seed in range(20):
        gathered = algorithm.accumulate(
            gathered, state, Result(0, 0, report(outputs(seed)), 1), 1.0
        )
    assert len(gathered) == 1
    assert algorithm.commit(state, gathered, 1.0).means[0].equal(outputs(19))
    assert algorithm.result_bytes(state) == SAMPLES * (3 * 4 + 8)


TWICE = torch.cat([torch.zeros(1).long(), torch.arange(SAMPLES - 1)])


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (report(outputs(0), TWICE), "each sample id"),
        (report(outputs(0), torch.arange(SAMPLES) + 1), "each sample id"),
        (report(outputs(0)[:-1]), "expected ids as"),
        (report(outputs(0)[:, :2]), "expected logits as"),
        (report(outputs(0) * float("nan")), "not from 0 to 1"),
        (report(outputs(0) * 0.5), "sum to 1"),
        (Payload(numbers={"n": 1}), "expected logits with ids"),
    ],
)
def test_a_hostile_report_is_refused_and_nothing_of_it_stays(payload, reason):
    algorithm = Codistillation()
    state = algorithm.start(Shared())
    gathered = algorithm.new_accumulator(state)
    with pytest.raises(ResultError, match=reason):
        algorithm.accumulate(gathered, state, Result(0, 0, payload, 1), 1.0)
    assert gathered == {}


def test_a_state_is_saved_and_restored_to_the_bit():
    algorithm, problem = Codistillation(lr=0.1), Shared(3)
    state, _ = rounds(algorithm, problem, 2)
    back = algorithm.load(problem, algorithm.save(state))
    for k in range(3):
        one, other = algorithm.task(state, k), algorithm.task(back, k)
        assert all(one.logits[name].equal(other.logits[name]) for name in one.logits)


def test_the_same_seed_makes_the_same_bytes():
    algorithm, problem = Codistillation(lr=0.1, batch_size=4), Shared(2)
    state, _ = rounds(algorithm, problem, 1)
    task = Task(1, algorithm.task(state, 1))
    one, two = (algorithm.train(task, client(problem, 1)).payload for _ in range(2))
    other = algorithm.train(task, client(problem, 1, seed=8)).payload
    assert one.logits["logits"].equal(two.logits["logits"])
    assert not one.logits["logits"].equal(other.logits["logits"])


def test_a_device_learns_a_label_that_only_others_have():
    """Which federated distillation cannot teach it: it has no sample of that label."""
    options = {"lr": 0.2, "iterations": 20, "batch_size": 8}
    apart = [accuracy(each(**options), Shared(2), 4) for each in (Codistillation, Distillation)]
    assert apart[0] > apart[1] + 0.05


def test_a_problem_must_have_public_examples():
    with pytest.raises(ProblemError, match="with public examples, got none"):
        Codistillation().start(Blobs())


def test_a_new_device_learns_a_round_from_all_devices():
    algorithm, problem = Codistillation(lr=0.3, iterations=20), Shared(2)
    state, _ = rounds(algorithm, problem, 3)
    new = Client(5, problem, problem.client(0), None, 3)
    assert algorithm.personalise(state, 3, new)["accuracy"] > 0.8
