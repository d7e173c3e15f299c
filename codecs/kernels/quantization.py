"""Vectors to packed codes and back, in a basis."""

# The compiled functions have no types; this module declares them.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmq.codecs.kernels.layout import Basis, Cut, HadamardBasis, KashinFrame, cut
from fedmq.codecs.kernels.seeds import Purpose, state

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]


def quantize(
    x: Floats, bits: int, block: int, seed: int, basis: Basis = None
) -> tuple[Codes, Floats]:
    """Round each block of coefficients stochastically to 2**bits levels, and pack the codes.

    The levels divide [min, max] of the block into 2**bits - 1 equal intervals (Konecny et al.
    2016, section 4 (ii), but with one level per code). A value becomes one of the two adjacent
    levels, at random and without bias (up to 2**-22 of max - min). The minimum and the maximum
    are exact. The random numbers depend on ``seed``, the block and the position in it only, so
    the bytes are the same on any device.

    Args:
        x: float32 [n].
        bits: bits per code, 1..8.
        block: number of coefficients that share a range.
        seed: seed of the rounding, any integer; only its lower 64 bits are used.
        basis: basis of the coefficients; None for x itself.

    Returns:
        codes, uint8 [`code_bytes`]: code j of a block starts at bit j * bits, least
        significant first; each block starts at a byte, and unused bits are 0.
        ranges, float32 [blocks, 2]: minimum and maximum of each block.

    Raises:
        ValueError: a value is not finite (or a coefficient, if values near the limits of
            float32 are rotated), or an argument is out of range.
    """
    from fedmq.codecs.kernels import native

    x = vector(x)
    shape = cut(x.size, block, basis)
    codes = np.empty(code_bytes(x.size, bits, block, basis), np.uint8)
    ranges = np.empty((shape.blocks, 2), np.float32)
    finite = native.encode(
        readonly(x),
        bits,
        *_plan(shape, basis),
        state(seed, Purpose.ROUNDING),
        _signs(basis),
        _iteration(basis),
        codes,
        ranges,
    )
    if not finite:
        raise ValueError("expected finite values, got an infinity or NaN")
    return codes, ranges


def dequantize(
    codes: Codes, ranges: Floats, n: int, bits: int, block: int, basis: Basis = None
) -> Floats:
    """Return the values, float32 [n], of the codes of `quantize` with the same basis.

    Code k of 0..2**bits - 1 is min * (1 - k / top) + max * k / top in float32, with
    top = 2**bits - 1.

    Raises:
        ValueError: codes or ranges do not match n, bits and block, or a range is not finite or
            not ascending. This is checked before any memory is allocated.
    """
    shape = check(codes, ranges, n, bits, block, basis)
    out = np.empty(n, np.float32)
    _decode(out, codes, ranges, bits, shape, basis, weight=1.0, adding=False)
    return out


def accumulate(
    total: Floats,
    codes: Codes,
    ranges: Floats,
    bits: int,
    block: int,
    weight: float,
    basis: Basis = None,
) -> None:
    """Add ``weight`` times the values of `dequantize` to total, float32 [n], without a copy.

    The result has the same bits as ``total += float32(weight) * dequantize(...)``.

    Raises:
        ValueError: as `dequantize`, or the weight is not finite, or total is read-only.
    """
    if not vector(total).flags.writeable:
        raise ValueError("expected a writable total")
    if not math.isfinite(weight):
        raise ValueError(f"expected a finite weight, got {weight}")
    shape = check(codes, ranges, total.size, bits, block, basis)
    _decode(total, codes, ranges, bits, shape, basis, weight=weight, adding=True)


def transform(x: Floats, block: int, basis: HadamardBasis | KashinFrame) -> Floats:
    """Return the coefficients of x in a basis, float32 [`coefficients`].

    Raises:
        ValueError: ``block`` is not a power of two in 1..MAX_BLOCK, a parameter of the basis is
            out of range, or x is not a float32 vector.
    """
    from fedmq.codecs.kernels import native

    x = vector(x)
    shape = cut(x.size, block, basis)
    out = np.empty(shape.coefficients, np.float32)
    native.transform(readonly(x), *_plan(shape, basis), _signs(basis), _iteration(basis), out)
    return out


def restore(y: Floats, n: int, block: int, basis: HadamardBasis | KashinFrame) -> Floats:
    """Return x [n] of ``y = transform(x, block, basis)``, exact up to float32 rounding.

    This is one Hadamard transform per block in either basis.

    Raises:
        ValueError: as `transform`, or y does not have `coefficients` values.
    """
    from fedmq.codecs.kernels import native

    y = vector(y)
    shape = cut(n, block, basis)
    if y.size != shape.coefficients:
        raise ValueError(f"expected {shape.coefficients} coefficients, got {y.size}")
    out = np.empty(n, np.float32)
    native.restore(readonly(y), *_plan(shape, basis), _signs(basis), out)
    return out


def coefficients(n: int, block: int, basis: Basis) -> int:
    """Return the number of coefficients of n values: n, and about 16/15 n in a Kashin frame.

    Raises:
        ValueError: as `cut`.
    """
    return cut(n, block, basis).coefficients


def signs(n: int, seed: int) -> Floats:
    """Return n random signs, +1 or -1, float32 [n].

    Raises:
        ValueError: n is negative.
    """
    from fedmq.codecs.kernels import native

    if n < 0:
        raise ValueError(f"expected a number of signs, got {n}")
    out = np.empty(1 << max(0, n - 1).bit_length(), np.float32)
    native.signs(out, state(seed, Purpose.SIGNS))
    return out[:n]


def code_bytes(n: int, bits: int, block: int, basis: Basis = None) -> int:
    """Return the size of the codes of n values in bytes, without the 8 bytes per range.

    Raises:
        ValueError: as `cut`, or bits is not in 1..8.
    """
    if type(bits) is not int or not 1 <= bits <= 8:
        raise ValueError(f"expected 1 to 8 bits, got {bits!r}")
    return cut(n, block, basis).code_bytes(bits)


def check(codes: Codes, ranges: Floats, n: int, bits: int, block: int, basis: Basis) -> Cut:
    """Return the cut of a message, after checking its sizes and ranges.

    Raises:
        ValueError: codes or ranges are invalid.
    """
    shape = check_sizes(
        str(codes.dtype), codes.shape, str(ranges.dtype), ranges.shape, n, bits, block, basis
    )
    if not codes.flags.c_contiguous:
        raise ValueError("expected contiguous codes")
    low, high = ranges[:, 0], ranges[:, 1]
    # NaN fails the comparison; after it, only low can be -inf and only high inf.
    if not (low <= high).all() or (low == -np.inf).any() or (high == np.inf).any():
        raise ValueError("expected finite ranges as minimum, maximum")
    return shape


def check_sizes(
    codes_dtype: str,
    codes_shape: tuple[int, ...],
    ranges_dtype: str,
    ranges_shape: tuple[int, ...],
    n: int,
    bits: int,
    block: int,
    basis: Basis,
) -> Cut:
    """Return the cut of a message, after checking its arrays' or tensors' dtypes and shapes.

    Raises:
        ValueError: a dtype or shape is wrong, or an argument is out of range.
    """
    expected = code_bytes(n, bits, block, basis)
    shape = cut(n, block, basis)
    if codes_dtype.removeprefix("torch.") != "uint8" or codes_shape != (expected,):
        raise ValueError(f"expected uint8 [{expected}] codes, got {codes_dtype} {codes_shape}")
    if ranges_dtype.removeprefix("torch.") != "float32" or ranges_shape != (shape.blocks, 2):
        raise ValueError(
            f"expected float32 [{shape.blocks}, 2] ranges, got {ranges_dtype} {ranges_shape}"
        )
    return shape


def vector(x: Floats) -> Floats:
    """Return x, after checking that the kernels can read it.

    Raises:
        ValueError: x is not an aligned, contiguous float32 vector.
    """
    if x.dtype != np.float32 or x.ndim != 1 or not (x.flags.c_contiguous and x.flags.aligned):
        raise ValueError(f"expected a contiguous float32 vector, got {x.dtype} {x.shape}")
    return x


def _decode(
    out: Floats,
    codes: Codes,
    ranges: Floats,
    bits: int,
    shape: Cut,
    basis: Basis,
    *,
    weight: float,
    adding: bool,
) -> None:
    from fedmq.codecs.kernels import native

    # Ranges can be at any byte of a message; copying them is cheap.
    aligned = np.require(ranges, np.float32, ["C", "A"])
    native.decode(
        readonly(codes),
        readonly(aligned),
        bits,
        *_plan(shape, basis),
        _signs(basis),
        out,
        np.float32(weight),
        adding,
    )


def _plan(shape: Cut, basis: Basis) -> tuple[int, int, NDArray[np.int64], bool]:
    tail = np.array(shape.tail, np.int64).reshape(-1, 2)
    return shape.block, shape.inputs, tail, basis is not None


def _signs(basis: Basis) -> np.uint64:
    return state(0 if basis is None else basis.seed, Purpose.SIGNS)


def _iteration(basis: Basis) -> tuple[int, np.float32, np.float32, bool] | None:
    if not isinstance(basis, KashinFrame):
        return None
    return basis.iterations, np.float32(basis.eta), np.float32(basis.delta), basis.clipped


def readonly(array: NDArray[Any]) -> NDArray[Any]:
    """Return a read-only view: with one type for all arrays, numba compiles one version."""
    view = array.view()
    view.flags.writeable = False
    return view
