"""Federated distillation: what travels, what is learned from it, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedmq.algorithms.base import Client, Payload, Result, Task
from fedmq.algorithms.distillation import Distillation
from fedmq.algorithms.errors import AlgorithmError, ResultError
from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.problems.image import ImageClassification
from fedmq.algorithms.problems.models import MODELS
from fedmq.algorithms.reports import Reports, paper_bits
from fedmq.algorithms.rng import derive_seed
from fedmq.codecs.registry import decode, make_codec
from tests.algorithms.tiny import Normed, Tiny

CLASSES = 3


class Blobs(Tiny):
    """Three labels of points around the corners of a triangle; client 0 has no label 2."""

    shape = (2,)
    classes = CLASSES

    def module(self):
        return nn.Linear(2, CLASSES)

    def points(self, seed, n, labels=CLASSES):
        source = torch.Generator().manual_seed(seed)
        y = torch.arange(n) % labels
        corners = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
        return Examples(corners[y] + torch.randn(n, 2, generator=source), y)

    def client(self, index):
        return self.points(100 + index, 9 + 3 * index, CLASSES - 1 if index == 0 else CLASSES)


class Pictures(Blobs):
    """Images of 6 x 6, for models by name."""

    shape = (1, 6, 6)

    def module(self):
        return MODELS["mlp"](self.shape, CLASSES)

    def points(self, seed, n, labels=CLASSES):
        source = torch.Generator().manual_seed(seed)
        y = torch.arange(n) % labels
        return Examples(torch.randn(n, *self.shape, generator=source) + y.view(-1, 1, 1, 1), y)


def client(problem, index=0, local=None, seed=7):
    return Client(index, problem, problem.client(index), local, seed)


def first_task(algorithm, problem, index=0):
    return Task(0, algorithm.task(algorithm.start(problem), index))


def report(means, counts, n=5, **others):
    logits = {"logits": torch.as_tensor(means).float(), "counts": torch.as_tensor(counts)}
    return Payload(numbers={"n": n}, logits=logits, **others)


def rounds(algorithm, problem, count, seed=0):
    """Return the state and what each device keeps, after rounds of all of them."""
    state, locals_ = algorithm.start(problem), [None] * problem.clients
    for version in range(count):
        gathered = algorithm.gather(state)
        for k in range(problem.clients):
            at = client(problem, k, locals_[k], derive_seed(seed, "task", version, k))
            result, locals_[k] = algorithm.train(Task(version, algorithm.task(state, k)), at)
            algorithm.absorb(gathered, state, Result(k, 0, result), 1.0)
        state = algorithm.commit(state, gathered, 1.0)
    return state, locals_


def accuracy(algorithm, problem, count, seed=0):
    """Return the devices' mean accuracy on the whole test set."""
    state, locals_ = rounds(algorithm, problem, count, seed)
    return np.mean(
        [
            algorithm.evaluate_client(
                Task(count, algorithm.examined(state, k)), client(problem, k, locals_[k])
            )["accuracy"]
            for k in range(problem.clients)
        ]
    )


def some_reports(devices=4, seed=0):
    """Return random reports in which some labels count 0."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 3, (devices, CLASSES))
    means = rng.dirichlet(np.ones(CLASSES), (devices, CLASSES)) * (counts > 0)[..., None]
    return means.astype(np.float32), counts


def absorbed(algorithm, state, reports):
    gathered = algorithm.gather(state)
    for device, payload in reports.items():
        algorithm.absorb(gathered, state, Result(device, 0, payload), 1.0)
    return algorithm.commit(state, gathered, 1.0)


# ---- figures of the paper


def test_the_devices_model_has_the_papers_1_199_648_parameters():
    model = MODELS["fd-cnn"]((1, 28, 28), 10)
    assert sum(each.numel() for each in model.parameters()) == 1_199_648
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_table_1_counts_102_400_bits_for_distillation_and_47_989_120_with_augmentation():
    assert paper_bits(16) == 2 * 16 * 10 * 10 * 32 == 102_400
    assert paper_bits(16, generator=1_493_520, samples=15) == 47_989_120


def test_a_report_takes_the_papers_3_200_bits_and_a_byte_a_label_for_its_counts():
    means = torch.full((10, 10), 0.1)
    encoded = make_codec("logits(float32)").encode(
        {"logits": means, "counts": torch.arange(1, 11) * 20}, 0
    )
    assert encoded.nbytes == 3_200 // 8 + 10
    # 16 rounds both ways: 13,120 bytes are sent where the paper counts 12,800.
    assert 2 * 16 * encoded.nbytes == paper_bits(16) // 8 + 2 * 16 * 10


def test_a_label_that_counts_0_takes_no_row():
    means, counts = torch.full((10, 10), 0.1), torch.full((10,), 200)
    means[[2, 5, 7]], counts[[2, 5, 7]] = 0, 0
    encoded = make_codec("logits(float32)").encode({"logits": means, "counts": counts}, 0)
    assert encoded.nbytes == 7 * 40 + 10


# ---- at the aggregator


def test_a_device_is_sent_the_unweighted_mean_of_the_other_devices():
    """Against a loop; a device of many samples counts as one of few does."""
    means, counts = some_reports()
    counts[1] *= 1000
    reports = Reports.of(torch.from_numpy(means), torch.from_numpy(counts))
    for device in range(4):
        found, having = reports.others(device)
        for label in range(CLASSES):
            others = [i for i in range(4) if i != device and counts[i, label]]
            assert having[label] == len(others)
            expected = np.mean([means[i, label] for i in others], axis=0) if others else 0
            np.testing.assert_allclose(found[label], expected, atol=1e-7)


def test_the_device_itself_is_left_out_unlike_in_pfllib():
    algorithm, problem = Distillation(), Blobs(3)
    ones = torch.eye(CLASSES)
    state = absorbed(
        algorithm, algorithm.start(problem), {k: report(ones[[k] * 3], [1, 1, 1]) for k in range(3)}
    )
    sent = algorithm.task(state, 0).logits
    assert sent["logits"].equal(torch.tensor([[0.0, 0.5, 0.5]] * 3))
    assert sent["counts"].tolist() == [2, 2, 2]


def test_a_label_that_no_other_device_has_is_absent_and_not_divided_by_zero():
    algorithm, problem = Distillation(), Blobs(2)
    row = [[0.5, 0.25, 0.25]]
    state = algorithm.start(problem)
    state = absorbed(
        algorithm,
        state,
        {0: report(row + [[0.0] * 3] * 2, [4, 0, 0]), 1: report(row * 3, [1, 2, 3])},
    )
    sent = algorithm.task(state, 1).logits
    assert sent["counts"].tolist() == [1, 0, 0]
    assert sent["logits"].equal(torch.tensor(row + [[0.0] * 3] * 2))
    encoded = make_codec("logits(float16)").encode(sent, 0)
    assert decode(encoded)["counts"].tolist() == [1, 0, 0]


def test_the_divisor_is_the_number_of_other_devices_that_have_the_label_not_m_minus_1():
    algorithm, problem = Distillation(), Blobs(3)
    full = report(torch.eye(3), [1, 1, 1])
    without = report(torch.tensor([1.0, 1.0, 0.0]).diag(), [1, 1, 0])
    state = absorbed(algorithm, algorithm.start(problem), {0: full, 1: full, 2: without})
    assert algorithm.task(state, 0).logits["logits"].equal(torch.eye(3))
    assert algorithm.task(state, 0).logits["counts"].tolist() == [2, 2, 1]


def test_before_anybody_reports_every_label_is_absent():
    algorithm = Distillation()
    sent = algorithm.task(algorithm.start(Blobs()), 0).logits
    assert sent["counts"].tolist() == [0] * 3
    assert not sent["logits"].any()


def test_a_device_that_is_away_is_still_heard_by_its_last_report():
    algorithm, problem = Distillation(), Blobs(2)
    old = absorbed(algorithm, algorithm.start(problem), {0: report(torch.eye(3), [1, 1, 1])})
    new = absorbed(algorithm, old, {1: report(torch.eye(3), [2, 2, 2])})
    assert algorithm.task(new, 1).logits["logits"].equal(torch.eye(3))
    assert not old.counts[1].any(), "an old state changed"


def test_memory_is_bounded_by_the_devices_whatever_number_of_reports():
    algorithm, problem = Distillation(), Blobs(2)
    state = algorithm.start(problem)
    gathered = algorithm.gather(state)
    for n in range(1, 50):
        result = Result(1, 3, report(torch.eye(3), [n, n, n]))
        gathered = algorithm.absorb(gathered, state, result, 0.1)
    assert len(gathered) == 1
    assert algorithm.commit(state, gathered, 1.0).counts.tolist() == [[0] * 3, [49] * 3]


GOOD = report(torch.eye(3), [1, 1, 1])


def with_logits(**tensors):
    return dataclasses.replace(GOOD, logits={**GOOD.logits, **tensors})


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (dataclasses.replace(GOOD, numbers={}), "expected n"),
        (dataclasses.replace(GOOD, numbers={"n": 0}), "expected n"),
        (dataclasses.replace(GOOD, logits={}), "expected logits with counts"),
        (
            dataclasses.replace(GOOD, logits={"logits": torch.eye(3), "ids": torch.arange(3)}),
            "expected logits with counts",
        ),
        (dataclasses.replace(GOOD, weights={"w": torch.ones(1)}), "no other tensors"),
        (with_logits(logits=torch.eye(4), counts=torch.ones(4).long()), "expected counts as"),
        (with_logits(logits=torch.eye(3).double()), "expected logits as"),
        (with_logits(counts=torch.ones(3)), "expected counts as"),
        (with_logits(counts=torch.tensor([1, 1, -1])), "expected counts from 0"),
        (with_logits(counts=torch.tensor([1, 1, 1 << 60])), "expected counts from 0"),
        (with_logits(counts=torch.tensor([0, 0, 0])), "expected counts from 0"),
        (with_logits(counts=torch.tensor([1, 1, 0])), "labels that count 0"),
        (with_logits(logits=torch.eye(3) * float("nan")), "not from 0 to 1"),
        (with_logits(logits=torch.eye(3) * float("inf")), "not from 0 to 1"),
        (with_logits(logits=torch.tensor([[2.0, -1.0, 0.0]] * 3)), "not from 0 to 1"),
        (with_logits(logits=torch.full((3, 3), 0.9)), "sum to 1"),
    ],
)
def test_a_hostile_report_is_refused_and_nothing_of_it_stays(payload, reason):
    algorithm, problem = Distillation(), Blobs()
    state = algorithm.start(problem)
    gathered = algorithm.absorb(algorithm.gather(state), state, Result(0, 0, GOOD), 1.0)
    before = dict(gathered)
    with pytest.raises(ResultError, match=reason):
        algorithm.absorb(gathered, state, Result(1, 0, payload), 1.0)
    assert gathered == before


@pytest.mark.parametrize("codec", ["logits(float32)", "logits(float16)", "logits(int8)"])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_honest_reports_are_taken_through_every_codec(codec, classes):
    problem = Blobs()
    problem.classes = classes
    algorithm = Distillation()
    state = algorithm.start(problem)
    rows = np.random.default_rng(0).dirichlet(np.full(classes, 0.1), classes)
    sent = report(torch.from_numpy(rows), torch.ones(classes).long())
    through = decode(make_codec(codec).encode(sent.logits, 0))
    state = absorbed(algorithm, state, {0: dataclasses.replace(sent, logits=through)})
    found = algorithm.task(state, 1).logits["logits"]
    assert (found - torch.from_numpy(rows)).abs().max() < 0.005


def test_a_state_is_saved_and_restored_to_the_bit():
    algorithm, problem = Distillation(lr=0.1), Blobs(3)
    state, _ = rounds(algorithm, problem, 2)
    back = algorithm.load(problem, algorithm.save(state))
    for name, tensor in algorithm.tensors(state).items():
        assert algorithm.tensors(back)[name].equal(tensor)
    for k in range(3):
        for name, tensor in algorithm.task(state, k).logits.items():
            assert algorithm.task(back, k).logits[name].equal(tensor)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"means": torch.zeros(2, 3, 3)},
        {"means": torch.zeros(2, 3, 3), "counts": torch.zeros(2, 3)},
        {"means": torch.zeros(3, 3, 3), "counts": torch.zeros(3, 3, dtype=torch.int64)},
    ],
)
def test_a_state_of_another_problem_is_refused(tensors):
    with pytest.raises(ResultError, match="expected"):
        Distillation().load(Blobs(2), Payload(exact=tensors))


# ---- at the device


def by_hand(problem, data, soft, *, lr, gamma, steps):
    """Full-batch steps by torch.optim and autograd: the parameters, and the report."""
    model = problem.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    outputs = []
    for _ in range(steps):
        logits = model(data.x)
        outputs.append(logits.softmax(dim=1).detach())
        loss = F.cross_entropy(logits, data.y)
        for row, label in enumerate(data.y.tolist()):
            if soft[label] is not None:
                term = F.cross_entropy(logits[row : row + 1], soft[label].unsqueeze(0))
                loss = loss + gamma * term / len(data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    every, y = torch.cat(outputs), data.y.repeat(steps)
    of = F.one_hot(y, 3).float()
    means = of.T @ every / of.sum(dim=0).clamp(min=1).unsqueeze(1)
    return model, means, torch.bincount(y, minlength=3)


@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_a_device_steps_on_ce_plus_gamma_ce_to_the_others_means(gamma):
    """Against autograd; label 1 is absent, and its samples are trained on their labels alone."""
    problem = Blobs()
    data = problem.client(1)
    soft = torch.tensor([[0.8, 0.1, 0.1], [0.0, 0.0, 0.0], [0.2, 0.2, 0.6]])
    sent = Payload(logits={"logits": soft, "counts": torch.tensor([1, 0, 1])})
    algorithm = Distillation(lr=0.3, gamma=gamma, iterations=4, batch_size=None)
    result, local = algorithm.train(Task(0, sent), client(problem, 1))
    model, means, counts = by_hand(
        problem, data, [soft[0], None, soft[2]], lr=0.3, gamma=gamma, steps=4
    )
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(local.weights[name], tensor)
    torch.testing.assert_close(result.logits["logits"], means)
    assert result.logits["counts"].equal(counts)
    assert result.numbers == {"n": len(data)}


def test_soft_targets_are_probabilities_not_raw_logits_as_in_pfllib():
    algorithm, problem = Distillation(lr=0.5, iterations=3), Blobs()
    result, _ = algorithm.train(first_task(algorithm, problem, 1), client(problem, 1))
    torch.testing.assert_close(result.logits["logits"].sum(dim=1), torch.ones(3))
    assert (result.logits["logits"] >= 0).all()


def test_a_label_that_a_device_lacks_counts_0_and_has_no_row():
    algorithm, problem = Distillation(), Blobs()
    result, _ = algorithm.train(first_task(algorithm, problem, 0), client(problem))
    assert result.logits["counts"].tolist() == [5, 4, 0]
    assert result.logits["logits"][2].tolist() == [0.0] * 3


@pytest.mark.parametrize(("iterations", "epochs", "seen"), [(7, 1, 28), (1, 9, 4), (None, 3, 36)])
def test_a_round_is_so_many_iterations_or_epochs(iterations, epochs, seen):
    problem = Blobs()
    algorithm = Distillation(iterations=iterations, epochs=epochs, batch_size=4)
    state = algorithm.start(problem)
    at = dataclasses.replace(client(problem, 1), data=problem.points(1, 12))
    result, _ = algorithm.train(Task(0, algorithm.task(state, 1)), at)
    assert result.logits["counts"].sum() == seen


def test_a_device_goes_on_from_its_own_model_also_its_running_statistics():
    class NormedBlobs(Blobs):
        def module(self):
            return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))

    algorithm, problem = Distillation(iterations=2), NormedBlobs()
    task = first_task(algorithm, problem, 1)
    _, first = algorithm.train(task, client(problem, 1))
    _, second = algorithm.train(task, client(problem, 1, first, seed=8))
    assert first.exact["1.num_batches_tracked"].item() == 2
    assert second.exact["1.num_batches_tracked"].item() == 4
    assert not second.weights["0.weight"].equal(first.weights["0.weight"])


def test_with_gamma_0_what_others_say_changes_nothing():
    algorithm, problem = Distillation(gamma=0.0, iterations=3), Blobs()
    state = algorithm.start(problem)
    taught = absorbed(algorithm, state, {0: report(torch.eye(3)[[1, 2, 0]], [1, 1, 1])})
    one, other = (
        algorithm.train(Task(0, algorithm.task(each, 1)), client(problem, 1))[1]
        for each in (state, taught)
    )
    assert all(one.weights[name].equal(other.weights[name]) for name in one.weights)


def test_the_same_seed_makes_the_same_bytes_and_leaves_torchs_own_chance_alone():
    algorithm, problem = Distillation(iterations=3, batch_size=2), Pictures()
    task = first_task(algorithm, problem, 1)
    before = torch.random.get_rng_state()
    (one, kept), (two, again) = (algorithm.train(task, client(problem, 1)) for _ in range(2))
    other, _ = algorithm.train(task, client(problem, 1, seed=8))
    assert torch.random.get_rng_state().equal(before)
    assert one.logits["logits"].equal(two.logits["logits"])
    assert all(kept.weights[name].equal(again.weights[name]) for name in kept.weights)
    assert not one.logits["logits"].equal(other.logits["logits"])


# ---- devices that differ


def test_two_architectures_teach_each_other_in_one_run():
    problem = Pictures(4)
    algorithm = Distillation(models=("mlp", "fd-cnn"), iterations=20, lr=0.05)
    state, locals_ = rounds(algorithm, problem, 3)
    sizes = [sum(each.numel() for each in local.weights.values()) for local in locals_]
    assert sizes[0] == sizes[2] != sizes[1] == sizes[3]
    assert state.counts.gt(0).all(dim=1).tolist() == [False, True, True, True]
    scores = [
        algorithm.evaluate_client(Task(3, Payload()), client(problem, k, locals_[k]))["accuracy"]
        for k in range(4)
    ]
    assert min(scores) > 0.55  # one of them has never seen the third label
    assert min(scores[1:]) > 0.75


def test_first_parameters_follow_from_the_seed_and_the_device():
    problem = Pictures(3)
    algorithm = Distillation(models=("mlp",), seed=3)
    one, two, other = (algorithm.own_model(client(problem, k)).weights for k in (0, 0, 2))
    assert one.equal(two)
    assert not one.equal(other)
    assert not one.equal(Distillation(models=("mlp",), seed=4).own_model(client(problem)).weights)


def test_an_unknown_model_is_refused():
    with pytest.raises(AlgorithmError, match=r"models: unknown model 'fd-cn'"):
        Distillation(models=("fd-cn",))


# ---- evaluation


def test_a_device_is_evaluated_with_what_it_keeps_on_the_whole_test_set():
    algorithm, problem = Distillation(lr=0.3, iterations=30), Blobs()
    assert algorithm.evaluated == "clients"
    state, locals_ = rounds(algorithm, problem, 2)
    task = Task(2, algorithm.examined(state, 1))
    assert task.payload == Payload()
    model = problem.model()
    model.load_state_dict(dict(locals_[1].weights))
    test = problem.test()
    expected = (model(test.x).argmax(dim=1) == test.y).float().mean().item()
    assert algorithm.evaluate_client(task, client(problem, 1, locals_[1]))["accuracy"] == expected


def test_a_device_that_never_trained_is_evaluated_as_it_begins():
    algorithm, problem = Distillation(), Blobs()
    test = problem.test()
    expected = problem.metrics(problem.model()(test.x), test.y)
    found = algorithm.evaluate_client(Task(0, Payload()), client(problem))
    assert found == pytest.approx(expected)


def test_a_new_device_learns_a_round_from_all_devices():
    algorithm, problem = Distillation(lr=0.3, iterations=30), Blobs(2)
    state, _ = rounds(algorithm, problem, 2)
    new = Client(5, problem, problem.client(1), None, 3)
    assert algorithm.task(state, 5).logits["counts"].tolist() == [2, 2, 1]
    assert algorithm.personalise(state, 2, new)["accuracy"] > 0.8


def test_a_problem_must_say_its_classes():
    with pytest.raises(AlgorithmError, match="how many classes"):
        Distillation().start(Normed())


# ---- learning


class Scarce(Blobs):
    """mnist-mini: so many images each, IID, but of three labels a device keeps only ``keep``."""

    shape, classes = (1, 28, 28), 10

    def __init__(self, clients=4, each=300, keep=5, seed=0, tests=500, model="mlp-elu"):
        self.clients, self.seed = clients, seed
        self.whole = ImageClassification("mnist-mini", model, 1, "iid", seed)
        data, rng = self.whole.client(0), np.random.default_rng(seed)
        order, self.parts, self.targets = rng.permutation(len(data)), [], []
        for k in range(clients):
            part = order[k * each : (k + 1) * each]
            targets, y = rng.permutation(10)[:3], data.y[part].numpy()
            kept = np.ones(each, bool)
            for label in targets:
                kept[np.flatnonzero(y == label)[keep:]] = False
            rows = torch.from_numpy(part[kept])
            self.targets.append(sorted(targets.tolist()))
            self.parts.append(Examples(data.x[rows], data.y[rows]))
        test = self.whole.test()
        self.tests = Examples(test.x[:tests], test.y[:tests])

    def module(self):
        return self.whole.model()

    def client(self, index):
        return self.parts[index]

    def test(self):
        return self.tests


def test_devices_that_distill_learn_more_than_devices_alone():
    """Four devices with 300 images of mnist-mini, of which three labels keep 5."""
    problem = Scarce()
    scores = []
    for gamma in (0.0, 0.5):
        algorithm = Distillation(gamma=gamma, lr=0.05, iterations=40, batch_size=32)
        _, locals_ = rounds(algorithm, problem, 8)
        each = [
            algorithm.evaluate_client(Task(8, Payload()), client(problem, k, locals_[k]))
            for k in range(4)
        ]
        scores.append({name: np.mean([one[name] for one in each]) for name in ("accuracy", "loss")})
    alone, together = scores
    assert together["accuracy"] > alone["accuracy"] + 0.004
    assert together["loss"] < 0.9 * alone["loss"]
