"""The compiled functions of `sums`, which checks their arguments: nothing here checks bounds."""
# These functions are compiled; `sums` declares the types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from fedmq.codecs.kernels.jit import entry


@entry
def scale_add(total, factor, values, weight):
    """Compute ``total = factor * total + weight * values`` in place."""
    for i in range(total.size):
        total[i] = factor * total[i] + weight * values[i]


@entry
def multiply(left, right, out):
    """Write ``left`` [rows, inner] times ``right`` [inner, columns] to out [rows, columns].

    Terms are added in the order of ``inner``, while one row of out stays in cache.
    """
    rows, inner = left.shape
    for i in range(rows):
        row = out[i]
        row[:] = 0
        for k in range(inner):
            factor = left[i, k]
            other = right[k]
            for j in range(row.size):
                row[j] += factor * other[j]
