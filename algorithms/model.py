"""A torch module whose numbers are one flat vector: what travels, and what is averaged."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedmq.algorithms.errors import Fault, ProblemError, ResultError
from fedmq.algorithms.problems.base import Problem
from fedmq.codecs.base import brief
from fedmq.codecs.flat import as_flat
from fedmq.codecs.streamed import Streamed


@dataclass(frozen=True)
class Slot:
    """Where a named tensor lies in a flat vector."""

    name: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Layout:
    """The order of a model's tensors: parameters, then floating-point buffers; integers apart.

    ``weights``: float32 parameters, those with gradients first, and buffers (a BatchNorm's
    running mean and variance).
    They are trained or tracked, sent, and averaged.
    ``counters``: integer buffers (a BatchNorm's num_batches_tracked). An average of
    counts means nothing; the largest of the cohort is taken.
    """

    weights: tuple[Slot, ...]
    counters: tuple[Slot, ...]
    parameters: int
    """Length of the part of the weights that is trained."""

    @property
    def dim(self) -> int:
        """Return the length of the weight vector."""
        return sum(slot.size for slot in self.weights)

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """Return the layout of a module.

        Raises:
            ProblemError: a parameter or floating-point buffer is not float32.
        """
        parameters = list(module.named_parameters())
        trained = [(name, each) for name, each in parameters if each.requires_grad]
        frozen = [(name, each) for name, each in parameters if not each.requires_grad]
        buffers = list(module.named_buffers())
        tracked = [(name, each) for name, each in buffers if each.is_floating_point()]
        counted = [(name, each) for name, each in buffers if not each.is_floating_point()]
        for name, tensor in parameters + tracked:
            if tensor.dtype != torch.float32:
                raise ProblemError(f"expected float32 weights, {name} is {tensor.dtype}")
        return cls(
            tuple(_slots([*trained, *frozen, *tracked])),
            tuple(_slots(counted)),
            sum(each.numel() for _, each in trained),
        )

    def views(self, weights: Tensor) -> dict[str, Tensor]:
        """Return the named tensors within a weight vector [dim], without a copy."""
        return _views(self.weights, weights)

    def counter_views(self, counters: Tensor) -> dict[str, Tensor]:
        """Return the named tensors within a counter vector, without a copy."""
        return _views(self.counters, counters)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return named tensors as one weight vector, float32 [dim]; no copy if they are one.

        Raises:
            ResultError: a name, shape or dtype is not this model's.
        """
        return _flatten(self.weights, tensors, torch.float32)

    def blocks(self, tensors: Mapping[str, Tensor]) -> Iterable[tuple[int, Tensor]]:
        """Return a weight vector in blocks: (where it starts, float32 [length]).

        One block, but for tensors that are read in pieces: those of a large model need
        not be in memory at once, and are read once more by whoever goes over them again.

        Raises:
            ResultError: a name or shape is not this model's.
        """
        if not isinstance(tensors, Streamed):
            return [(0, self.flatten(tensors))]
        wanted = {slot.name: slot.shape for slot in self.weights}
        if dict(tensors.shapes) != wanted or list(tensors.shapes) != list(wanted):
            text = "the tensors' names and shapes are not this model's"
            raise ResultError(text, Fault.WRONG_SHAPE)
        return _StreamedBlocks(tensors)

    def flatten_counters(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return named tensors as one counter vector, int64.

        Raises:
            ResultError: a name, shape or dtype is not this model's.
        """
        return _flatten(self.counters, tensors, torch.int64)


class FlatModel:
    """A module whose parameters, gradients and buffers are views of flat vectors.

    Loading, subtracting, averaging and an optimizer step are then single operations on
    one vector, whatever the number of layers.

    Attributes:
        module: the torch module.
        layout: order of its tensors.
        weights: float32 [dim], shared with the module.
        gradient: float32 [parameters], shared with the parameters' ``grad``.
        counters: int64, copied in and out by `load` and `read_counters`.
    """

    def __init__(self, module: nn.Module, device: torch.device | str = "cpu") -> None:
        self.module = module.to(device)
        self.layout = Layout.of(self.module)
        named = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        self.weights = zeros(self.layout.dim, device)
        self.gradient = zeros(self.layout.parameters, device)
        self._counters = [named[slot.name] for slot in self.layout.counters]
        for slot in self.layout.weights:
            # One by one: a large model is never there twice.
            tensor = named[slot.name]
            place = self.weights[slot.start : slot.start + slot.size].view(slot.shape)
            place.copy_(tensor.detach())
            tensor.data = place
            if slot.start < self.layout.parameters:
                gradient = self.gradient[slot.start : slot.start + slot.size]
                tensor.grad = gradient.view(slot.shape)

    @property
    def trained(self) -> Tensor:
        """Return the part of the weights that has gradients, float32 [parameters]."""
        return self.weights[: self.layout.parameters]

    def load(self, weights: Tensor, counters: Tensor) -> None:
        """Copy a weight vector [dim] and a counter vector into the module."""
        with torch.no_grad():
            self.weights.copy_(weights)
            for slot, tensor in zip(self.layout.counters, self._counters, strict=True):
                piece = counters[slot.start : slot.start + slot.size]
                tensor.copy_(piece.view(slot.shape))

    def read_counters(self) -> Tensor:
        """Return a copy of the integer buffers, int64, on the CPU."""
        if not self._counters:
            return torch.zeros(0, dtype=torch.int64)
        return torch.cat(
            [each.detach().reshape(-1).to("cpu", torch.int64) for each in self._counters]
        )


def zeros(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return a vector of zeros, float32 [size], that takes no memory until it is written to."""
    if torch.device(device).type != "cpu":
        return torch.zeros(size, device=device)
    return torch.from_numpy(np.zeros(size, np.float32))


def scratch_model(problem: Problem, device: str) -> FlatModel:
    """Return this process's one working copy of a problem's model, to load weights into."""
    for known, where, model in _scratch:
        if known is problem and where == device:
            return model
    model = FlatModel(problem.model(), device)
    _scratch.appendleft((problem, device, model))
    return model


_scratch: deque[tuple[Problem, str, FlatModel]] = deque(maxlen=4)


@dataclass(frozen=True)
class _StreamedBlocks:
    tensors: Streamed

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        start = 0
        for block in self.tensors.blocks():
            yield start, block
            start += block.numel()


def _slots(tensors: list[tuple[str, Tensor]]) -> Iterator[Slot]:
    start = 0
    for name, tensor in tensors:
        yield Slot(name, tuple(tensor.shape), start, tensor.numel())
        start += tensor.numel()


def _views(slots: tuple[Slot, ...], vector: Tensor) -> dict[str, Tensor]:
    return {s.name: vector[s.start : s.start + s.size].view(s.shape) for s in slots}


def _flatten(slots: tuple[Slot, ...], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    for slot in slots:
        tensor = tensors.get(slot.name)
        if tensor is None:
            text = f"expected a tensor {slot.name!r}, it is missing"
            raise ResultError(text, Fault.WRONG_SHAPE)
        if tuple(tensor.shape) != slot.shape:
            raise ResultError(
                f"expected {slot.name!r} with shape {list(slot.shape)}, got {list(tensor.shape)}",
                Fault.WRONG_SHAPE,
            )
        if tensor.dtype != dtype:
            text = f"expected {slot.name!r} as {dtype}, got {tensor.dtype}"
            raise ResultError(text, Fault.WRONG_SHAPE)
    extra = sorted(set(tensors) - {slot.name for slot in slots})
    if extra:
        raise ResultError(f"expected no tensor {brief(extra[0])}", Fault.WRONG_SHAPE)
    if not slots:
        return torch.zeros(0, dtype=dtype)
    return as_flat([tensors[slot.name] for slot in slots])
