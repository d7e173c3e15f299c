"""Federated distillation at the aggregator: what travels, what it means, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch

from fedmq.algorithms.base import Payload, Result
from fedmq.algorithms.distillation.fd import Distillation
from fedmq.algorithms.distillation.reports import Reports
from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.problems.models import MODELS
from fedmq.codecs.registry import decode, make_codec
from tests.algorithms.distilling import CLASSES, Blobs, absorbed, report, rounds


def some_reports(devices=4, seed=0):
    """Return random reports in which some labels count 0."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 3, (devices, CLASSES))
    means = rng.dirichlet(np.ones(CLASSES), (devices, CLASSES)) * (counts > 0)[..., None]
    return means.astype(np.float32), counts


# ---- figures of the paper


def test_the_devices_model_has_the_papers_1_199_648_parameters():
    model = MODELS["fd-cnn"]((1, 28, 28), 10)
    assert sum(each.numel() for each in model.parameters()) == 1_199_648
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_a_report_takes_the_papers_3_200_bits_and_a_byte_a_label_for_its_counts():
    means = torch.full((10, 10), 0.1)
    encoded = make_codec("logits(float32)").encode(
        {"logits": means, "counts": torch.arange(1, 11) * 20}, 0
    )
    assert encoded.nbytes == 3_200 // 8 + 10
    # 16 rounds both ways: 13,120 bytes are sent where the paper counts 12,800.
    assert 2 * 16 * encoded.nbytes == 12_800 + 2 * 16 * 10


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
    gathered = algorithm.new_accumulator(state)
    for n in range(1, 50):
        result = Result(1, 3, report(torch.eye(3), [n, n, n]), 1)
        gathered = algorithm.accumulate(gathered, state, result, 0.1)
    assert len(gathered) == 1
    assert algorithm.commit(state, gathered, 1.0).counts.tolist() == [[0] * 3, [49] * 3]


GOOD = report(torch.eye(3), [1, 1, 1])


def with_logits(**tensors):
    return dataclasses.replace(GOOD, logits={**GOOD.logits, **tensors})


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
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
        (with_logits(counts=torch.tensor([1, 1, 0])), "labels with a count of 0"),
        (with_logits(logits=torch.eye(3) * float("nan")), "not from 0 to 1"),
        (with_logits(logits=torch.eye(3) * float("inf")), "not from 0 to 1"),
        (with_logits(logits=torch.tensor([[2.0, -1.0, 0.0]] * 3)), "not from 0 to 1"),
        (with_logits(logits=torch.full((3, 3), 0.9)), "sum to 1"),
    ],
)
def test_a_hostile_report_is_refused_and_nothing_of_it_stays(payload, reason):
    algorithm, problem = Distillation(), Blobs()
    state = algorithm.start(problem)
    gathered = algorithm.accumulate(
        algorithm.new_accumulator(state), state, Result(0, 0, GOOD, 1), 1.0
    )
    before = dict(gathered)
    with pytest.raises(ResultError, match=reason):
        algorithm.accumulate(gathered, state, Result(1, 0, payload, 1), 1.0)
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
