"""Sums with the same bits on every machine.

``total.add_(x, alpha=w)`` rounds once on a CPU with fused multiply-add and twice on others, so its
last bit depends on the machine. The functions here round each product and then each sum, as IEEE
754 defines them, in a fixed order, so a trace of one machine replays on any other.

The aggregator's part of a `reproducible` algorithm (`fedmq.algorithms.base.Algorithm`) uses only
the functions here and ``+ - * /`` on tensors. ``alpha=``, `torch.lerp`,
``addcmul``, ``sqrt`` of float32, ``float ** float``, sums over many values and matrix products
may all differ from one machine to another.
"""

from __future__ import annotations

import functools
from decimal import Context, Decimal

import numpy as np
from torch import Tensor

from fedmq.codecs import kernels

ARITHMETIC = 2
"""Version of the aggregator's arithmetic. 1, of fedmq 0.1.0: torch's, fused on some CPUs. 2: each
product and each sum is rounded once."""
_SMALL = 1 << 16
"""Up to this many values, two steps of torch are fast enough without a compiled kernel."""
_DIGITS = Context(prec=30)


def add_scaled(total: Tensor, values: Tensor, weight: float) -> None:
    """Add ``weight * values`` to ``total``, in place; each product and sum is rounded once.

    Args:
        total: float32 [n], contiguous, on the CPU.
        values: float32 [n].
        weight: rounded to float32 first.
    """
    scale_and_add(total, 1.0, values, weight)


def scale_and_add(total: Tensor, factor: float, values: Tensor, weight: float) -> Tensor:
    """Make ``total`` into ``factor * total + weight * values``, in place, and return it.

    Args:
        total: float32 [n], contiguous, on the CPU.
        factor: rounded to float32 first, like ``weight``; 1 leaves a number as it is.
        values: float32 [n].
        weight: of the values.
    """
    if total.numel() <= _SMALL:
        if factor != 1:
            total.mul_(factor)
        return total.add_(values * weight)
    # A buffer in a message may be unaligned.
    aligned = np.require(values.numpy(), np.float32, ("C", "A"))
    kernels.scale_add(total.numpy(), factor, aligned, weight)
    return total


def prepare(values: int) -> None:
    """Load the kernel for sums of this many values, so that the first sum is not slower.

    The kernel is compiled once on a machine and takes 30 MB in each process that uses it.
    """
    if values > _SMALL:
        kernels.scale_add(np.zeros(1, np.float32), 1.0, np.zeros(1, np.float32), 1.0)


def square_root(values: Tensor) -> Tensor:
    """Return the correctly rounded roots of float32 values; torch's own may be one unit off."""
    return values.double().sqrt_().float()


@functools.lru_cache(maxsize=1024)
def power(base: float, exponent: float) -> float:
    """Return ``base ** exponent`` for a base above 0, the same on every machine.

    It is computed to 30 digits and then rounded, because the ``pow`` of two C libraries may
    differ in the last bit.
    """
    return float(_DIGITS.power(Decimal(base), Decimal(exponent)))
