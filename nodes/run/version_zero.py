"""Check that each node of a run starts from the same model.

A problem's `model()` must return the same values at every call and on every node. One node
compares two calls to the bit. Nodes compare fingerprints within a tolerance, since torch draws
slightly different numbers on another kind of CPU: the aggregator writes its fingerprint into the
``run`` record, workers and evaluators write theirs into their answers.
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
"""Number of values summed at a time: malloc would keep larger blocks, tens of MB per process."""


def version_zero(problem: Problem) -> Fingerprint | None:
    """Return the fingerprint of a problem's model; None if the problem has no model.

    The model is made twice, one after the other, so memory for one model is enough. Reading both
    takes 0.2 s for a model of 400 MB.

    Raises:
        ConfigError: the two models differ, or are the same object.
    """
    try:
        module = problem.model()
    except (ProblemError, NotImplementedError):
        return None  # the algorithm makes its own
    digests = {name: digest_of(tensor) for name, tensor in _tensors(module)}
    found, first = _fingerprint(module), weakref.ref(module)
    del module
    if first() is not None:
        gc.collect()  # frees a module with a reference cycle
    again = problem.model()
    if first() is again:
        raise ConfigError(
            "problem.name: expected model() to make a new module at every call, got the same one "
            "twice: the second task would start from the weights that the first has trained"
        )
    for name, tensor in _tensors(again):
        if digest_of(tensor) != digests.pop(name, None):
            raise ConfigError(
                f"problem.name: expected model() to return the same values at every call, but "
                f"{name!r} differs from one call to the next: seed its random generator"
            )
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield dense parameters, buffers and tensor attributes by name."""
    for named in (module.named_parameters(), module.named_buffers(), _attributes(module)):
        for name, tensor in named:
            plain = tensor.layout == torch.strided and not tensor.is_quantized
            if plain and not is_lazy(tensor):
                yield name, tensor.detach()


def _attributes(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors that are plain attributes of modules, by name."""
    for path, each in module.named_modules():
        for name, value in vars(each).items():
            if isinstance(value, Tensor):
                yield (f"{path}.{name}" if path else name), value


def _fingerprint(module: nn.Module) -> Fingerprint:
    """Return the norm of all values, and their sum with alternating signs.

    Each tensor's sum is multiplied by a factor made from its name, so that swapped tensors change
    the sum. Values that are not finite count as zero.
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
