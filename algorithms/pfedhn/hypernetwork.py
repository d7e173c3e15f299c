"""A hypernetwork: a small network that outputs the weights of another one.

That of Shamsian, Navon, Fetaya, Chechik, "Personalized Federated Learning using
Hypernetworks", ICML 2021: linear -> hidden, ``layers`` times (ReLU, linear), and one linear
head for each tensor of the target. The heads are stored end to end in one matrix, which computes
the same function.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmq.algorithms.toolkit.flat_model import FlatModel
from fedmq.algorithms.toolkit.layout import Layout

HEADS = "heads"
_SEEDS = 1 << 63


@dataclass(frozen=True)
class VJP:
    """The gradient of <theta, delta> in parts.

    trunk: float32 [trunk parameters]; features: float32 [hidden], whose outer product with
    ``delta`` is the gradient of the heads' weights; embedding: float32 [embedding].
    """

    trunk: Tensor
    features: Tensor
    embedding: Tensor


@dataclass(frozen=True)
class HyperNet:
    """The shape of a hypernetwork h; phi, its parameters, is a float32 vector [layout.dim].

    embedding: D_e, length of a client's embedding v.
    hidden: units of each hidden layer.
    layers: (ReLU, linear) after the first linear.
    outputs: length of theta = h(v; phi).
    """

    embedding: int
    hidden: int
    layers: int
    outputs: int
    layout: Layout

    @classmethod
    def of(cls, embedding: int, hidden: int, layers: int, outputs: int) -> HyperNet:
        """Return the hypernetwork of these sizes."""
        with torch.device("meta"):
            module = _module(embedding, hidden, layers, outputs)
        return cls(embedding, hidden, layers, outputs, Layout.of(module))

    @property
    def trunk(self) -> int:
        """Return the number of elements of phi before the heads."""
        return self.layout.dim - self.outputs * (self.hidden + 1)

    def initial(self, seed: int) -> Tensor:
        """Return phi_0, initialised as torch initialises linear layers."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed % _SEEDS)
            module = _module(self.embedding, self.hidden, self.layers, self.outputs)
        return FlatModel(module).weights

    def theta(self, phi: Tensor, embedding: Tensor) -> Tensor:
        """Return h(v; phi), float32 [outputs]; ``embedding``: v, float32 [embedding]."""
        views = self.layout.views(phi)
        features = self._features(views, embedding)
        return F.linear(features, views[f"{HEADS}.weight"], views[f"{HEADS}.bias"])

    def vjp(self, phi: Tensor, embedding: Tensor, delta: Tensor) -> VJP:
        """Return (d theta / d (phi, v))^T delta: one vector-Jacobian product.

        Args:
            phi: float32 [layout.dim].
            embedding: v, float32 [embedding].
            delta: float32 [outputs].
        """
        trunk = phi[: self.trunk].clone().requires_grad_()
        point = embedding.clone().requires_grad_()
        views = self.layout.views(phi)
        for slot in self.layout.weights:
            if slot.start < self.trunk:
                views[slot.name] = trunk[slot.start : slot.start + slot.size].view(slot.shape)
        with torch.enable_grad():
            features = self._features(views, point)
            above = views[f"{HEADS}.weight"].mT @ delta
            below = torch.autograd.grad(features, (trunk, point), above)
        return VJP(below[0], features.detach(), below[1])

    def add(self, total: Tensor, product: VJP, delta: Tensor, weight: float) -> None:
        """Add ``weight`` times a gradient to ``total``, float32 [layout.dim], in place."""
        total[: self.trunk].add_(product.trunk, alpha=weight)
        views = self.layout.views(total)
        views[f"{HEADS}.weight"].addr_(delta, product.features, alpha=weight)
        views[f"{HEADS}.bias"].add_(delta, alpha=weight)

    def _features(self, views: Mapping[str, Tensor], embedding: Tensor) -> Tensor:
        """Return the inputs of the heads, float32 [hidden]."""
        x = F.linear(embedding, views["first.weight"], views["first.bias"])
        for index in range(self.layers):
            x = F.linear(F.relu(x), views[f"hidden{index}.weight"], views[f"hidden{index}.bias"])
        return x


def largest_magnitude(product: VJP, delta: Tensor) -> float:
    """Return the largest magnitude in a gradient; infinity if a value is NaN or infinite."""
    parts = [_peak(each) for each in (product.trunk, product.embedding)]
    parts.append(_peak(delta) * max(1.0, _peak(product.features)))
    return max(parts)


def _peak(values: Tensor) -> float:
    if not values.numel():
        return 0.0
    low, high = torch.aminmax(values)
    found = max(-low.item(), high.item())
    return found if math.isfinite(found) else math.inf


def _module(embedding: int, hidden: int, layers: int, outputs: int) -> nn.Module:
    parts: OrderedDict[str, nn.Module] = OrderedDict(first=nn.Linear(embedding, hidden))
    for index in range(layers):
        parts[f"hidden{index}"] = nn.Linear(hidden, hidden)
    parts[HEADS] = nn.Linear(hidden, outputs)
    return nn.Sequential(parts)
