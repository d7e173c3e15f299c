"""Weighted sums and matrix products in one order, each operation rounded once.

A CPU's own instructions, and the libraries that choose among them, may fuse a product and a
sum, or add in another order; what these functions return is the same to the bit everywhere.
"""

# The compiled functions have no types; those of this module are theirs.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import numpy as np

from fedmq.codecs.kernels.quantization import Floats, readonly, vector


def scale_add(total: Floats, factor: float, values: Floats, weight: float) -> None:
    """Make ``total`` into ``factor * total + weight * values``, in place.

    Args:
        total: float32 [n].
        factor: rounded to float32 first, like ``weight``; 1 leaves a number as it is.
        values: float32 [n].
        weight: of the values.

    Raises:
        ValueError: the vectors differ in length, or ``total`` cannot be written to.
    """
    from fedmq.codecs.kernels import native_sums

    if not vector(total).flags.writeable:
        raise ValueError("expected a total that can be added to in place")
    if total.size != vector(values).size:
        raise ValueError(f"expected {total.size} values, got {values.size}")
    native_sums.scale_add(total, np.float32(factor), readonly(values), np.float32(weight))


def multiply(left: Floats, right: Floats) -> Floats:
    """Return the product of two matrices, float32 [rows, columns].

    Args:
        left: float32 [rows, inner].
        right: float32 [inner, columns].

    Raises:
        ValueError: the shapes do not go together.
    """
    from fedmq.codecs.kernels import native_sums

    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"cannot multiply {list(left.shape)} by {list(right.shape)}")
    out = np.empty((left.shape[0], right.shape[1]), np.float32)
    left, right = (np.ascontiguousarray(each, np.float32) for each in (left, right))
    native_sums.multiply(readonly(left), readonly(right), out)
    return out
