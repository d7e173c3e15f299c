"""FAug: what leaks, what is filled, what travels, and that it helps."""

import dataclasses

import pytest
import torch

from fedmq.algorithms.base import Client, Payload, Result, Task
from fedmq.algorithms.distillation.fd import Distillation
from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.faug.algorithm import FAug
from fedmq.algorithms.faug.augmentation import (
    device_server_leakage,
    filled,
    inter_device_leakage,
    missing,
    split_labels,
)
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.toolkit.sgd import evaluate_module, load_model
from fedmq.codecs.registry import decode, make_codec
from tests.algorithms.augmenting import TINY, Run, Skewed
from tests.algorithms.distilling import Pictures, Scarce

# ---- privacy


@pytest.mark.parametrize(("redundant", "leakage"), [(0, 1.0), (1, 0.75), (3, 0.5), (7, 0.3)])
def test_the_server_learns_less_of_three_targets_the_more_redundant_labels(redundant, leakage):
    assert device_server_leakage(3, redundant) == leakage


def test_other_devices_learn_no_less_than_three_tenths_of_three_targets():
    assert min(inter_device_leakage(3, union) for union in range(3, 11)) == 0.3
    assert inter_device_leakage(3, 10) == 0.3


def test_a_device_without_targets_leaks_nothing_and_divides_by_nothing():
    assert device_server_leakage(0, 0) == device_server_leakage(0, 3) == 0
    assert inter_device_leakage(0, 0) == inter_device_leakage(3, 0) == 0


@pytest.mark.parametrize(("redundant", "server", "devices"), [(0, 1.0, 1 / 3), (1, 0.5, 1 / 3)])
def test_leakage_is_reported_with_the_accuracy(redundant, server, devices):
    run = Run(FAug(redundant=redundant, **TINY), Skewed(3))
    assert run.metrics()["leakage_device_server"] == 0
    run.round()
    assert run.metrics()["leakage_device_server"] == server
    assert run.metrics()["leakage_inter_device"] == 0, "nobody has a generator yet"
    run.round()
    assert run.metrics()["leakage_inter_device"] == pytest.approx(devices)


def test_nothing_but_the_labels_says_which_are_targets():
    sent = Run(FAug(redundant=1, seeds=2, **TINY), Skewed(3)).round()[1]
    y = sent.features["labels"].tolist()
    assert y == sorted(y)
    assert len(set(y)) == 2
    assert sent.features["ids"].tolist() == list(range(4))
    assert sent.numbers == {"phase": "seeds"}


def test_the_choice_of_redundant_labels_is_no_function_of_what_the_server_knows():
    """The server knows the task's seed: from it alone it could find out the targets."""

    class Many(Skewed):
        def client(self, index):
            data = super().client(index % 3)
            return Examples(data.x + index, data.y)

    problem, algorithm = Many(24), FAug(redundant=1, seeds=2, **TINY)
    task = Task(0, Payload(numbers={"phase": "seeds"}))
    found = {}
    for k in range(24):
        for seed in (1, 2):
            at = Client(k, problem, problem.client(k), None, seed)
            sent = algorithm.train(task, at).payload
            found[k, seed] = sent.features["features"]
            shown = set(sent.features["labels"].tolist()) - {k % 3}
            found.setdefault(k % 3, set()).update(shown)
        assert found[k, 1].equal(found[k, 2]), "a device that is asked twice gives more"
    assert max(len(found[target]) for target in range(3)) > 1


# ---- labels


def test_a_label_with_less_than_a_share_of_the_mean_is_a_target():
    y = torch.tensor([0] * 200 + [1] * 5 + [2] * 190)
    assert split_labels(y, 4, 0.25) == ([1, 3], [0, 2])
    assert missing(y, 4, 0.25) == {1: 190, 3: 195}


def test_an_iid_device_lacks_nothing():
    assert missing(torch.arange(30) % 3, 3, 0.25) == {}


# ---- phases


@pytest.mark.parametrize("then", ["fd", "fedavg"])
def test_each_device_gives_seeds_gets_the_generator_fills_and_learns(then):
    run = Run(FAug(then=then, lr=0.05, **TINY), Skewed(3)).rounds(4)
    assert [phase for k, phase in run.phases if k == 1] == ["seeds", "fill", "then", "then"]
    for k in range(3):
        y = filled(run.at(k)).y
        assert torch.bincount(y).tolist() == [12, 12, 12]
        made = run.locals[k].exact
        assert made["faug.images"].dtype == torch.uint8
        assert made["faug.labels"].tolist() == [k] * 10


def test_the_generator_travels_once_to_each_device():
    run = Run(FAug(**TINY), Skewed(3))
    sizes = []
    for _ in range(5):
        sizes.append(len(run.algorithm.task(run.state, 0).weights))
        run.round()
    assert [size > 0 for size in sizes] == [False, True, False, False, False]


def test_seeds_leave_the_state_when_the_generator_is_trained_and_never_reach_the_model_file():
    run = Run(FAug(**TINY), Skewed(3))
    run.round([0, 1])
    assert set(run.state.seeds) == {0, 1}
    assert not any("seeds" in name for name in run.algorithm.tensors(run.state))
    run.round([2])
    assert run.state.gan is not None
    assert run.state.seeds == {}


def test_a_device_that_was_away_gets_the_phases_that_it_missed():
    run = Run(FAug(**TINY), Skewed(3))
    run.round([0, 1])
    run.round([0, 1])  # they learn while the server waits for device 2
    run.round([2])
    run.round([0, 2])
    run.round([0, 1, 2])
    run.round([1])
    assert [phase for k, phase in run.phases if k == 2] == ["seeds", "fill", "then"]
    assert [phase for k, phase in run.phases if k == 1] == ["seeds", "then", "fill", "then"]
    assert all(torch.bincount(filled(run.at(k)).y).tolist() == [12] * 3 for k in range(3))
    assert inner_weights(run.locals[1]), "filling lost the model"


def inner_weights(local):
    return dict(local.weights)


def test_a_device_that_comes_after_the_generator_gives_no_seeds_for_nothing():
    run = Run(FAug(wait=0.6, **TINY), Skewed(3))
    run.round([0, 1])
    run.round([0, 1, 2])
    run.round([2])
    assert [phase for k, phase in run.phases if k == 2] == ["fill", "then"]
    # Nobody had shown label 2, so the generator does not know it.
    assert torch.bincount(filled(run.at(2)).y).tolist() == [12, 12, 2]


def test_results_of_phases_have_no_part_in_the_average():
    """A round of two that train and one that fills is FedAvg's round of the two."""
    problem, options = Skewed(3), {"lr": 0.05, "batch_size": 4}
    run = Run(FAug(then="fedavg", wait=0.6, **options, **TINY), problem)
    run.round([0, 1])
    run.round([0, 1])
    before = run.state
    sent = run.round([0, 1, 2])
    assert run.phases[-1] == (2, "fill")
    average = FedAvg(**options)
    gathered = average.new_accumulator(before.then)
    for k in (0, 1):
        n = run.examples[k]
        gathered = average.accumulate(gathered, before.then, Result(k, 0, sent[k], n), n)
    divisor = float(run.examples[0] + run.examples[1])
    expected = average.commit(before.then, gathered, divisor)
    torch.testing.assert_close(run.state.then.weights, expected.weights)


def test_a_round_of_phases_alone_leaves_the_model_as_it_is():
    run = Run(FAug(then="fedavg", **TINY), Skewed(3))
    before = run.state.then
    run.rounds(2)
    assert run.state.then is before


def test_without_any_target_no_generator_is_trained_and_learning_goes_on():
    run = Run(FAug(**TINY), Pictures(3))
    pictures = Pictures(3).client(2)
    run.problem.client = lambda index: pictures
    run.rounds(2)
    assert run.state.gan is None
    assert run.phases[-1] == (2, "then")


def test_it_learns_as_distillation_does_on_what_is_filled():
    problem = Skewed(3)
    run = Run(FAug(lr=0.05, **TINY), problem).rounds(2)
    task = Task(2, run.algorithm.task(run.state, 1))
    plain = dataclasses.replace(run.at(1), data=filled(run.at(1)), local=None)
    expected = Distillation(lr=0.05, seed=1).train(task, plain).payload
    trained = run.algorithm.train(task, run.at(1))
    found, local = trained.payload, trained.local_state
    assert found.logits["logits"].equal(expected.logits["logits"])
    assert found.numbers == {"phase": "then"}
    assert local.exact["faug.images"].equal(run.locals[1].exact["faug.images"])


def test_iterations_are_rounded_to_whole_epochs_under_averaging():
    problem = Skewed(3)
    ours = FAug(then="fedavg", iterations=23, batch_size=5, lr=0.1, **TINY)
    run = Run(ours, problem).rounds(2)
    task = Task(2, run.algorithm.task(run.state, 0))
    found = ours.train(task, run.at(0)).payload
    data = filled(run.at(0))  # 36 samples are 8 batches, 23 batches about 3 epochs
    plain = dataclasses.replace(run.at(0), data=data, local=None)
    expected = FedAvg(lr=0.1, batch_size=5, epochs=3, momentum=0.0).train(task, plain).payload
    assert all(found.weights[name].equal(expected.weights[name]) for name in found.weights)


# ---- evaluation


def test_devices_together_evaluate_the_global_model_on_each_test_example_once():
    run = Run(FAug(then="fedavg", lr=0.05, **TINY), Skewed(4)).rounds(4)
    task = Task(4, run.algorithm.evaluation_task(run.state))
    model, _ = load_model(task, run.problem, "cpu")
    whole = evaluate_module(model.module, run.problem, "cpu")
    found = run.metrics()
    assert found["accuracy"] == pytest.approx(whole["accuracy"])
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("then", ["fd", "fedavg"])
def test_a_new_device_gets_the_generator_and_learns(then):
    problem = Skewed(3)
    run = Run(FAug(then=then, lr=0.05, iterations=30, **TINY), problem).rounds(4)
    new = Client(3, problem, problem.client(0), None, 3)
    assert run.algorithm.personalise(run.state, 4, new)["accuracy"] > 0.5


# ---- bytes


def test_bytes_of_seeds_and_generator_beside_the_papers_47_989_120_bits():
    """15 seeds of 784 bytes as int8, and the generator with its embedding of 1,000."""
    problem = Scarce(clients=2, tests=1)
    algorithm = FAug(gan_steps=1, gan_batch=2)
    run = Run(algorithm, problem)
    sent = run.round()[0]
    assert len(sent.features["labels"]) == 15
    up = make_codec("features(int8, none)").encode(sent.features, 0)
    assert up.nbytes == 15 * 784 + 15 + 8  # pixels; labels; a minimum and a step
    task = algorithm.task(run.state, 0)
    down = make_codec("raw").encode(task.weights, 0).nbytes
    exact = make_codec("raw").encode(task.exact, 0).nbytes
    labels = len(run.state.gan.labels)
    statistics = 2 * (256 + 512 + 1024)  # running means and variances, which are exact
    assert down == 4 * (1_494_520 - statistics)
    assert exact == 4 * statistics + 8 * (3 + labels)
    table = 2 * 16 * (400 + 10)  # every label has its row, and a byte for its count
    ours = 8 * (table + up.nbytes + down + exact)
    paper = 47_989_120  # bits in Table 1
    assert paper == 102_400 + 32 * 1_493_520 + 8 * 15 * 784
    assert ours - paper == 8 * (2 * 16 * 10 + 15 + 8 + 4_000 + 8 * (3 + labels))


def test_pixels_come_back_from_int8_within_half_a_grey_level():
    sent = Run(FAug(gan_steps=1, gan_batch=2), Scarce(clients=2, tests=1)).round()[0]
    x = sent.features["features"]
    back = decode(make_codec("features(int8, none)").encode(sent.features, 0))["features"]
    assert (back - x).abs().max() <= (x.max() - x.min()) / 255 / 2 + 1e-6


def test_a_generator_of_other_widths_is_refused():
    run = Run(FAug(**TINY), Skewed(3)).rounds(1)
    other = FAug(**{**TINY, "gan_widths": (4, 4, 5)})
    with pytest.raises(ResultError, match="expected"):
        other.train(Task(1, run.algorithm.task(run.state, 0)), run.at(0))


# ---- learning


@pytest.mark.slow
def test_augmented_devices_learn_more_than_distilling_ones_and_averaging_ones_most():
    """Four devices with 300 images of mnist-mini, of which three labels keep 5, by a small GAN."""
    problem = Scarce(clients=4, each=300, keep=5)
    options = {"lr": 0.05, "iterations": 20, "batch_size": 32}
    gan = {"gan_steps": 300, "gan_lr": 1e-3, "gan_widths": (64, 128, 256), "seed": 0}
    found = [
        Run(each, problem).rounds(6).metrics()["accuracy"]
        for each in (
            Distillation(**options),
            FAug(**options, **gan),
            FAug(then="fedavg", **options, **gan),
        )
    ]
    assert found[1] > found[0] + 0.01
    assert found[2] > found[1] + 0.03
