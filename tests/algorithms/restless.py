"""Modules that do to themselves what torch allows, and a plain loop of torch to compare with."""

import threading
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.toolkit.sgd import batches
from tests.algorithms.tiny import Tiny


class Base(nn.Module):
    """A linear layer of two inputs and two outputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


class Quiet(Base):
    def forward(self, x):
        return self.layer(x)


class AssignedBuffer(Base):
    """A running mean, and a count, that are assigned."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int32))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.steps = self.steps + 1
        return self.layer(x - self.mean)


class ChangedBuffer(AssignedBuffer):
    """Its twin, which changes them in place."""

    def forward(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
            self.steps += 1
        return self.layer(x - self.mean)


class BufferWithNewData(AssignedBuffer):
    def forward(self, x):
        if self.training:
            self.mean.data = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.steps.data = self.steps + 1
        return self.layer(x - self.mean)


class Swapping(Base):
    """Two buffers that change places."""

    def __init__(self):
        super().__init__()
        self.register_buffer("one", torch.tensor([1.0, 2.0]))
        self.register_buffer("other", torch.tensor([3.0, 5.0]))

    def forward(self, x):
        if self.training:
            self.one, self.other = self.other, self.one
        return self.layer(x * self.one)


class MaxNorm(Base):
    """Weights that are kept within a norm by giving them other data."""

    def forward(self, x):
        self.layer.weight.data = torch.renorm(self.layer.weight.data, 2, 0, 0.3)
        return self.layer(x)


class MaxNormAfter(Base):
    """Likewise, when they have been used."""

    def forward(self, x):
        y = self.layer(x)
        self.layer.weight.data = torch.renorm(self.layer.weight.data, 2, 0, 0.5)
        return y


class NewGradients(Base):
    """Gradients are taken away before each step, as `zero_grad` does."""

    def forward(self, x):
        if self.training:
            for each in self.parameters():
                each.grad = None
        return self.layer(x)


class OwnGradient(Base):
    """The gradient's tensor is replaced by another."""

    def forward(self, x):
        if self.training:
            self.layer.weight.grad = torch.zeros(2, 2)
        return self.layer(x)


class Counting(Base):
    """Its steps get smaller with the calls so far."""

    def __init__(self):
        super().__init__()
        self.calls, self.seen = 0, []

    def forward(self, x):
        self.calls += 1
        self.seen.append(len(x))
        return self.layer(x) / self.calls + len(self.seen)


class Hidden(Base):
    """A plain tensor that is carried from call to call."""

    def __init__(self):
        super().__init__()
        self.hidden = torch.zeros(2)

    def forward(self, x):
        y = self.layer(x + self.hidden)
        self.hidden = 0.5 * self.hidden + x.mean(0)
        return y


class HiddenInPlace(Hidden):
    def forward(self, x):
        y = self.layer(x + self.hidden.clone())
        self.hidden.mul_(0.5).add_(x.mean(0))
        return y


class Cached(Base):
    """A buffer that is registered at the first call, and stays."""

    def forward(self, x):
        if not hasattr(self, "shift"):
            self.register_buffer("shift", x.mean(0))
        return self.layer(x - self.shift)


class SelfThroughAFunction(Base):
    """A function that was made in the constructor changes the module that it knows."""

    def __init__(self):
        super().__init__()
        self.calls, self.log = 0, []
        self.layer.register_forward_hook(lambda *_: self.log.append(1))
        self.shift = lambda: len(self.log) + (0.5 if self.training else 0.0)

    def forward(self, x):
        return self.layer(x) * (1 + 0.1 * self.shift())


class Replacing(Base):
    """A part without parameters is replaced by another."""

    def __init__(self):
        super().__init__()
        self.act = nn.Identity()

    def forward(self, x):
        y = self.act(self.layer(x))
        self.act = nn.Tanh()
        return y


class OldWeightNorm(Base):
    """Its weight is an attribute with a graph, which cannot be copied."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.layer.bias.fill_(0.25)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would have people use the new one
            self.layer = nn.utils.weight_norm(self.layer)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) / self.calls


class OldSpectralNorm(Base):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.layer = nn.utils.spectral_norm(self.layer)

    def forward(self, x):
        return self.layer(x)


class Locked(Counting):
    """What it holds cannot be copied at all."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x):
        with self.lock:
            return super().forward(x)


class Drawing(Base):
    """It has a generator of its own."""

    def __init__(self):
        super().__init__()
        self.source = torch.Generator().manual_seed(5)

    def forward(self, x):
        return self.layer(x + torch.randn(x.shape, generator=self.source))


class Parametrized(Base):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.layer)
        nn.utils.parametrizations.spectral_norm(self.layer, "bias")

    def forward(self, x):
        return self.layer(x)


class TiedLayers(Base):
    def __init__(self):
        super().__init__()
        self.second = nn.Linear(2, 2)
        self.second.weight = self.layer.weight
        self.register_buffer("scale", torch.tensor(1.5))
        self.second.register_buffer("scale", self.scale)

    def forward(self, x):
        return self.second(torch.tanh(self.layer(x))) * self.second.scale


class Recurrent(nn.Module):
    """It holds its parameters in a list beside."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(1, 3, batch_first=True)
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        found, _ = self.rnn(x[..., None])
        return self.last(found[:, -1])


class Fourier(Base):
    """A complex layer that is trained, and a complex buffer, behind a tensor of odd size."""

    def __init__(self):
        super().__init__()
        self.odd = nn.Parameter(torch.ones(3))
        self.complex = nn.Parameter(torch.randn(2, 2, dtype=torch.complex64))
        self.register_buffer("turn", torch.polar(torch.ones(2), torch.tensor([0.3, 1.2])))

    def forward(self, x):
        found = (x.to(torch.complex64) * self.turn) @ self.complex
        return self.layer(found.abs()) + found.real * self.odd[0]


class SparseGradient(Base):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 2, sparse=True)

    def forward(self, x):
        return self.layer(x) + self.table((x[:, 0] > 0).long())


class Statistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))

    def forward(self, x):
        return self.layers(x)


class Caller:
    """Counts its calls; a method of it is a hook."""

    def __init__(self):
        self.calls = 0

    def hook(self, _module, _inputs, outputs):
        self.calls += 1
        return outputs * (1 + 0.1 * self.calls)


class HookOfAnother(Base):
    def __init__(self):
        super().__init__()
        self.caller = Caller()
        self.layer.register_forward_hook(self.caller.hook)

    def forward(self, x):
        return self.layer(x)


class Falling(Base):
    """Integers that go down: steps that are left, a mask that loses an element, a ring's place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("left", torch.tensor(20, dtype=torch.int32))
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool))
        self.register_buffer("place", torch.tensor(4))

    def forward(self, x):
        y = self.layer(x) * (0.1 if self.left > 15 else 1.0)
        if self.training:
            self.left -= 1
            self.mask[0] = False
            self.place.copy_((self.place + 1) % 5)
        return y * self.mask + y


FOLLOWED = [
    Quiet,
    AssignedBuffer,
    ChangedBuffer,
    BufferWithNewData,
    Swapping,
    MaxNorm,
    MaxNormAfter,
    NewGradients,
    OwnGradient,
    Counting,
    Hidden,
    HiddenInPlace,
    Cached,
    SelfThroughAFunction,
    Replacing,
    OldWeightNorm,
    OldSpectralNorm,
    Locked,
    Drawing,
    Parametrized,
    TiedLayers,
    Recurrent,
    Fourier,
    SparseGradient,
    Statistics,
    HookOfAnother,
    Falling,
]


class Restless(Tiny):
    """A problem with a module of one of these kinds; client k has 8 + 5k points."""

    def __init__(self, kind, clients=3, seed=0):
        super().__init__(clients, seed)
        self.module = kind

    def client(self, index):
        data = self.points(100 + index, 8 + 5 * index)
        data.x.add_(0.3 * index)
        return data

    def client_test(self, index):
        return self.points(500 + index, 20)


def by_torch(problem, at, start, algorithm):
    """Return the module that a plain loop of torch makes from named tensors, in one task."""
    module = problem.model()
    module.load_state_dict(start, strict=False)
    trained = [each for each in module.parameters() if each.requires_grad]
    sparse = isinstance(module, SparseGradient)
    optimizer = torch.optim.SGD(
        trained, algorithm.lr, 0.0 if sparse else algorithm.momentum, weight_decay=0.0
    )
    module.train()
    rng = derive_rng(at.seed, "batches")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(at.seed)
        for x, y in batches(at.data, algorithm.batch_size, algorithm.epochs, rng):
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
    return module
