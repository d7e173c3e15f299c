"""The compiled sums. Arguments are checked by the facade: nothing here checks bounds."""
# The functions are compiled, not run by the interpreter; the facade has the types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from fedmq.codecs.kernels.jit import entry


@entry
def scale_add(total, factor, values, weight):
    """Make total into ``factor * total + weight * values``."""
    for i in range(total.size):
        total[i] = factor * total[i] + weight * values[i]


@entry
def multiply(left, right, out):
    """Make out [rows, columns] into ``left`` [rows, inner] times ``right`` [inner, columns].

    Terms are added from the first to the last of ``inner``; a row stays in cache meanwhile.
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
