"""A torch module whose values are one flat vector, to send and to average."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.problems.base import Problem
from fedmq.algorithms.toolkit.layout import EXACT, Layout, as_pairs, same_bits
from fedmq.algorithms.toolkit.working_copy import BoundTensor, WorkingCopy


class FlatModel:
    """A module whose parameters, gradients and buffers are views of flat vectors.

    Loading, subtracting, averaging and an optimizer step are then single operations on one vector,
    for any number of layers.

    Within one task a module may change itself freely: `load` and `reset` restore it,
    `after_backward` and `end_task` follow tensors that it has re-bound. For that a copy is kept of
    the module's own attributes (including plain tensors, but no parameters and buffers). If they
    cannot be copied, ``make`` makes a new module each time.

    Attributes:
        module: the torch module; a new one after each `load` if ``make`` makes them.
        layout: order of its tensors.
        weights: float32 [dim], shared with the module.
        gradient: float32 [parameters], shared with the parameters' ``grad``.
        loaded_counters: int64, the argument of `load`; `read_counters` returns the current ones.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device | str = "cpu",
        make: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.layout = Layout.of(module)
        self.weights = zeros(self.layout.dim, device)
        self.gradient = zeros(self.layout.parameters, device)
        self._device, self._make = device, make
        self._copy = self._bound(module)
        self.loaded_counters = self.read_counters()

    @property
    def module(self) -> nn.Module:
        """Return the torch module."""
        return self._copy.module

    @property
    def trained(self) -> Tensor:
        """Return the part of the weights that has gradients, float32 [parameters]."""
        return self.weights[: self.layout.parameters]

    def load(self, weights: Tensor, counters: Tensor) -> None:
        """Copy a weight vector [dim] and a counter vector into the module, and `reset` it."""
        self.reset()
        with torch.no_grad():
            self.weights.copy_(weights)
            for slot, each in zip(self.layout.counters, self._counted, strict=True):
                each.tensor.copy_(slot.tensor(counters))
        self.loaded_counters = counters

    def reset(self) -> None:
        """Restore the module to its state after construction, except for vectors and counters."""
        if self._copy.reset() or self._make is None:
            return
        counters = self.read_counters()
        module = self._make()
        if Layout.of(module) != self.layout:
            raise ProblemError("expected the same model at each call of model(), got another one")
        self._copy = self._bound(module, filled=True)
        for slot, each in zip(self.layout.counters, self._counted, strict=True):
            each.tensor.copy_(slot.tensor(counters))

    def after_backward(self) -> None:
        """Follow parameters and gradients that the module has re-bound, after each backward pass.

        Raises:
            ProblemError: a tensor cannot be followed; the message has its name.
        """
        self._copy.after_backward()

    def end_task(self) -> None:
        """Follow all tensors that the module has re-bound, before the trained values are read.

        Raises:
            ProblemError: a tensor cannot be followed; the message has its name.
        """
        self._copy.end_task()
        for slot, each in zip(self.layout.counters, self._counted, strict=True):
            if slot.dtype in EXACT and not same_bits(
                as_pairs(each.tensor).cpu(), slot.view(self.loaded_counters)
            ):
                raise ProblemError(
                    f"expected {slot.name} as float32 where training changes it, got {slot.dtype}"
                )

    def read_counters(self) -> Tensor:
        """Return a copy of the integer buffers (and constants), int64, on the CPU."""
        if not self._counted:
            return torch.zeros(0, dtype=torch.int64)
        found = {
            slot.name: as_pairs(each.tensor).to("cpu", slot.wire_dtype)
            for slot, each in zip(self.layout.counters, self._counted, strict=True)
        }
        vector = self.layout.flatten_counters(found)
        shared = any(vector.data_ptr() == each.data_ptr() for each in found.values())
        return vector.clone() if shared else vector

    def _bound(self, module: nn.Module, *, filled: bool = False) -> WorkingCopy:
        """Return a module bound to the vectors; they take its values unless they are ``filled``."""
        module = module.to(self._device)
        named = dict(module.named_parameters()) | dict(module.named_buffers())
        bound, layout = [], self.layout
        for slot in layout.weights:
            # One by one, so that a large model is never in memory twice.
            tensor, view = named[slot.name], slot.tensor(self.weights)
            if not filled:
                view.copy_(tensor.detach())
            gradient = slot.tensor(self.gradient) if slot.start < layout.parameters else None
            bound.append(BoundTensor(slot.name, tensor, view, gradient))
        counted = [BoundTensor(slot.name, named[slot.name]) for slot in layout.counters]
        self._counted = counted
        return WorkingCopy(module, [*bound, *counted])


def zeros(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return zeros, float32 [size], which on a CPU take no memory until they are written."""
    if torch.device(device).type != "cpu":
        return torch.zeros(size, device=device)
    return torch.from_numpy(np.zeros(size, np.float32))


def scratch_model(problem: Problem, device: str) -> FlatModel:
    """Return the one working copy of a problem's model in this process, to load weights into."""
    for known, where, model in _scratch:
        if known is problem and where == device:
            return model
    model = FlatModel(problem.model(), device, problem.model)
    _scratch.appendleft((problem, device, model))
    return model


_scratch: deque[tuple[Problem, str, FlatModel]] = deque(maxlen=4)
