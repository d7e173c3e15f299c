"""The fast Walsh-Hadamard transform of a block in cache, in explicit vectors of 8 floats.

Stages run from the shortest stride to the longest, each as (a + b, a - b). This order fixes
every bit of the sums, for any grouping of the stages into passes.
"""

# These functions are compiled, and numba's internals have no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # it has no types
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from fedmq.codecs.kernels.jit import helper

# By its type, numba's decorated function would take the typing context, too.
intrinsic: Any = _intrinsic

LANES = 8
_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_CHOICE = ir.VectorType(ir.IntType(32), LANES)


def _pointers(context: Any, builder: Any, signature: Any, args: Any, count: int) -> list[Any]:
    """Return pointers to the vectors at y[i], y[i + h], .., ``count`` of them."""
    data = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0]).data
    index, found = args[1], []
    for place in range(count):
        if place:
            index = builder.add(index, args[2])
        found.append(builder.bitcast(builder.gep(data, [index]), _VECTOR.as_pointer()))
    return found


def _butterflies(count: int) -> Any:
    """Return the transform of ``count`` vectors of 8 that lie h floats apart, in place."""

    def typed(typing: Any, y: Any, i: Any, h: Any) -> Any:  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointers = _pointers(context, builder, signature, args, count)
            # Blocks are aligned to floats only.
            values = [builder.load(pointer, align=4) for pointer in pointers]
            stride = 1
            while stride < count:
                for first in (k for k in range(count) if not k & stride):
                    a, b = values[first], values[first + stride]
                    values[first] = builder.fadd(a, b)
                    values[first + stride] = builder.fsub(a, b)
                stride *= 2
            for pointer, value in zip(pointers, values, strict=True):
                builder.store(value, pointer, align=4)
            return context.get_dummy_value()

        return types.void(y, types.intp, types.intp), generate

    return intrinsic(typed)


@intrinsic
def _within(typing: Any, y: Any, i: Any) -> Any:  # noqa: ARG001
    """Transform the 8 floats from y[i] in place, inside one vector."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (pointer,) = _pointers(context, builder, signature, args, 1)
        value = builder.load(pointer, align=4)
        for stride in (1, 2, 4):
            partner = [lane ^ stride for lane in range(LANES)]
            swapped = builder.shuffle_vector(value, value, ir.Constant(_CHOICE, partner))
            # Lane a becomes b + a, bit-identical to a + b, and lane b becomes a - b.
            total, difference = builder.fadd(swapped, value), builder.fsub(swapped, value)
            choice = [lane + (LANES if lane & stride else 0) for lane in range(LANES)]
            value = builder.shuffle_vector(total, difference, ir.Constant(_CHOICE, choice))
        builder.store(value, pointer, align=4)
        return context.get_dummy_value()

    return types.void(y, types.intp), generate


_two = _butterflies(2)
_eight = _butterflies(8)


@helper
def hadamard(y):
    """Transform y, float32 [a power of two], by the Sylvester-Hadamard matrix of +1 and -1."""
    n = y.size
    h = 1
    if n >= LANES:
        for i in range(0, n, LANES):
            _within(y, i)
        h = LANES
        while h * 8 <= n:
            for i in range(0, n, 8 * h):
                for j in range(i, i + h, LANES):
                    _eight(y, j, h)
            h *= 8
        while h < n:
            for i in range(0, n, 2 * h):
                for j in range(i, i + h, LANES):
                    _two(y, j, h)
            h *= 2
    while h < n:
        for i in range(0, n, 2 * h):
            for j in range(i, i + h):
                a = y[j]
                b = y[j + h]
                y[j] = a + b
                y[j + h] = a - b
        h *= 2
