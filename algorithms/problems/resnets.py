"""Edge and server networks of split models, as FedGKT pairs them (He, Annavaram, Avestimehr,
"Group Knowledge Transfer", NeurIPS 2020).

An edge network is an extractor, whose feature maps are sent, and a classifier; a server network
takes the feature maps. Extractor and server network together are a ResNet (He, Zhang, Ren, Sun,
"Deep Residual Learning for Image Recognition", CVPR 2016).
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedmq.algorithms.errors import ProblemError

Shape = tuple[int, ...]
"""Channels, height and width of one image or feature map."""

_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut; each with BatchNorm and no bias.

    x: float32 [n, channels, H, W] -> [n, 4 * planes, H / stride, W / stride]. The 3x3
    convolution has the stride; a shortcut that changes the shape is a 1x1 convolution.
    """

    def __init__(self, channels: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        out = _EXPANSION * planes
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(F(x) + shortcut(x))."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class Edge(nn.Module):
    """x -> extractor -> H -> classifier -> logits.

    extractor: float32 [n, C, H, W] -> feature maps, see `feature_shape`.
    classifier: feature maps -> logits [n, classes].
    """

    def __init__(self, extractor: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, classes]."""
        logits: Tensor = self.classifier(self.extractor(x))
        return logits


def resnet8(shape: Shape, classes: int) -> Edge:
    """ResNet-8: a stem, then two bottlenecks of 16 planes.

    x: float32 [n, C, H, W] -> H: [n, 16, H, W], right after the stem; 10,586 parameters for
    3x32x32 and ten classes, 464 of them in the extractor.
    """
    return Edge(
        _stem(shape[0], 16, 1),
        nn.Sequential(Bottleneck(16, 16), Bottleneck(64, 16), *_head(64, classes)),
    )


def tiny_edge(shape: Shape, classes: int) -> Edge:
    """Two convolutions of 8 and 16 channels, for two cores; 1,442 parameters on MNIST.

    x: float32 [n, C, H, W] -> H: [n, 8, H / 2, W / 2], after a first convolution that strides.
    """
    return Edge(
        _stem(shape[0], 8, 2),
        nn.Sequential(_stem(8, 16, 2), *_head(16, classes)),
    )


def bottlenecks(
    feature_shape: Shape, classes: int, blocks: tuple[int, int, int], planes: int = 16
) -> nn.Module:
    """Three stages of bottlenecks, of 1, 2 and 4 times ``planes`` planes, strides 1, 2 and 2.

    H: float32 [n, c, h, w] -> logits [n, classes]. blocks: bottlenecks in each stage.
    """
    layers: list[nn.Module] = []
    channels = feature_shape[0]
    for stage, count in enumerate(blocks):
        for block in range(count):
            stride = 2 if stage and not block else 1
            layers.append(Bottleneck(channels, planes << stage, stride))
            channels = _EXPANSION * (planes << stage)
    return nn.Sequential(*layers, *_head(channels, classes))


def _server(blocks: tuple[int, int, int], planes: int = 16) -> Callable[[Shape, int], nn.Module]:
    return lambda feature_shape, classes: bottlenecks(feature_shape, classes, blocks, planes)


EDGES: Mapping[str, Callable[[Shape, int], Edge]] = {"resnet8": resnet8, "tiny": tiny_edge}
"""By name: ``EDGES[name]((channels, height, width), classes)``."""

SERVERS: Mapping[str, Callable[[Shape, int], nn.Module]] = {
    "resnet55": _server((6, 6, 6)),
    "resnet109": _server((12, 12, 12)),
    "resnet10": _server((1, 1, 1)),
    "tiny": _server((1, 1, 1), 8),
}
"""By name: ``SERVERS[name](feature_shape, classes)``.

With ten classes: on feature maps of 16 channels resnet55 has 590,858 parameters, resnet109
1,147,274 and resnet10 127,178; on those of 8 channels tiny, for two cores, 33,002.
"""


def feature_shape(edge: str, shape: Shape) -> Shape:
    """Return the shape of one image's feature maps.

    Raises:
        ProblemError: no such network, or it does not take images of this shape.
    """
    if edge not in EDGES:
        raise ProblemError(f"expected edge {' or '.join(EDGES)}, got {edge!r}")
    if len(shape) != 3 or min(shape) < 1:
        raise ProblemError(
            f"edge {edge!r}: expected images [channels, height, width], got {list(shape)}"
        )
    if edge == "resnet8":
        return (16, *shape[1:])
    return (8, *((each + 1) // 2 for each in shape[1:]))


def initialised(make: Callable[..., nn.Module], seed: int, *args: Any) -> Any:
    """Return ``make(*args)`` with first values that depend on the seed alone.

    Convolutions: normal with variance 2 / fan-out (He et al., ICCV 2015); BatchNorm: 1 and 0;
    linear layers: uniform within 1 / sqrt(fan-in). torch's global generators are not used, so
    any thread can call it.
    """
    with torch.device("meta"):
        module = make(*args)
    module.to_empty(device="cpu")
    rng = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                fan_out = layer.out_channels * math.prod(layer.kernel_size)
                layer.weight.normal_(0.0, math.sqrt(2.0 / fan_out), generator=rng)
            elif isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()
                layer.weight.fill_(1.0)
                layer.bias.zero_()
            elif isinstance(layer, nn.Linear):
                bound = 1.0 / math.sqrt(layer.in_features)
                layer.weight.uniform_(-bound, bound, generator=rng)
                layer.bias.uniform_(-bound, bound, generator=rng)
    return module


def _stem(channels: int, planes: int, stride: int) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(channels, planes, 3, stride, 1, bias=False),
            bn=nn.BatchNorm2d(planes),
            relu=nn.ReLU(),
        )
    )


def _head(channels: int, classes: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
