"""Sub-models: some units of a model's hidden layers, packed into a smaller dense model.

A model is a chain of layers, an `nn.Sequential` of known ones. Dropping a unit of a fully connected
layer, or a filter of a convolution, drops its rows there, its channel of a following BatchNorm, and
its columns in the next layer. All sub-models with the same number of units have the same shapes;
they differ in their coordinates in the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.toolkit.layout import Layout, Slot

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_WEIGHTED = (nn.Linear, *_CONVS)
_OWN = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_SMOOTH = (nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Tanh, nn.Sigmoid)
_PIECEWISE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_PER_UNIT = (nn.Identity, *_SMOOTH, *_PIECEWISE, *_DROPOUTS)
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVG_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ADAPTIVE_MAX = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
_ADAPTIVE_AVG = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_POOLS = (*_MAX_POOLS, *_AVG_POOLS, *_ADAPTIVE_MAX, *_ADAPTIVE_AVG)


@dataclass(frozen=True)
class Hidden:
    """A layer whose units can be dropped; units are those of a dense layer, or filters."""

    name: str
    units: int


@dataclass(frozen=True)
class Axis:
    """A dimension of a tensor that follows the units of a hidden layer.

    hidden: index of the layer, in the model's order.
    span: consecutive positions of a unit; after a Flatten a channel has height * width.
    """

    hidden: int
    span: int


Axes = Mapping[str, tuple[Axis | None, ...]]
"""The first dimensions of tensors by name; None, and the rest, keep their size."""
Units = Sequence[np.ndarray[tuple[int], np.dtype[np.int64]]]
"""The kept units of each hidden layer, in ascending order."""


@dataclass(frozen=True)
class SubModels:
    """All sub-models of a model with given numbers of units.

    whole, small: layouts of the model and of its sub-models, with the same names.
    kept: number of units of each hidden layer in a sub-model.
    """

    whole: Layout
    small: Layout
    hidden: tuple[Hidden, ...]
    kept: tuple[int, ...]
    axes: Axes

    @classmethod
    def of(cls, problem: Problem, keep: float) -> SubModels:
        """Return the sub-models that keep ``round(keep * units)`` of each layer, at least one.

        Raises:
            ProblemError: the problem's model has a layer that cannot be cut.
        """
        module = problem.model()
        whole = Layout.of(module)
        hidden, axes = find_axes(module)
        kept = tuple(max(1, round(keep * each.units)) for each in hidden)
        return cls(whole, Layout.of(shrink(module, axes, kept)), hidden, kept, axes)

    @property
    def cut(self) -> bool:
        """Return whether sub-models are smaller than the model."""
        return self.small.dim < self.whole.dim

    def draw(self, rng: np.random.Generator) -> Units:
        """Return the units of a random sub-model, each choice equally likely."""
        return [
            np.sort(rng.choice(each.units, count, replace=False)).astype(np.int64)
            for each, count in zip(self.hidden, self.kept, strict=True)
        ]

    def index(self, units: Units) -> Tensor:
        """Return the coordinates of a sub-model's weights in the whole, int64 [small.dim]."""
        pieces = [
            self._index_of(slot, small, units).reshape(-1)
            for slot, small in zip(self.whole.weights, self.small.weights, strict=True)
        ]
        return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)

    def _index_of(self, slot: Slot, small: Slot, units: Units) -> Tensor:
        index = torch.tensor(slot.start)
        stride = slot.size
        axes = self.axes.get(slot.name, ())
        for at, (size, length) in enumerate(zip(slot.shape, small.shape, strict=True)):
            stride //= max(size, 1)
            axis = axes[at] if at < len(axes) else None
            positions = torch.arange(length)
            if axis is not None:
                first = torch.from_numpy(units[axis.hidden]) * axis.span
                positions = (first[:, None] + torch.arange(axis.span)).reshape(-1)
            index = index[..., None] + positions * stride
        return index


class SubProblem(Problem):
    """A problem whose model is a sub-model; its data, loss and metrics are the whole's.

    Raises:
        ProblemError: the problem's model has a layer that cannot be cut.
    """

    def __init__(self, whole: Problem, keep: float) -> None:
        self.whole, self.keep = whole, keep
        self.clients = whole.clients
        self.parts = SubModels.of(whole, keep)

    def model(self) -> nn.Module:
        """Return a module with a sub-model's shapes; its values are not those of a sub-model."""
        return shrink(self.whole.model(), self.parts.axes, self.parts.kept)

    def client(self, index: int) -> Examples:
        """Return a client's examples."""
        return self.whole.client(index)

    def test(self) -> Examples:
        """Return the test examples."""
        return self.whole.test()

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the loss of a batch."""
        return self.whole.loss(outputs, y)

    def metrics(self, outputs: Tensor, y: Tensor) -> Mapping[str, float]:
        """Return the metrics of a batch."""
        return self.whole.metrics(outputs, y)


def find_axes(module: nn.Module) -> tuple[tuple[Hidden, ...], Axes]:
    """Return a model's hidden layers, and the dimensions of tensors that follow them.

    Neither the inputs nor the outputs of the last layer with weights (the logits) belong to a
    hidden layer.

    Raises:
        ProblemError: a layer cannot be cut; the message has its name.
    """
    walk = _Walk(module)
    for name, layer in walk.chain:
        walk.take(name, layer)
    return tuple(walk.hidden), walk.axes


def shrink(module: nn.Module, axes: Axes, kept: Sequence[int]) -> nn.Module:
    """Give a module's tensors the shapes of a sub-model, in place; return it.

    Args:
        module: module that `find_axes` was called with.
        axes: the axes that it returned.
        kept: number of units of each hidden layer to keep.
    """
    for prefix, layer in _layers("", module):
        for name, tensor in _tensors(layer):
            cut = axes.get(_join(prefix, name))
            if cut is None:
                continue
            where = tuple(slice(None if a is None else kept[a.hidden] * a.span) for a in cut)
            small = tensor.detach()[where].clone()
            if isinstance(tensor, nn.Parameter):
                small = nn.Parameter(small, requires_grad=tensor.requires_grad)
            setattr(layer, name, small)
            if isinstance(layer, _NORMS):
                layer.num_features = small.shape[0]
        # torch computes with the shapes; these attributes are for readers of the module.
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, _CONVS):
            layer.out_channels, layer.in_channels = layer.weight.shape[:2]
    return module


class _Walk:
    """Follow the units of a hidden layer through the layers after it.

    Attributes:
        chain: the layers by name, in order.
        hidden, axes: results so far.
    """

    def __init__(self, module: nn.Module) -> None:
        self.chain = list(_layers("", module))
        self.hidden: list[Hidden] = []
        self.axes: dict[str, tuple[Axis | None, ...]] = {}
        layout = Layout.of(module)
        self._free = {slot.name for slot in layout.weights + layout.counters}
        """Tensors that no layer has claimed yet."""
        self._last = [name for name, each in self.chain if type(each) in _WEIGHTED][-1:]
        self._units: Hidden | None = None
        """Layer whose units are the next inputs; None for inputs of the model and logits."""
        self._form = ""
        """Their arrangement: [n, "channels", ...], [n, "features"], or "flat" channels."""

    def take(self, name: str, layer: nn.Module) -> None:
        """Take the next layer of the chain."""
        self._claim(name, layer)
        kind = type(layer)
        if isinstance(layer, (nn.Linear, *_CONVS)):
            self._weighted(name, layer)
        elif self._units is None:
            return  # inputs and logits are complete, so any layer may change them
        elif isinstance(layer, _NORMS):
            axis = self._axis(name, layer, layer.num_features)
            for own, _ in _tensors(layer):
                if own != "num_batches_tracked":
                    self.axes[_join(name, own)] = (axis,)
        elif isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1):
            self._form = "flat" if self._form == "channels" else self._form
        elif kind in _POOLS:
            if self._form != "channels":
                raise _refusal(name, layer, "it would pool over units")
        elif kind not in _PER_UNIT:
            raise _refusal(name, layer, "it may mix units, or move them")

    def _weighted(self, name: str, layer: nn.Linear | nn.Module) -> None:
        """Connect a layer's columns to its input units, and register its own units."""
        weight: Tensor = layer.get_parameter("weight")
        if getattr(layer, "groups", 1) != 1:
            raise _refusal(name, layer, "its filters are grouped")
        inputs = None
        if self._units is not None:
            wanted = ("features", "flat") if isinstance(layer, nn.Linear) else ("channels",)
            if self._form not in wanted:
                raise _refusal(name, layer, f"it does not fit behind {self._units.name!r}")
            inputs = self._axis(name, layer, weight.shape[1])
        self._units, outputs = None, None
        if name not in self._last:
            self._units = Hidden(name, weight.shape[0])
            self._form = "features" if isinstance(layer, nn.Linear) else "channels"
            outputs = Axis(len(self.hidden), 1)
            self.hidden.append(self._units)
            self.axes[_join(name, "bias")] = (outputs,)
        if inputs or outputs:
            self.axes[_join(name, "weight")] = (outputs, inputs)

    def _axis(self, name: str, layer: nn.Module, size: int) -> Axis:
        """Return the axis of a dimension that holds the input units."""
        if self._units is None:
            raise RuntimeError("there are no input units")
        span, rest = divmod(size, self._units.units)
        if rest or not span or (span > 1 and self._form != "flat"):
            units = f"{self._units.units} units of {self._units.name!r}"
            raise _refusal(name, layer, f"its {size} inputs do not match the {units}")
        return Axis(len(self.hidden) - 1, span)

    def _claim(self, name: str, layer: nn.Module) -> None:
        """Check that a layer's tensors are not shared, and that their meaning is known."""
        if type(layer) not in (*_WEIGHTED, *_NORMS):
            if (
                next(layer.parameters(), None) is not None
                or next(layer.buffers(), None) is not None
            ):
                raise _refusal(name, layer, "only Linear, Conv and BatchNorm layers are known")
            return
        for own, tensor in _tensors(layer):
            if own not in _OWN:
                raise _refusal(name, layer, f"its tensor {own!r} is not known")
            if own != "num_batches_tracked" and tensor.dtype != torch.float32:
                raise _refusal(name, layer, f"its tensor {own!r} is {tensor.dtype}, not float32")
            if _join(name, own) not in self._free:
                raise _refusal(name, layer, "it shares its weights with another")
            self._free.remove(_join(name, own))


def _layers(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that are no `nn.Sequential`, by their names in the state dict."""
    if type(module).forward is not nn.Sequential.forward:
        yield name, module
        return
    for child, each in module._modules.items():  # noqa: SLF001 - named_children skips repeats
        if each is not None:
            yield from _layers(_join(name, child), each)


def _tensors(layer: nn.Module) -> list[tuple[str, Tensor]]:
    return [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _refusal(name: str, layer: nn.Module, why: str) -> ProblemError:
    what = f"layer {name!r}" if name else "the model"
    return ProblemError(f"cannot drop units around {what} ({type(layer).__name__}): {why}")
