"""The kernels of this package in torch, for tensors on a device.

No codec calls this module yet; it stays for codecs that encode on the device.

The results have the same bits as on the CPU: every sum has the same terms in the same order
(stages of the Hadamard transform, the halving norm), and each step is a separate torch
operation, so nothing is contracted to fused multiply-adds. Bits can differ only if a device's
float32 division does not round as IEEE 754 requires.

Each function takes and returns tensors on the device of its first argument, and otherwise does
the same as its namesake in `fedmq.codecs.kernels`. Peak memory: about ten times the vector's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedmq.codecs.kernels.layout import Basis, Cut, HadamardBasis, KashinFrame, cut
from fedmq.codecs.kernels.quantization import check_sizes, code_bytes
from fedmq.codecs.kernels.seeds import GOLDEN, HASH_A, HASH_B, MIX_A, MIX_B, Purpose, state
from fedmq.codecs.kernels.selection import check_count

_HALF = 0xFFFFFFFF
_FRACTION_BITS = 23


def quantize(
    x: Tensor, bits: int, block: int, seed: int, basis: Basis = None
) -> tuple[Tensor, Tensor]:
    """Return codes, uint8 [`code_bytes`], and ranges, float32 [blocks, 2].

    Raises:
        ValueError: a value is not finite, or an argument is out of range.
    """
    size = code_bytes(_vector(x).numel(), bits, block, basis)
    y, shape = _coefficients(x, block, basis)
    codes = torch.empty(size, dtype=torch.uint8, device=x.device)
    ranges = torch.empty(shape.blocks, 2, dtype=torch.float32, device=x.device)
    if not torch.isfinite(y).all():
        raise ValueError("expected finite values, got an infinity or NaN")
    keys = _keys(int(state(seed, Purpose.ROUNDING)), 0, shape.blocks, x.device)
    for rows, start, part in _groups(shape, y):
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        ranges[rows] = torch.cat([low, high], 1)
        fields = _round(part, low, high, (1 << bits) - 1, keys[rows])
        packed = _pack(fields, bits).reshape(-1)
        begin = start // block * ((block * bits + 7) // 8)
        codes[begin : begin + packed.numel()] = packed
    return codes, ranges


def dequantize(
    codes: Tensor, ranges: Tensor, n: int, bits: int, block: int, basis: Basis = None
) -> Tensor:
    """Return the values [n] float32.

    Raises:
        ValueError: codes or ranges do not match n, bits and block, or a range is invalid.
    """
    shape = check_sizes(
        str(codes.dtype), tuple(codes.shape), str(ranges.dtype), tuple(ranges.shape),
        n, bits, block, basis,
    )  # fmt: skip
    if not (torch.isfinite(ranges).all() and (ranges[:, 0] <= ranges[:, 1]).all()):
        raise ValueError("expected finite ranges as minimum, maximum")
    y = torch.empty(shape.coefficients, dtype=torch.float32, device=codes.device)
    unit = torch.tensor(1.0, device=codes.device) / ((1 << bits) - 1)
    for rows, start, part in _groups(shape, y):
        begin = start // block * ((block * bits + 7) // 8)
        stride = (part.shape[1] * bits + 7) // 8
        packed = codes[begin : begin + part.shape[0] * stride].view(part.shape[0], stride)
        share = _unpack(packed, bits, part.shape[1]).to(torch.float32) * unit
        low, high = ranges[rows, :1], ranges[rows, 1:]
        part.copy_(low * (1.0 - share) + high * share)
    return _values(y, shape, basis)


def accumulate(
    total: Tensor,
    codes: Tensor,
    ranges: Tensor,
    bits: int,
    block: int,
    weight: float,
    basis: Basis = None,
) -> None:
    """Add ``weight`` times the values of `dequantize` to total.

    Raises:
        ValueError: as `dequantize`.
    """
    values = dequantize(codes, ranges, _vector(total).numel(), bits, block, basis)
    total.add_(values.mul_(weight))


def transform(x: Tensor, block: int, basis: HadamardBasis | KashinFrame) -> Tensor:
    """Return the coefficients of x in a basis."""
    return _coefficients(_vector(x), block, basis)[0]


def restore(y: Tensor, n: int, block: int, basis: HadamardBasis | KashinFrame) -> Tensor:
    """Return x [n] of ``y = transform(x, block, basis)``.

    Raises:
        ValueError: y has another number of coefficients than n values have.
    """
    shape = cut(n, block, basis)
    if _vector(y).numel() != shape.coefficients:
        raise ValueError(f"expected {shape.coefficients} coefficients, got {y.numel()}")
    return _values(y, shape, basis)


def mask(n: int, k: int, seed: int, device: torch.device | str) -> Tensor:
    """Return a random subset of k of n indices, int64, ascending, on ``device``."""
    check_count(n, k)
    key = int(state(seed, Purpose.MASK))
    return _smallest(_hash(torch.arange(n, device=device), key & _HALF, key >> 32), k)


def top(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k values of largest magnitude: indices int64, ascending, and values.

    Raises:
        ValueError: k is not in 0..n, or a value is NaN or infinite.
    """
    check_count(_vector(x).numel(), k)
    if not torch.isfinite(x).all():
        raise ValueError("expected finite values, got an infinity or NaN")
    ranks = 0x7FFFFFFF - (x.view(torch.int32) & 0x7FFFFFFF).long()
    indices = _smallest(ranks, k)
    return indices, x[indices]


def _vector(x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or x.dim() != 1 or not x.is_contiguous():
        raise ValueError(f"expected a contiguous float32 vector, got {x.dtype} {list(x.shape)}")
    return x


def _smallest(ranks: Tensor, k: int) -> Tensor:
    # The sort is stable: ties go to the first.
    order = torch.sort(ranks, stable=True).indices[:k]
    return torch.sort(order).values


def _groups(shape: Cut, y: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield (rows of ranges, first coefficient, y [blocks, coefficients]); the short block last."""
    border = shape.whole * shape.block
    if shape.whole:
        yield slice(0, shape.whole), 0, y[:border].view(shape.whole, shape.block)
    if shape.tail:
        yield slice(shape.whole, shape.blocks), border, y[border:].view(1, -1)


def _pieces(shape: Cut) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Yield groups of equal pieces.

    Each is (first key, pieces, first value, values of a piece, first coefficient, coefficients
    of a piece).
    """
    if shape.whole:
        yield 0, shape.whole, 0, shape.inputs, 0, shape.block
    start, begin = shape.whole * shape.inputs, shape.whole * shape.block
    for number, (values, size) in enumerate(shape.tail):
        yield shape.whole + number, 1, start, values, begin, size
        start += values
        begin += size


def _coefficients(x: Tensor, block: int, basis: Basis) -> tuple[Tensor, Cut]:
    shape = cut(x.numel(), block, basis)
    if basis is None:
        return x, shape
    seed = int(state(basis.seed, Purpose.SIGNS))
    y = torch.empty(shape.coefficients, dtype=torch.float32, device=x.device)
    for first, pieces, start, values, begin, size in _pieces(shape):
        rows = x[start : start + pieces * values].view(pieces, values)
        signs = _sign_bits(_keys(seed, first, pieces, x.device), size)
        out = y[begin : begin + pieces * size].view(pieces, size)
        if isinstance(basis, KashinFrame):
            out.copy_(_iterate(rows, size, signs, basis))
        else:
            out.copy_(_hadamard(_flip(rows * _scale(size, x.device), signs)))
    return y, shape


def _values(y: Tensor, shape: Cut, basis: Basis) -> Tensor:
    if basis is None:
        return y
    seed = int(state(basis.seed, Purpose.SIGNS))
    parts = []
    for first, pieces, _, values, begin, size in _pieces(shape):
        rows = y[begin : begin + pieces * size].view(pieces, size)
        signs = _sign_bits(_keys(seed, first, pieces, y.device), size)
        rows = _flip(_hadamard(rows * _scale(size, y.device)), signs)
        parts.append(rows[:, :values].reshape(-1))
    return torch.cat(parts) if parts else y.new_empty(0)


def _iterate(x: Tensor, size: int, signs: Tensor, basis: KashinFrame) -> Tensor:
    """Return the Kashin coefficients [pieces, size] of x [pieces, values]."""
    values = x.shape[1]
    scale = _scale(size, x.device)
    rest = _flip(torch.nn.functional.pad(x, (0, size - values)), signs)
    bound = torch.tensor(basis.delta, device=x.device) * float(size)
    level = _norm(rest) / _sqrt(bound)
    y = torch.zeros_like(rest)
    for iteration in range(basis.iterations):
        step = _hadamard(rest * scale)
        last = iteration == basis.iterations - 1
        if last and not basis.clipped:
            return y + step
        step = torch.minimum(torch.maximum(step, -level), level)
        y = y + step
        if not last:
            rest[:, :values] -= _hadamard(step * scale)[:, :values]
            level = level * torch.tensor(basis.eta, device=x.device)
    return y


def _scale(size: int, device: torch.device) -> Tensor:
    return 1.0 / _sqrt(torch.tensor(float(size), device=device))


def _hadamard(rows: Tensor) -> Tensor:
    """Return the unnormalised transform of each row [pieces, size], shortest stride first."""
    pieces, size = rows.shape
    stride = 1
    while stride < size:
        pairs = rows.view(pieces, -1, 2, stride)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        rows = torch.stack([a + b, a - b], 2).view(pieces, size)
        stride *= 2
    return rows


def _norm(rows: Tensor) -> Tensor:
    squares = rows * rows
    while squares.shape[1] > 1:
        half = squares.shape[1] // 2
        squares = squares[:, :half] + squares[:, half:]
    return _sqrt(squares)


def _sqrt(x: Tensor) -> Tensor:
    # torch's float32 root on the CPU can be off by one unit; through float64 it is exact.
    return torch.sqrt(x.double()).float()


def _round(y: Tensor, low: Tensor, high: Tensor, levels: int, keys: Tensor) -> Tensor:
    """Return the codes int64 [blocks, values]; see `native._round`."""
    half = high * 0.5 - low * 0.5
    span = high - low
    tiny = (span > 0) & (span < 2.0**-90)
    pre = torch.where(half >= 2.0**126, 0.25, torch.where(tiny, 2.0**100, 1.0))
    low, high = low * pre, high * pre
    span = high - low
    # A tensor, not a number, is divided: torch divides a number by way of the reciprocal.
    scale = torch.full_like(span, levels << _FRACTION_BITS) / span * (1.0 + 2.0**-22)
    scale = torch.where(span > 0, scale, 0.0)
    place = ((y * pre - low) * scale).long()
    counter = torch.arange(y.shape[1], device=y.device)
    noise = _hash(counter, keys & _HALF, (keys >> 32) & _HALF) >> (32 - _FRACTION_BITS)
    return ((place + noise) >> _FRACTION_BITS).clamp(max=levels)


def _pack(fields: Tensor, bits: int) -> Tensor:
    """Return uint8 [blocks, bytes] of codes [blocks, values], each row dense by itself."""
    blocks, values = fields.shape
    fields = torch.nn.functional.pad(fields, (0, -values % 8)).view(blocks, -1, 8)
    # The codes' bits are disjoint, so the sum is their union; it can be negative for 8 bits.
    places = torch.arange(0, 8 * bits, bits, device=fields.device)
    words = (fields << places).sum(2, keepdim=True)
    octets = (words >> torch.arange(0, 8 * bits, 8, device=fields.device)) & 0xFF
    return octets.to(torch.uint8).view(blocks, -1)[:, : (values * bits + 7) // 8]


def _unpack(packed: Tensor, bits: int, values: int) -> Tensor:
    """Return the codes int64 [blocks, values] of uint8 [blocks, bytes]."""
    blocks, size = packed.shape
    octets = torch.nn.functional.pad(packed.long(), (0, -size % bits)).view(blocks, -1, bits)
    places = torch.arange(0, 8 * bits, 8, device=packed.device)
    words = (octets << places).sum(2, keepdim=True)
    fields = (words >> torch.arange(0, 8 * bits, bits, device=packed.device)) & ((1 << bits) - 1)
    return fields.view(blocks, -1)[:, :values]


def _sign_bits(keys: Tensor, size: int) -> Tensor:
    """Return int32 [pieces, size]; the sign bit is set where `_flip` flips a value."""
    width = max(1, size // 32)
    counter = torch.arange(width, device=keys.device)
    random = _hash(counter, keys & _HALF, (keys >> 32) & _HALF)
    places = torch.arange(min(32, size), device=keys.device).view(-1, 1)
    bits = (random.view(-1, 1, width) >> places) & 1
    return (-bits).to(torch.int32).view(-1, size) & -0x80000000


def _flip(rows: Tensor, signs: Tensor) -> Tensor:
    return (rows.view(torch.int32) ^ signs).view(torch.float32)


def _keys(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """Return the 64-bit keys [count, 1] of blocks, as int64: splitmix64, wrapping."""
    index = torch.arange(first + 1, first + count + 1, device=device).view(-1, 1)
    z = index * _signed(GOLDEN) + _signed(seed)
    z = (z ^ _shifted(z, 30)) * _signed(MIX_A)
    z = (z ^ _shifted(z, 27)) * _signed(MIX_B)
    return z ^ _shifted(z, 31)


def _hash(counter: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """Return the 32 random bits of each counter, as int64; see `seeds`."""
    h = counter ^ low
    h = ((h ^ (h >> 16)) * HASH_A) & _HALF
    h = h ^ high
    h = ((h ^ (h >> 15)) * HASH_B) & _HALF
    return h ^ (h >> 15)


def _shifted(z: Tensor, places: int) -> Tensor:
    return (z >> places) & ((1 << (64 - places)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
