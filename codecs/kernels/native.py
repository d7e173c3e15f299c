"""The compiled functions of `quantization`, which checks arguments: nothing here checks bounds.

Integers are cast at each step because numba widens 32-bit arithmetic to 64 bits, which
would halve the number of vector lanes.
"""
# These functions are compiled; `quantization` declares the types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from fedmq.codecs.kernels.bit_packing import pack, unpack
from fedmq.codecs.kernels.hadamard import hadamard
from fedmq.codecs.kernels.jit import entry, helper
from fedmq.codecs.kernels.seeds import GOLDEN, HASH_A, HASH_B, MIX_A, MIX_B

u32, u64, i32, f32 = np.uint32, np.uint64, np.int32, np.float32

_GOLDEN, _MIX_A, _MIX_B = u64(GOLDEN), u64(MIX_A), u64(MIX_B)
_HASH_A, _HASH_B = u32(HASH_A), u32(HASH_B)
_HALF = u64(0x00000000FFFFFFFF)
_MAGNITUDE = i32(0x7FFFFFFF)
_SIGN = u32(0x80000000)
_INFINITY = i32(0x7F800000)
_FRACTION_BITS = 23
_TINY = f32(2.0**-90)
_HUGE = f32(2.0**127)


@helper
def _key(seed, index):
    """Return the 64-bit key of one block: splitmix64's output number index + 1."""
    z = u64(seed + u64(index + 1) * _GOLDEN)
    z = u64((z ^ (z >> u64(30))) * _MIX_A)
    z = u64((z ^ (z >> u64(27))) * _MIX_B)
    return u64(z ^ (z >> u64(31)))


@helper
def random_bits(j, low, high):
    """Return 32 random bits for counter ``j`` under the lower and upper half of a key."""
    h = u32(j ^ low)
    h = u32(h ^ (h >> u32(16)))
    h = u32(h * _HASH_A)
    h = u32(h ^ high)
    h = u32(h ^ (h >> u32(15)))
    h = u32(h * _HASH_B)
    return u32(h ^ (h >> u32(15)))


@helper
def halves(key):
    """Return the lower and the upper 32 bits of a key."""
    return u32(key & _HALF), u32(key >> u64(32))


@helper
def _signed(words, key):
    """Flip the sign of value k * W + w if bit k of random word w is set.

    words: floats as int32 [a power of two]; W is 1/32 of that size, at least 1.
    """
    low, high = halves(key)
    width = max(1, words.size // 32)
    random = np.empty(width, np.uint32)
    for w in range(width):
        random[w] = random_bits(u32(w), low, high)
    for k in range(min(32, words.size)):
        part = words[k * width : (k + 1) * width]
        for w in range(width):
            part[w] = part[w] ^ i32(u32(random[w] << u32(31 - k)) & _SIGN)


@helper
def _copy(x, y):
    # Not y[:] = x: that takes seconds to compile, for its error message.
    for j in range(x.size):
        y[j] = x[j]


@helper
def _norm(x, squares):
    """Return the Euclidean norm; halving the range at each step fixes the order of the sum."""
    n = x.size
    for j in range(n):
        squares[j] = x[j] * x[j]
    while n > 1:
        n //= 2
        for j in range(n):
            squares[j] = squares[j] + squares[j + n]
    return np.sqrt(squares[0])


@helper
def _forward(x, y, rotated, key, kashin, work):
    """Write the coefficients of one piece x to y: x itself, rotated, or Kashin coefficients.

    y: float32 [N], N a power of two if rotated. kashin: (iterations, eta, delta, clipped), or
    None; for None numba does not compile the iteration.
    work: float32 [2, at least N].
    """
    inputs, n = x.size, y.size
    if not rotated:
        _copy(x, y)
        return
    scale = f32(1.0) / np.sqrt(f32(n))
    if kashin is None:
        for j in range(n):
            y[j] = x[j] * scale
        _signed(y.view(np.int32), key)
        hadamard(y)
        return
    iterations, eta, delta, clipped = kashin
    rest, step = work[0, :n], work[1, :n]
    _copy(x, rest)
    for j in range(inputs, n):
        rest[j] = f32(0.0)
    _signed(rest.view(np.int32), key)
    level = _norm(rest, step) / np.sqrt(f32(delta * f32(n)))
    for j in range(n):
        y[j] = f32(0.0)
    for iteration in range(iterations):
        for j in range(n):
            step[j] = rest[j] * scale
        hadamard(step)
        if iteration == iterations - 1 and not clipped:
            for j in range(n):
                y[j] = y[j] + step[j]
            return
        for j in range(n):
            value = min(max(step[j], -level), level)
            y[j] = y[j] + value
            step[j] = value * scale
        if iteration < iterations - 1:
            hadamard(step)
            for j in range(inputs):
                rest[j] = rest[j] - step[j]
            level = f32(level * eta)


@helper
def _inverse(y, rotated, key):
    """Replace the coefficients y of one piece by its values, which come first."""
    if rotated:
        scale = f32(1.0) / np.sqrt(f32(y.size))
        for j in range(y.size):
            y[j] = y[j] * scale
        hadamard(y)
        _signed(y.view(np.int32), key)


@helper
def _extent(words, ends):
    """Write minimum and maximum of floats, given as words, to ends; False if one is not finite.

    With the lower bits of negative words flipped, words sort like the floats; infinities and
    NaNs are the extremes and need no separate check.
    """
    low, high = i32(0x7FFFFFFF), i32(-0x80000000)
    for j in range(words.size):
        word = words[j]
        rank = i32(word ^ (i32(word >> i32(31)) & _MAGNITUDE))
        low = min(low, rank)
        high = max(high, rank)
    if high >= _INFINITY or low <= i32(_INFINITY ^ i32(-1)):
        return False
    ends[0] = low ^ (i32(low >> i32(31)) & _MAGNITUDE)
    ends[1] = high ^ (i32(high >> i32(31)) & _MAGNITUDE)
    return True


@helper
def _round(y, low, high, levels, key, fields):
    """Round y stochastically to 0..levels between low and high, one byte each; overwrite y.

    The position between low and high is a fixed-point number with 23 fractional bits; random
    bits are added to the fraction and carry into the code.
    """
    pre = f32(1.0)
    if high * f32(0.5) - low * f32(0.5) >= _HUGE * f32(0.5):
        pre = f32(0.25)  # the difference would overflow
    elif f32(0.0) < high - low < _TINY:
        pre = f32(2.0**100)  # the quotient would overflow
    if pre != f32(1.0):
        for j in range(y.size):
            y[j] = y[j] * pre
        low, high = low * pre, high * pre
    scale = f32(0.0)
    if high > low:
        # Two units in the last place larger, so that the maximum reaches the highest code.
        scale = f32(f32(levels << _FRACTION_BITS) / f32(high - low)) * f32(1.0 + 2.0**-22)
    first, second = halves(key)
    top = u32(levels)
    for j in range(y.size):
        place = i32((y[j] - low) * scale)
        noise = u32(random_bits(u32(j), first, second) >> u32(32 - _FRACTION_BITS))
        fields[j] = min(u32(u32(u32(place) + noise) >> u32(_FRACTION_BITS)), top)


@helper
def _write(y, bits, key, ends, out, fields):
    """Quantize and pack one block; False if a value is not finite."""
    n = y.size
    if not _extent(y.view(np.int32), ends.view(np.int32)):
        return False
    _round(y, ends[0], ends[1], (1 << bits) - 1, key, fields[:n])
    padded = (n + 7) // 8 * 8
    for j in range(n, padded):
        fields[j] = np.uint8(0)
    pack(fields[:padded], bits, out)
    return True


@helper
def _value(field, unit, low, high):
    # Not low + part * (high - low), which can overflow and does not return high exactly.
    part = f32(i32(field)) * unit
    return low * (f32(1.0) - part) + high * part


@helper
def _read(packed, bits, low, high, fields, y):
    """Unpack one block and write its values to y."""
    unpack(packed, bits, fields[: (y.size + 7) // 8 * 8])
    unit = f32(1.0) / f32((1 << bits) - 1)
    for j in range(y.size):
        y[j] = _value(fields[j], unit, low, high)


@helper
def _add(packed, bits, low, high, fields, out, weight):
    """Unpack one block and add its values to out, without the buffer of `_read`."""
    unpack(packed, bits, fields[: (out.size + 7) // 8 * 8])
    unit = f32(1.0) / f32((1 << bits) - 1)
    for j in range(out.size):
        out[j] = out[j] + weight * _value(fields[j], unit, low, high)


@helper
def _piece(number, whole, block, inputs, tail):
    """Return the number of values and of coefficients of a piece."""
    if number < whole:
        return inputs, block
    return tail[number - whole, 0], tail[number - whole, 1]


@entry
def encode(x, bits, block, inputs, tail, rotated, rounding, signs, kashin, codes, ranges):
    """Transform, quantize and pack a vector block by block; False if a value is not finite.

    x: float32 [n]. inputs: values per block of ``block`` coefficients. tail: int64 [pieces, 2],
    (values, coefficients) of the pieces after the last whole block, quantized as one block.
    rotated, kashin: see `_forward`. rounding, signs: uint64 seeds.
    codes: uint8 [bytes], ranges: float32 [blocks, 2]; outputs.
    """
    y = np.empty(block, np.float32)
    fields = np.empty((block + 7) // 8 * 8, np.uint8)
    work = np.empty((2, 0 if kashin is None else block), np.float32)
    whole = x.size // inputs
    pieces = whole + tail.shape[0]
    stride = (block * bits + 7) // 8
    start, filled, b = 0, 0, 0
    for piece in range(pieces):
        values, size = _piece(piece, whole, block, inputs, tail)
        part = y[filled : filled + size]
        _forward(x[start : start + values], part, rotated, _key(signs, piece), kashin, work)
        start += values
        filled += size
        if piece < whole or piece == pieces - 1:
            out = codes[b * stride : b * stride + (filled * bits + 7) // 8]
            if not _write(y[:filled], bits, _key(rounding, b), ranges[b], out, fields):
                return False
            filled = 0
            b += 1
    return True


@helper
def _deliver(part, out, weight, adding):
    if adding:
        for j in range(out.size):
            out[j] = out[j] + weight * part[j]
    else:
        _copy(part[: out.size], out)


@entry
def decode(codes, ranges, bits, block, inputs, tail, rotated, signs, out, weight, adding):
    """Write the values to out, or add weight times the values; arguments as for `encode`."""
    y = np.empty(block, np.float32)
    fields = np.empty((block + 7) // 8 * 8, np.uint8)
    whole = out.size // inputs
    stride = (block * bits + 7) // 8
    start, used = 0, 0
    for piece in range(whole + tail.shape[0]):
        values, size = _piece(piece, whole, block, inputs, tail)
        if piece <= whole:
            # A whole block, or all pieces of the tail at once.
            filled = block
            if piece == whole:
                filled = 0
                for k in range(tail.shape[0]):
                    filled += tail[k, 1]
            packed = codes[piece * stride : piece * stride + (filled * bits + 7) // 8]
            low, high = ranges[piece, 0], ranges[piece, 1]
            used = 0
            if adding and not rotated:
                _add(packed, bits, low, high, fields, out[start : start + values], weight)
                start += values
                continue
            _read(packed, bits, low, high, fields, y[:filled])
        part = y[used : used + size]
        _inverse(part, rotated, _key(signs, piece))
        _deliver(part, out[start : start + values], weight, adding)
        start += values
        used += size


@entry
def transform(x, block, inputs, tail, rotated, signs, kashin, out):
    """Write the coefficients of all blocks to out; arguments as for `encode`."""
    work = np.empty((2, 0 if kashin is None else block), np.float32)
    whole = x.size // inputs
    start, filled = 0, 0
    for piece in range(whole + tail.shape[0]):
        values, size = _piece(piece, whole, block, inputs, tail)
        part = out[filled : filled + size]
        _forward(x[start : start + values], part, rotated, _key(signs, piece), kashin, work)
        start += values
        filled += size


@entry
def restore(y, block, inputs, tail, rotated, signs, out):
    """Write the values of the coefficients y to out; arguments as for `encode`."""
    buffer = np.empty(block, np.float32)
    whole = out.size // inputs
    start, used = 0, 0
    for piece in range(whole + tail.shape[0]):
        values, size = _piece(piece, whole, block, inputs, tail)
        part = buffer[:size]
        _copy(y[used : used + size], part)
        _inverse(part, rotated, _key(signs, piece))
        _copy(part[:values], out[start : start + values])
        start += values
        used += size


@entry
def signs(out, key):
    """Write random signs, +1 or -1; out: float32 [a power of two], key: uint64 seed."""
    for j in range(out.size):
        out[j] = f32(1.0)
    _signed(out.view(np.int32), _key(key, 0))
