"""Weighted sums and matrix products with a fixed order of additions, each operation rounded once.

CPU instructions and libraries can fuse a product with a sum or add in another order; these
functions return the same bits on every machine.
"""

# The compiled functions have no types; this module declares them.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import numpy as np

from fedmq.codecs.kernels.quantization import Floats, readonly, vector


def scale_add(total: Floats, factor: float, values: Floats, weight: float) -> None:
    """Compute ``total = factor * total + weight * values`` in place.

    Args:
        total: float32 [n].
        factor: factor of the total, rounded to float32 first.
        values: float32 [n].
        weight: factor of the values, rounded to float32 first.

    Raises:
        ValueError: the vectors differ in length, or ``total`` is read-only.
    """
    from fedmq.codecs.kernels import native_sums

    if not vector(total).flags.writeable:
        raise ValueError("expected a writable total")
    if total.size != vector(values).size:
        raise ValueError(f"expected {total.size} values, got {values.size}")
    native_sums.scale_add(total, np.float32(factor), readonly(values), np.float32(weight))


def multiply(left: Floats, right: Floats) -> Floats:
    """Return the product of two matrices, float32 [rows, columns].

    Args:
        left: float32 [rows, inner].
        right: float32 [inner, columns].

    Raises:
        ValueError: the shapes do not match.
    """
    from fedmq.codecs.kernels import native_sums

    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"cannot multiply {list(left.shape)} by {list(right.shape)}")
    out = np.empty((left.shape[0], right.shape[1]), np.float32)
    left, right = (np.ascontiguousarray(each, np.float32) for each in (left, right))
    native_sums.multiply(readonly(left), readonly(right), out)
    return out
