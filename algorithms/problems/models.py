"""The models of the papers that fedmq re-implements; all return logits.

A model is an `nn.Sequential` of named layers, whose names are those in its ``state_dict``. The last
layer is the classifier, with one logit a class. Shapes in comments are those of one MNIST or CIFAR
batch of n images.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping

from torch import nn

from fedmq.algorithms.errors import ProblemError

Shape = tuple[int, ...]
"""Channels, height and width of one image."""


def mlp(shape: Shape, classes: int) -> nn.Module:
    """Multi-layer perceptron with 64 hidden units, ReLU and dropout 0.5.

    x: float32 [n, C, H, W] -> logits [n, classes]; 50,890 parameters on MNIST. The MLP of
    the public FedAvg re-implementations by AshwinRJ and shaoxiongji, without their softmax:
    the cross-entropy that they train with takes logits.
    """
    return _named(
        flatten=nn.Flatten(),
        fc1=nn.Linear(math.prod(shape), 64),
        dropout=nn.Dropout(0.5),
        relu=nn.ReLU(),
        fc2=nn.Linear(64, classes),
    )


def cnn_mnist(shape: Shape, classes: int) -> nn.Module:
    """Small CNN with dropout for 28x28 grey images; 21,840 parameters for ten classes.

    x: float32 [n, 1, 28, 28] -> logits [n, classes]. The MNIST CNN of the re-implementations
    by AshwinRJ and shaoxiongji; it is not McMahan's, which is `cnn`.
    """
    _require("cnn-mnist", shape, (1, 28, 28))
    return _named(
        conv1=nn.Conv2d(1, 10, 5),  # [n, 10, 24, 24]
        pool1=nn.MaxPool2d(2),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(10, 20, 5),  # [n, 20, 8, 8]
        dropout2=nn.Dropout2d(0.5),
        pool2=nn.MaxPool2d(2),
        relu2=nn.ReLU(),
        flatten=nn.Flatten(),  # [n, 320]
        fc1=nn.Linear(320, 50),
        relu3=nn.ReLU(),
        dropout3=nn.Dropout(0.5),
        fc2=nn.Linear(50, classes),
    )


def cnn_cifar(shape: Shape, classes: int) -> nn.Module:
    """LeNet-like CNN for 32x32 colour images; 62,006 parameters for ten classes.

    x: float32 [n, 3, 32, 32] -> logits [n, classes]. The CIFAR CNN of the
    re-implementations by AshwinRJ and shaoxiongji, and of PyTorch's own tutorial.
    """
    _require("cnn-cifar", shape, (3, 32, 32))
    return _named(
        conv1=nn.Conv2d(3, 6, 5),  # [n, 6, 28, 28]
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(6, 16, 5),  # [n, 16, 10, 10]
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),  # [n, 400]
        fc1=nn.Linear(400, 120),
        relu3=nn.ReLU(),
        fc2=nn.Linear(120, 84),
        relu4=nn.ReLU(),
        fc3=nn.Linear(84, classes),
    )


def two_nn(shape: Shape, classes: int) -> nn.Module:
    """McMahan's 2NN: two hidden layers of 200 units; 199,210 parameters on MNIST.

    x: float32 [n, C, H, W] -> logits [n, classes]. McMahan et al., AISTATS 2017, section 3.
    """
    return _named(
        flatten=nn.Flatten(),
        fc1=nn.Linear(math.prod(shape), 200),
        relu1=nn.ReLU(),
        fc2=nn.Linear(200, 200),
        relu2=nn.ReLU(),
        fc3=nn.Linear(200, classes),
    )


def cnn(shape: Shape, classes: int) -> nn.Module:
    """McMahan's CNN: two 5x5 convolutions and 512 units; 1,663,370 parameters on MNIST.

    x: float32 [n, C, H, W] -> logits [n, classes]. McMahan et al., AISTATS 2017, section 3.
    The paper does not state the padding; only SAME yields its number of parameters.
    """
    channels, height, width = shape
    if height < 4 or width < 4:
        raise ProblemError(f"model 'cnn': expected images of at least 4x4, got {_text(shape)}")
    return _named(
        conv1=nn.Conv2d(channels, 32, 5, padding="same"),  # [n, 32, 28, 28]
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(32, 64, 5, padding="same"),  # [n, 64, 14, 14]
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),  # [n, 3136]
        fc1=nn.Linear(64 * (height // 4) * (width // 4), 512),
        relu3=nn.ReLU(),
        fc2=nn.Linear(512, classes),
    )


def mlp_elu(shape: Shape, classes: int) -> nn.Module:
    """Multi-layer perceptron with hidden layers of 80 and 60 units and ELU; 68,270 on MNIST.

    x: float32 [n, C, H, W] -> logits [n, classes]. The model of Fallah et al., NeurIPS 2020, as in
    public re-implementations, without their ELU and softmax on the logits.
    """
    return _named(
        flatten=nn.Flatten(),
        fc1=nn.Linear(math.prod(shape), 80),
        elu1=nn.ELU(),
        fc2=nn.Linear(80, 60),
        elu2=nn.ELU(),
        fc3=nn.Linear(60, classes),
    )


def fd_cnn(shape: Shape, classes: int) -> nn.Module:
    """CNN of the devices in federated distillation; 1,199,648 parameters on MNIST, no biases.

    x: float32 [n, C, H, W] -> logits [n, classes]. Jeong et al. 2018, section 4: two
    convolutions, one max-pooling, two fully connected layers. The paper states the number of
    parameters; only 3x3 convolutions without padding and no bias anywhere yield it.
    """
    channels, height, width = shape
    if height < 6 or width < 6:
        raise ProblemError(f"model 'fd-cnn': expected images of at least 6x6, got {_text(shape)}")
    return _named(
        conv1=nn.Conv2d(channels, 32, 3, bias=False),  # [n, 32, 26, 26]
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(32, 64, 3, bias=False),  # [n, 64, 24, 24]
        relu2=nn.ReLU(),
        pool=nn.MaxPool2d(2),
        flatten=nn.Flatten(),  # [n, 9216]
        fc1=nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128, bias=False),
        relu3=nn.ReLU(),
        fc2=nn.Linear(128, classes, bias=False),
    )


MODELS: Mapping[str, Callable[[Shape, int], nn.Module]] = {
    "mlp": mlp,
    "mlp-elu": mlp_elu,
    "cnn-mnist": cnn_mnist,
    "cnn-cifar": cnn_cifar,
    "2nn": two_nn,
    "cnn": cnn,
    "fd-cnn": fd_cnn,
}
"""Factories by name: ``MODELS[name]((channels, height, width), classes)``."""


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _require(model: str, shape: Shape, expected: Shape) -> None:
    if shape != expected:
        raise ProblemError(
            f"model {model!r}: expected images of {_text(expected)} "
            f"(channels x height x width), got {_text(shape)}"
        )


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))
