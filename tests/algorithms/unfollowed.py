"""Modules that do to themselves what cannot be followed; ``name`` is the tensor's that it is."""

import torch
from torch import nn

from tests.algorithms.restless import Base, TiedLayers


class ReplacedParameter(Base):
    name = "layer.weight"

    def forward(self, x):
        self.layer.weight = nn.Parameter(self.layer.weight * 0.9)
        return self.layer(x)


class ViewOfParameter(Base):
    """What it clamps is not the weight any more, once that lies elsewhere."""

    name = "layer.weight"

    def __init__(self):
        super().__init__()
        self.values = self.layer.weight.detach()

    def forward(self, x):
        self.values.clamp_(-0.1, 0.1)
        return self.layer(x)


class ArrayOfBuffer(Base):
    name = "mean"

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.held = {"rows": [self.mean.numpy()]}

    def forward(self, x):
        return self.layer(x) - self.held["rows"][0].sum()


class ReplacedLayer(Base):
    name = "layer.weight"

    def forward(self, x):
        y = self.layer(x)
        self.layer = nn.Linear(2, 2)
        return y


class AddedParameter(Base):
    name = "more"

    def forward(self, x):
        if not hasattr(self, "more"):
            self.more = nn.Parameter(torch.ones(2))
        return self.layer(x) * self.more


class Unfreezing(Base):
    name = "layer.bias"

    def __init__(self):
        super().__init__()
        self.layer.bias.requires_grad_(requires_grad=False)

    def forward(self, x):
        if self.training:
            self.layer.bias.requires_grad_()
        return self.layer(x)


class _Buffered(Base):
    name = "mean"

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        if self.training:
            self.change(x)
        return self.layer(x)


class GrowingBuffer(_Buffered):
    def change(self, x):
        self.mean = torch.cat([self.mean, x.mean(0)])


class BufferOfAnotherDtype(_Buffered):
    def change(self, x):
        self.mean = x.mean(0).double()


class RemovedBuffer(_Buffered):
    def change(self, x):
        del self.mean


class BufferSetToNone(_Buffered):
    def change(self, x):
        self.mean = None


class ResizedWeight(Base):
    name = "layer.weight"

    def forward(self, x):
        y = self.layer(x)
        self.layer.weight.data = torch.zeros(3, 2)
        return y


class ChangedDouble(_Buffered):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2, dtype=torch.float64))

    def change(self, x):
        self.mean += x.mean(0)


class PartedBuffers(TiedLayers):
    name = "second.scale"

    def forward(self, x):
        self.second.scale = self.second.scale * 0.9
        return super().forward(x)


REFUSED = [
    ReplacedParameter,
    ReplacedLayer,
    AddedParameter,
    Unfreezing,
    GrowingBuffer,
    BufferOfAnotherDtype,
    RemovedBuffer,
    BufferSetToNone,
    ResizedWeight,
    ChangedDouble,
    PartedBuffers,
]
