"""A module as flat vectors, and what it scores."""

import pytest
import torch
from torch import nn

from fedmq.algorithms.base import Task
from fedmq.algorithms.errors import ProblemError, ResultError
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.toolkit.flat_model import FlatModel
from fedmq.algorithms.toolkit.layout import Layout
from fedmq.algorithms.toolkit.sgd import evaluate_module
from tests.algorithms.tiny import Normed, Tiny, payload


def test_parameters_come_first_then_statistics_and_counters_apart():
    layout = Layout.of(Normed().model())
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]
    assert [slot.name for slot in layout.weights] == [*names, "1.running_mean", "1.running_var"]
    assert [slot.size for slot in layout.weights] == [6, 3, 3, 3, 6, 2, 3, 3]
    assert [slot.start for slot in layout.weights] == [0, 6, 9, 12, 15, 21, 23, 26]
    assert [(slot.name, slot.shape) for slot in layout.counters] == [("1.num_batches_tracked", ())]
    assert (layout.dim, layout.parameters) == (29, 23)


def test_views_share_the_vector_and_flatten_is_their_inverse_without_a_copy():
    layout = Layout.of(Normed().model())
    vector = torch.arange(29.0)
    views = layout.views(vector)
    assert views["0.weight"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert layout.flatten(views).data_ptr() == vector.data_ptr()
    views["0.bias"].fill_(-1.0)
    assert vector[6:9].tolist() == [-1, -1, -1]


def test_tensors_that_lie_elsewhere_are_flattened_in_the_models_order():
    layout = Layout.of(nn.Linear(1, 2))
    tensors = {"bias": torch.tensor([3.0, 4.0]), "weight": torch.tensor([[1.0], [2.0]])}
    assert layout.flatten(tensors).tolist() == [1, 2, 3, 4]


def test_a_model_without_counters_has_an_empty_counter_vector():
    layout = Layout.of(nn.Linear(1, 1))
    assert layout.flatten_counters({}).tolist() == []
    with pytest.raises(ResultError, match="expected no tensor 'n'"):
        layout.flatten_counters({"n": torch.zeros(1, dtype=torch.int64)})


def test_weights_that_are_not_float32_are_refused():
    with pytest.raises(ProblemError, match=r"float32 weights, got torch\.float64 for weight"):
        Layout.of(nn.Linear(1, 1).double())


def test_a_flat_model_is_its_module():
    """Weights, gradients and statistics of the module are views of the vectors."""
    module = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    with torch.no_grad():
        module[0].weight.fill_(2.0)
    model = FlatModel(module)
    assert model.weights.tolist()[0] == 2.0
    model.weights[0] = 5.0
    assert module[0].weight.item() == 5.0
    module[0](torch.ones(3, 1)).sum().backward()
    assert model.gradient.tolist() == [3.0, 3.0, 0.0, 0.0]
    module.train()(torch.tensor([[0.0], [2.0]]))
    statistics = model.layout.views(model.weights)
    assert statistics["1.running_mean"].item() == module[1].running_mean.item() != 0
    assert model.read_counters().tolist() == [1]
    assert model.trained.data_ptr() == model.weights.data_ptr()
    assert len(model.trained) == 4


def test_loading_copies_weights_and_counters_in():
    model = FlatModel(Normed().model())
    weights = torch.arange(29.0)
    model.load(weights, torch.tensor([7]))
    assert model.module[1].num_batches_tracked.item() == 7
    assert model.module[2].bias.tolist() == [21, 22]
    model.weights.zero_()
    assert weights[28] == 28


class Mixed(nn.Module):
    """Integer buffers of several types, and tied weights."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(1, 1)
        self.two = self.one
        self.register_buffer("steps", torch.tensor([1, 2], dtype=torch.int32))
        self.register_buffer("mask", torch.tensor([True, False]))


def test_integer_buffers_of_any_type_travel_as_int64_and_return():
    model = FlatModel(Mixed())
    assert model.read_counters().tolist() == [1, 2, 1, 0]
    assert model.layout.dim == 2
    model.load(model.weights.clone(), torch.tensor([5, 6, 0, 1]))
    assert model.module.steps.tolist() == [5, 6]
    assert model.module.mask.tolist() == [False, True]


class Known(Tiny):
    """Five points whose class is the sign of x; the model below errs on the last two."""

    def test(self):
        x = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [-4.0, 0.0]])
        return Examples(x, torch.tensor([0, 1, 1, 0, 1]))


@pytest.mark.parametrize("batch", [500, 2])
def test_a_known_model_scores_what_it_should(monkeypatch, batch):
    """Logits (0, x): 3 of 5 right; averaged over examples, whatever the batches."""
    monkeypatch.setattr("fedmq.algorithms.toolkit.sgd._EVALUATION_BATCH", batch)
    problem = Known()
    state = FedAvg().start(problem)
    sent = payload(state, [0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    metrics = FedAvg().evaluate(Task(0, sent), problem, "cpu")
    right = torch.tensor([1.0, 1.0, 2.0]).neg().exp().log1p().sum()
    wrong = torch.tensor([3.0, 4.0]).exp().log1p().sum()
    assert metrics == pytest.approx({"accuracy": 0.6, "loss": (right + wrong).item() / 5})


def test_evaluation_uses_the_running_statistics_and_leaves_them():
    problem = Normed()
    model = FlatModel(problem.model())
    before = model.weights.clone()
    evaluate_module(model.module, problem, "cpu")
    assert torch.equal(model.weights, before)
    assert model.read_counters().tolist() == [0]


def test_evaluating_draws_nothing():
    problem = Tiny()
    state = FedAvg().start(problem)
    before = torch.random.get_rng_state()
    FedAvg().evaluate(Task(0, payload(state, 0.5)), problem, "cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
