import pytest
import torch

from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.problems import MODELS

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("mlp", MNIST, 50_890),
        ("cnn-mnist", MNIST, 21_840),
        ("2nn", MNIST, 199_210),
        ("cnn", MNIST, 1_663_370),
        ("cnn-cifar", CIFAR, 62_006),
        ("mlp-elu", MNIST, 68_270),
        ("fd-cnn", MNIST, 1_199_648),
    ],
)
def test_the_number_of_parameters_is_that_of_the_source(name, shape, parameters):
    """McMahan et al. state those of 2nn and cnn; the others are derived from the layers."""
    model = MODELS[name](shape, 10)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        *((name, MNIST, classes) for name in MODELS if name != "cnn-cifar" for classes in (10, 62)),
        *((name, CIFAR, classes) for name in MODELS if name != "cnn-mnist" for classes in (10, 99)),
    ],
)
def test_a_batch_becomes_one_logit_a_class(name, shape, classes):
    """Cross-entropy takes logits; a softmax before it would train badly and raise nothing."""
    model = MODELS[name](shape, classes).eval()
    logits = model(torch.linspace(-1, 1, 2 * torch.Size(shape).numel()).view(2, *shape))
    assert logits.shape == (2, classes)
    assert not torch.allclose(logits.exp().sum(dim=1), torch.ones(2)), "these are log-softmax"
    assert not torch.allclose(logits.sum(dim=1), torch.ones(2)), "these are softmax"


def test_the_last_layer_is_the_classifier():
    """Algorithms with a personal head take the last layer for it."""
    for name, factory in MODELS.items():
        layers = list(factory(CIFAR if name == "cnn-cifar" else MNIST, 7).children())
        assert layers[-1].out_features == 7


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("cnn-mnist", CIFAR, r"'cnn-mnist': expected images of 1x28x28 .*, got 3x32x32"),
        ("cnn-cifar", MNIST, r"'cnn-cifar': expected images of 3x32x32 .*, got 1x28x28"),
        ("cnn", (1, 3, 9), r"'cnn': expected images of at least 4x4, got 1x3x9"),
    ],
)
def test_a_model_refuses_images_that_do_not_fit_it(name, shape, message):
    """Rather than failing in the middle of the first batch."""
    with pytest.raises(ProblemError, match=message):
        MODELS[name](shape, 10)
