"""The networks that FedGKT pairs: exact sizes, shapes and first values."""

import pytest
import torch

from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.problems.resnets import (
    EDGES,
    SERVERS,
    Bottleneck,
    feature_shape,
    initialised,
)

CIFAR, MNIST = (3, 32, 32), (1, 28, 28)


def parameters(module):
    return sum(each.numel() for each in module.parameters())


def edge(name, shape, seed=0):
    return initialised(EDGES[name], seed, shape, 10)


def server(name, features, seed=0):
    return initialised(SERVERS[name], seed, features, 10)


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("resnet8", CIFAR, 10_586),
        ("resnet8", MNIST, 10_298),
        ("tiny", CIFAR, 1_586),
        ("tiny", MNIST, 1_442),
    ],
)
def test_an_edge_has_exactly_so_many_parameters(name, shape, count):
    assert parameters(edge(name, shape)) == count


@pytest.mark.parametrize(
    ("name", "channels", "count"),
    [
        ("resnet55", 16, 590_858),
        ("resnet109", 16, 1_147_274),
        ("resnet10", 16, 127_178),
        ("tiny", 8, 33_002),
    ],
)
@pytest.mark.parametrize("size", [32, 28])
def test_a_server_has_exactly_so_many_parameters(name, channels, count, size):
    assert parameters(server(name, (channels, size, size))) == count


def test_extractor_and_server_are_resnet_56_and_110():
    stem = parameters(edge("resnet8", CIFAR).extractor)
    assert stem == 464
    assert stem + parameters(server("resnet55", (16, 32, 32))) == 591_322
    assert stem + parameters(server("resnet109", (16, 32, 32))) == 1_147_738


def test_the_full_pair_has_a_ratio_of_55_8_and_108_4():
    small = parameters(edge("resnet8", CIFAR))
    large = [parameters(server(f"resnet{depth}", (16, 32, 32))) for depth in (55, 109)]
    assert [round(each / small, 1) for each in large] == [55.8, 108.4]


def test_a_server_is_as_deep_as_its_name_says():
    """Convolutions on the longest path, and the linear layer."""
    for name, depth in (("resnet55", 55), ("resnet109", 109), ("resnet10", 10)):
        blocks = [each for each in server(name, (16, 8, 8)) if isinstance(each, Bottleneck)]
        assert 3 * len(blocks) + 1 == depth


@pytest.mark.parametrize("shape", [CIFAR, MNIST, (1, 7, 9)])
@pytest.mark.parametrize("name", EDGES)
def test_shapes(name, shape):
    module = edge(name, shape).eval()
    features = module.extractor(torch.zeros(2, *shape))
    assert tuple(features.shape[1:]) == feature_shape(name, shape)
    assert module(torch.zeros(2, *shape)).shape == (2, 10)
    assert server("tiny", features.shape[1:]).eval()(features).shape == (2, 10)


def test_the_paper_s_feature_maps_are_64_kib():
    assert feature_shape("resnet8", CIFAR) == (16, 32, 32)


def test_first_values_follow_from_the_seed_and_leave_torch_s_generator_alone():
    before = torch.get_rng_state()
    one, same, other = (server("tiny", (8, 8, 8), seed).state_dict() for seed in (1, 1, 2))
    assert before.equal(torch.get_rng_state())
    assert all(one[name].equal(same[name]) for name in one)
    assert not one["0.conv1.weight"].equal(other["0.conv1.weight"])
    assert all(each.isfinite().all() for each in one.values())


def test_first_values_are_he_s():
    module = server("resnet55", (16, 8, 8))
    weight = module[13].conv2.weight
    assert weight.shape == (64, 64, 3, 3)
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert module[13].bn2.weight.eq(1).all()
    assert module[13].bn2.running_var.eq(1).all()


def test_a_bottleneck_adds_its_input():
    block = initialised(Bottleneck, 0, 16, 4).eval()
    with torch.no_grad():
        block.bn3.weight.zero_()
    x = torch.rand(2, 16, 3, 3)
    assert block(x).equal(x)


@pytest.mark.parametrize(
    ("name", "shape"), [("lenet", MNIST), ("tiny", (784,)), ("tiny", (1, 0, 3))]
)
def test_an_edge_that_cannot_be(name, shape):
    with pytest.raises(ProblemError, match="edge"):
        feature_shape(name, shape)
