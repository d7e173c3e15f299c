"""The model that a run starts from, as each of its nodes makes it.

A problem's `model()` must give the same values at every call and on every node. That it does so
twice on one node is checked to the bit. Across machines it is compared within a tolerance, since
torch draws slightly other numbers on another kind of CPU: by a fingerprint, which the aggregator
writes into its ``run`` record and workers and evaluators into their answers.
"""

from __future__ import annotations

import gc
import math
import weakref
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.problems.base import Problem
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.run.agreement import Fingerprint
from fedmq.nodes.run.digests import digest_of

_BLOCK = 1 << 16
"""Values that are summed at a time: larger blocks stay with malloc, tens of MB for a process."""


def version_zero(problem: Problem) -> Fingerprint | None:
    """Return the fingerprint of a problem's model; None if the problem has none.

    The model is made twice, one after the other, and read: besides the making, 0.2 s for one of
    400 MB, and never more memory than for one.

    Raises:
        ConfigError: the two have other values, or are one module.
    """
    try:
        module = problem.model()
    except (ProblemError, NotImplementedError):
        return None  # the algorithm brings its own
    digests = {name: digest_of(tensor) for name, tensor in _tensors(module)}
    found, kept = _fingerprint(module), weakref.ref(module)
    del module
    if kept() is not None:
        gc.collect()  # it may only hold itself
    again = problem.model()
    if kept() is again:
        raise ConfigError(
            "problem.name: expected model() to make a new module at every call, it returned the "
            "same one twice: it would begin the second task with what the first has learned"
        )
    for name, tensor in _tensors(again):
        if digest_of(tensor) != digests.pop(name, None):
            raise ConfigError(
                f"problem.name: expected model() to give the same values at every call, "
                f"{name!r} differs from one call to the next: seed what it is drawn from"
            )
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers, by name, that have values which can be read."""
    for named in (module.named_parameters(), module.named_buffers(), _attributes(module)):
        for name, tensor in named:
            plain = tensor.layout == torch.strided and not tensor.is_quantized
            if plain and not is_lazy(tensor):
                yield name, tensor.detach()


def _attributes(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors that modules hold as plain attributes."""
    for path, each in module.named_modules():
        for name, value in vars(each).items():
            if isinstance(value, Tensor):
                yield (f"{path}.{name}" if path else name), value


def _fingerprint(module: nn.Module) -> Fingerprint:
    """Return the norm of all values, and their sum with alternating signs.

    Each tensor's sum counts with a factor from its name, so that values in another place make
    another sum. What is not finite counts as zero.
    """
    squares = total = 0.0
    for name, tensor in _tensors(module):
        factor = 1 + zlib.crc32(name.encode()) / 2**32
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        for block in torch.split(values.reshape(-1), _BLOCK):
            numbers = block.to("cpu", torch.float64).nan_to_num_(0.0, 0.0, 0.0)
            squares += float(numbers.square().sum())
            total += factor * float(numbers[::2].sum() - numbers[1::2].sum())
    return [float(f"{math.sqrt(squares):.9g}"), float(f"{total:.9g}")]
