"""Dense packing of 1- to 8-bit codes, eight codes in one 64-bit word at a time."""
# These functions are compiled; `quantization` declares the types of its arrays.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # it has no types
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from fedmq.codecs.kernels.jit import helper

u64 = np.uint64
# By its type, numba's decorated function would take the typing context, too.
intrinsic: Any = _intrinsic

_WORD = ir.IntType(64)
_BYTES = u64(0x00FF00FF00FF00FF)
_PAIRS = u64(0x0000FFFF0000FFFF)
_HALF = u64(0x00000000FFFFFFFF)


def _pointer(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    data = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0]).data
    return builder.bitcast(builder.gep(data, [args[1]]), _WORD.as_pointer())


@intrinsic
def _load(typing: Any, data: Any, i: Any) -> Any:  # noqa: ARG001
    """Return the word at byte i, aligned or not."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(context, builder, signature, args), align=1)

    return types.uint64(data, types.intp), generate


@intrinsic
def _store(typing: Any, data: Any, i: Any, word: Any) -> Any:  # noqa: ARG001
    """Write the word at byte i, aligned or not."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _pointer(context, builder, signature, args), align=1)
        return context.get_dummy_value()

    return types.void(data, types.intp, types.uint64), generate


@helper
def pack(fields, bits, out):
    """Pack codes densely, the first in the lowest bits.

    fields: uint8 [a multiple of 8], each below 2**bits, zeros after the last code;
    overwritten. out: uint8 [size of the packed codes].
    """
    words = fields.view(np.uint64)
    once, twice, four = u64(bits), u64(2 * bits), u64(4 * bits)
    for k in range(words.size):
        w = words[k]
        w = (w & _BYTES) | (((w >> u64(8)) & _BYTES) << once)
        w = (w & _PAIRS) | (((w >> u64(16)) & _PAIRS) << twice)
        words[k] = (w & _HALF) | ((w >> u64(32)) << four)
    # Each store writes 8 bytes; the next store overwrites all but the first `bits` of them.
    inside = max(0, min(words.size, (out.size - 8) // bits + 1)) if out.size >= 8 else 0
    for k in range(inside):
        _store(out, k * bits, words[k])
    for k in range(inside, words.size):
        for i in range(k * bits, min((k + 1) * bits, out.size)):
            out[i] = np.uint8((words[k] >> u64(8 * (i - k * bits))) & u64(0xFF))


@helper
def unpack(packed, bits, fields):
    """Unpack the codes of `pack` to fields; ignore the fields after the last code."""
    words = fields.view(np.uint64)
    inside = min(words.size, (packed.size - 8) // bits + 1) if packed.size >= 8 else 0
    for k in range(inside):
        words[k] = _load(packed, k * bits)
    for k in range(inside, words.size):
        word = u64(0)
        for i in range(k * bits, min((k + 1) * bits, packed.size)):
            word |= u64(packed[i]) << u64(8 * (i - k * bits))
        words[k] = word
    once, twice, four = u64(bits), u64(2 * bits), u64(4 * bits)
    # ``four`` is at most 32: no shift reaches the width of a word.
    low4 = (u64(1) << four) - u64(1)
    low2 = (u64(1) << twice) - u64(1)
    low1 = (u64(1) << once) - u64(1)
    low2 |= low2 << u64(32)
    low1 |= low1 << u64(16)
    low1 |= low1 << u64(32)
    for k in range(words.size):
        w = words[k]
        w = (w & low4) | (((w >> four) & low4) << u64(32))
        w = (w & low2) | (((w >> twice) & low2) << u64(16))
        words[k] = (w & low1) | (((w >> once) & low1) << u64(8))
