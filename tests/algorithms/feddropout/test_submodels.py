"""Sub-models of a chain of layers: what they hold, what they compute, what cannot be cut."""

import numpy as np
import pytest
import torch
from torch import nn

from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.feddropout.submodels import SubModels, SubProblem, find_axes
from fedmq.algorithms.problems import MODELS
from fedmq.algorithms.toolkit.flat_model import FlatModel
from fedmq.algorithms.toolkit.layout import Layout
from tests.algorithms.tiny import Tiny

SHAPES = {"cnn-cifar": (3, 32, 32)}
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)


class Given(Tiny):
    """A problem whose model is given."""

    def __init__(self, make):
        super().__init__()
        self.module = make


def built_in(name):
    shape = SHAPES.get(name, (1, 28, 28))
    return Given(lambda: MODELS[name](shape, 10)), torch.randn(4, *shape)


def normed():
    """BatchNorms of channels, of what a Flatten makes of them, and of units; no biases."""
    return nn.Sequential(
        nn.Sequential(
            nn.BatchNorm2d(2),
            nn.Conv2d(2, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        ),
        nn.Flatten(),
        nn.BatchNorm1d(24),
        nn.Linear(24, 8, bias=False),
        nn.BatchNorm1d(8, affine=False),
        nn.Sigmoid(),
        nn.Linear(8, 3),
        nn.BatchNorm1d(3),
        nn.LogSoftmax(dim=1),
    )


def all_conv():
    """As the paper's CIFAR model: the logits are filters, and averaged over places."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(6, 5, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


OWN = {
    "normed": (Given(normed), torch.randn(4, 2, 9, 9)),
    "all convolutions": (Given(all_conv), torch.randn(4, 2, 9, 9)),
    "one dimension": (
        Given(
            lambda: nn.Sequential(
                nn.Conv1d(2, 4, 3), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(12, 3)
            )
        ),
        torch.randn(4, 2, 8),
    ),
}
EVERY = {**{name: built_in(name) for name in MODELS}, **OWN}


def drawn(problem, keep=0.6, seed=0):
    """Return the sub-models, one of them, and where its weights lie."""
    parts = SubModels.of(problem, keep)
    units = parts.draw(np.random.default_rng(seed))
    return parts, units, parts.index(units)


def loaded(module, vector):
    """Return a module with these weights."""
    model = FlatModel(module)
    model.load(vector, model.read_counters())
    return model.module


def multiply_adds(module, x):
    """Count those of the convolutions and fully connected layers, for one example."""
    counts = []

    def count(layer, inputs, output):
        columns = layer.weight[0].numel()
        counts.append(columns * output[0].numel())

    for each in module.modules():
        if isinstance(each, WEIGHTED):
            each.register_forward_hook(count)
    module(x[:1])
    return sum(counts)


# ---- what they hold


def test_three_quarters_of_the_cnn_of_the_paper_are_936874_parameters():
    """24, 48 and 384 units; 1.775 times fewer of 1,663,370."""
    parts, _, index = drawn(built_in("cnn")[0], 0.75)
    assert parts.whole.dim == 1_663_370
    assert parts.kept == (24, 48, 384)
    assert parts.small.dim == len(index) == 936_874


def test_three_quarters_of_the_cnn_are_at_least_1_7_times_fewer_multiply_adds():
    problem, x = built_in("cnn")
    whole = multiply_adds(problem.model(), x)
    small = multiply_adds(SubProblem(problem, 0.75).model(), x)
    assert whole == 28 * 28 * 25 * 32 + 14 * 14 * 25 * 32 * 64 + 3136 * 512 + 512 * 10
    assert whole / small >= 1.7


@pytest.mark.parametrize("name", EVERY)
def test_a_sub_model_has_the_names_of_the_whole_and_no_coordinate_twice(name):
    problem, _ = EVERY[name]
    parts, _, index = drawn(problem)
    assert [s.name for s in parts.small.weights] == [s.name for s in parts.whole.weights]
    assert parts.small == Layout.of(SubProblem(problem, 0.6).model())
    assert parts.small.parameters < parts.whole.parameters
    assert len(index.unique()) == len(index) == parts.small.dim
    assert 0 <= index.min() <= index.max() < parts.whole.dim
    trained = index[: parts.small.parameters]
    assert trained.max() < parts.whole.parameters <= min([*index[len(trained) :], 1 << 40])


def test_inputs_and_logits_are_never_left_out():
    parts, units, index = drawn(built_in("cnn")[0], 0.01)
    assert [each.name for each in parts.hidden] == ["conv1", "conv2", "fc1"]
    assert [len(each) for each in units] == [1, 1, 5]
    shapes = {slot.name: slot.shape for slot in parts.small.weights}
    assert shapes["conv1.weight"] == (1, 1, 5, 5)
    assert shapes["fc1.weight"] == (5, 49)
    assert shapes["fc2.weight"] == (10, 5)
    assert shapes["fc2.bias"] == (10,)
    whole = parts.whole.views(torch.arange(parts.whole.dim))["fc2.bias"]
    assert parts.small.views(index)["fc2.bias"].equal(whole)


def test_a_filter_takes_the_columns_of_its_places_with_it():
    """Two of four filters; each has three places behind the pooling and the Flatten."""
    problem, _ = OWN["one dimension"]
    parts = SubModels.of(problem, 0.5)
    index = parts.index([np.array([1, 3])])
    whole = torch.arange(parts.whole.dim)
    columns = parts.whole.views(whole)["3.weight"][:, [3, 4, 5, 9, 10, 11]]
    assert parts.small.views(index)["3.weight"].equal(columns)
    assert parts.small.views(index)["0.weight"].equal(parts.whole.views(whole)["0.weight"][[1, 3]])


def test_a_model_without_hidden_layers_is_sent_whole():
    parts, units, index = drawn(Tiny(), 0.1)
    assert not parts.cut
    assert not units
    assert index.equal(torch.arange(6))


@pytest.mark.parametrize("name", EVERY)
def test_all_units_are_the_model_itself(name):
    parts, _, index = drawn(EVERY[name][0], 1.0)
    assert not parts.cut
    assert index.equal(torch.arange(parts.whole.dim))


# ---- what they compute


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", EVERY)
def test_a_sub_model_computes_what_the_whole_does_with_the_other_units_silenced(name, mode):
    """Silenced: zero where they come into the next layer. Nothing is scaled by 1/p."""
    problem, x = EVERY[name]
    parts, units, index = drawn(problem)
    vector = torch.randn(parts.whole.dim).mul_(0.1)
    for tensor, value in parts.whole.views(vector).items():
        if tensor.endswith("running_var"):
            value.abs_().add_(0.5)
    whole = loaded(problem.model(), vector)
    small = loaded(SubProblem(problem, 0.6).model(), vector[index])
    layers = [each for each in whole.modules() if isinstance(each, WEIGHTED)]
    for layer, kept, hidden in zip(layers[1:], units, parts.hidden, strict=True):

        def silence(layer, inputs, kept=kept, hidden=hidden):
            (incoming,) = inputs
            mask = torch.zeros(hidden.units)
            mask[torch.from_numpy(kept)] = 1.0
            mask = mask.repeat_interleave(incoming.shape[1] // hidden.units)
            return incoming * mask.view(1, -1, *[1] * (incoming.dim() - 2))

        layer.register_forward_pre_hook(silence)
    for module in (whole, small):
        module.train(mode == "train")
        for each in module.modules():
            if isinstance(each, nn.Dropout | nn.Dropout2d):
                each.eval()  # would draw other numbers
    torch.testing.assert_close(small(x), whole(x), rtol=1e-4, atol=1e-5)


def test_a_sub_models_module_tells_its_own_sizes():
    text = repr(SubProblem(OWN["normed"][0], 0.5).model())
    for size in ("Conv2d(2, 3,", "BatchNorm2d(3,", "BatchNorm1d(12,", "BatchNorm1d(4,"):
        assert size in text
    assert "Linear(in_features=12, out_features=4, bias=False)" in text
    assert "BatchNorm2d(2," in text


def test_what_is_not_trained_is_not_trained_in_a_sub_model():
    def half_frozen():
        module = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
        module[0].weight.requires_grad_(requires_grad=False)
        return module

    parts, _, index = drawn(Given(half_frozen), 0.5)
    assert parts.small.weights[-1].name == parts.whole.weights[-1].name == "0.weight"
    assert parts.small.parameters == 2 + 2 * 2 + 2
    assert index[parts.small.parameters :].min() >= parts.whole.parameters


def test_the_rest_of_the_problem_is_that_of_the_whole():
    whole = Tiny(3)
    part = SubProblem(whole, 0.5)
    assert part.clients == 3
    assert part.client(2).x.equal(whole.client(2).x)
    assert part.test().x.equal(whole.test().x)
    outputs = torch.randn(40, 2)
    assert part.loss(outputs, part.test().y) == whole.loss(outputs, whole.test().y)
    assert part.metrics(outputs, part.test().y) == whole.metrics(outputs, whole.test().y)


# ---- what they are drawn from


@pytest.mark.parametrize("keep", [0.25, 0.75])
def test_every_unit_is_kept_as_often_as_any_other(keep):
    """A fixed number of eight; each is in with probability p."""
    parts = SubModels.of(Given(lambda: nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 2))), keep)
    draws = 2000
    counts = np.zeros(8)
    rng = np.random.default_rng(1)
    for _ in range(draws):
        (units,) = parts.draw(rng)
        assert len(set(units)) == len(units) == 8 * keep
        assert sorted(units) == list(units)
        counts[units] += 1
    assert abs(counts / draws - keep).max() < 4 * np.sqrt(keep * (1 - keep) / draws)


# ---- what cannot be cut


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.inner(x)


class Backwards(nn.Sequential):
    def forward(self, x):
        for each in reversed(self):
            x = each(x)
        return x


class Double(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def twice():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


def tied():
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    module[2].weight = module[0].weight
    return module


def between(*layers):
    return lambda: nn.Sequential(nn.Linear(2, 4), *layers, nn.Linear(4, 2))


def behind(*layers, channels=4):
    return lambda: nn.Sequential(nn.Conv2d(1, channels, 3), *layers)


REFUSED = {
    "a residual block": (between(Residual()), r"layer '1' \(Residual\): only Linear, Conv"),
    "a custom model": (Residual, r"the model \(Residual\): only Linear, Conv and BatchNorm"),
    "an LSTM": (lambda: nn.Sequential(nn.LSTM(2, 4), nn.Linear(4, 2)), r"layer '0' \(LSTM\)"),
    "another order": (lambda: Backwards(nn.Linear(2, 4), nn.Linear(4, 2)), "Backwards"),
    "a layer of one's own": (between(Double(4, 4)), r"layer '1' \(Double\)"),
    "LayerNorm": (between(nn.LayerNorm(4)), r"layer '1' \(LayerNorm\)"),
    "LayerNorm without weights": (
        between(nn.LayerNorm(4, elementwise_affine=False)),
        r"layer '1' \(LayerNorm\): it may mix units",
    ),
    "Softmax": (between(nn.Softmax(1)), "it may mix units, or move them"),
    "Unflatten": (between(nn.Unflatten(1, (2, 2)), nn.Flatten()), r"layer '1' \(Unflatten\)"),
    "a Flatten of everything": (behind(nn.Flatten(0), nn.Linear(4, 2)), r"layer '1' \(Flatten\)"),
    "pooling of units": (between(nn.MaxPool1d(1)), "it would pool over units"),
    "grouped filters": (behind(nn.Conv2d(4, 4, 3, groups=2)), "'1' .* its filters are grouped"),
    "no Flatten": (behind(nn.Linear(4, 2)), "'1' .*: it does not fit behind '0'"),
    "a convolution of units": (between(nn.Conv1d(4, 4, 1)), "it does not fit behind '0'"),
    "a repeated layer": (twice, r"layer '2' \(Linear\): it shares its weights with another"),
    "tied weights": (tied, r"layer '2' \(Linear\): it shares its weights with another"),
    "other inputs": (
        between(nn.Linear(8, 4)),
        "its 8 inputs do not match the 4 units of '0'",
    ),
    "no multiple": (
        behind(nn.Flatten(), nn.Linear(10, 2)),
        "its 10 inputs do not match the 4",
    ),
    "weight_norm": (
        between(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
        r"layer '1' \(ParametrizedLinear\)",
    ),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_cannot_be_cut_is_named(which):
    make, message = REFUSED[which]
    with pytest.raises(ProblemError, match=message) as caught:
        find_axes(make())
    assert str(caught.value).startswith("cannot drop units around ")
    assert "\n" not in str(caught.value)


def test_inputs_may_be_moved_and_logits_mixed():
    """Nothing is left out of either."""
    module = nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(24, 2), nn.Softmax(1)
    )
    hidden, axes = find_axes(module)
    assert [(each.name, each.units) for each in hidden] == [("1", 4)]
    assert {name: [a and a.span for a in each] for name, each in axes.items()} == {
        "1.weight": [1, None],
        "1.bias": [1],
        "3.weight": [None, 6],
    }
