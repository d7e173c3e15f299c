"""Floats as 8- or 4-bit codes: ``value = low + step * code``, with a grid for each group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedmq.codecs.base import Buffer, Encoded
from fedmq.codecs.errors import CodecError, DecodeError

LEVELS: Mapping[str, int] = {"int8": 255, "int4": 15}
"""The highest code; the lowest is 0."""

# The largest float32 that rounds to a finite number of the dtype. int8 and int4 end at 2^126:
# differences of larger values could overflow, and only diverged networks have such values.
REACH: Mapping[str, float] = {
    "float32": torch.finfo(torch.float32).max,
    "float16": 65520.0 - 2.0**-8,
    "bfloat16": 2.0**128 - 2.0**119 - 2.0**104,
    "int8": 2.0**126,
    "int4": 2.0**126,
}
_TINY = torch.finfo(torch.float32).tiny


class Grid(NamedTuple):
    """The values of codes, low + step * code. low, step: float32 [groups] on the CPU, step > 0."""

    low: Tensor
    step: Tensor


def fit(least: Tensor, most: Tensor, levels: int) -> Grid:
    """Return grids from the minimum to the maximum of each group, on which 0 is exact.

    If a group has values on both sides of 0, or 0 itself, ``low`` moves by at most half a step
    to a whole number of steps, so that 0 decodes to exactly 0.

    Args:
        least: the minima, float32 [groups], within `REACH`.
        most: the maxima, float32 [groups], within `REACH`.
        levels: the highest code.
    """
    lo, hi = least.cpu().double(), most.cpu().double()
    # A subnormal step would lose bits or be 0.
    step = ((hi - lo) / levels).float().clamp_min(_TINY)
    whole = (-lo / step.double()).round().clamp(0, levels)
    straddles = (lo <= 0) & (hi >= 0)
    return Grid(torch.where(straddles, 0.0 - whole.float() * step, lo.float()), step)


def fit_bfloat16(least: Tensor, most: Tensor, levels: int) -> Grid:
    """Return grids that cover each group, with ``low`` and ``step`` in bfloat16.

    ``low`` is rounded down and ``step`` up; a step is at most 1.01 * (most - least +
    |least| / 128) / levels. 0 is not always on the grid.

    Args:
        least: the minima, float32 [groups], within `REACH`.
        most: the maxima, float32 [groups], within `REACH`.
        levels: the highest code.
    """
    low = _outward(least.cpu().double(), -math.inf)
    step = (most.cpu().double() - low.double()) / levels
    return Grid(low.float(), _outward(step.clamp_min(_TINY), math.inf).float())


def quantize(x: Tensor, low: Tensor, step: Tensor, levels: int) -> Tensor:
    """Return the code of the nearest grid value (ties to even) for each element.

    The error is at most half a step, plus float32 rounding. All operations are element-wise
    in float32, so a GPU gives the same codes as a CPU.

    Args:
        x: float32 [...].
        low: as in `Grid`, on x's device and of a shape that broadcasts.
        step: as ``low``.
        levels: the highest code.

    Returns:
        uint8 [...].
    """
    whole = (x - low).div_(step).round_().clamp_(0, levels)
    return whole.to(torch.int32).to(torch.uint8)  # on a CPU twice as fast as in one step


def dequantize(codes: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """Return the grid values of codes, float32 [...].

    0 is exact because the product is rounded before the sum (no fused multiply-add).
    """
    return codes.to(torch.float32).mul_(step).add_(low)


def check_grid(low: Tensor, step: Tensor, levels: int) -> Grid:
    """Return a received grid as float32.

    Raises:
        DecodeError: a number is not finite, a step is not positive, or values would overflow.
    """
    wide_low, wide_step = low.double(), step.double()
    top = wide_low + levels * wide_step
    limit = 2 * REACH["int8"]
    # Comparisons with NaN are false, so numbers that are not finite fail here, too.
    if not bool(((wide_step > 0) & (wide_low >= -limit) & (top <= limit)).all()):
        raise DecodeError("expected finite scales and minima, and scales above 0")
    return Grid(low.float(), step.float())


def check_reach(
    x: Tensor, least: Tensor, most: Tensor, dtype: str, what: str, names: Tensor
) -> None:
    """Check that a dtype can hold all values.

    Args:
        x: float32 [rows, ...].
        least: minima of x or of its groups, float32 of any shape; NaN where x has NaN.
        most: maxima, likewise.
        dtype: a key of `REACH`.
        what: the noun for the error, for example ``"features of sample"``.
        names: int64 [rows], the name of each row in the error.

    Raises:
        CodecError: a value is not finite or too large; the message has the first such row,
            the value and the bound.
    """
    reach = REACH[dtype]
    # Comparisons with NaN are false.
    if bool(((least >= -reach) & (most <= reach)).all()):
        return
    beyond = ~(x.abs() <= reach).flatten(1)
    row = int(beyond.any(dim=1).nonzero()[0])
    value = x[row].flatten()[beyond[row]][0].item()
    raise CodecError(
        f"{what} {int(names[row])} hold {value:g}; {dtype} takes finite values up to {reach:.8g}"
    )


def check_finite(x: Tensor, what: str) -> None:
    """Check that all received values, float32 [...], are finite.

    Raises:
        DecodeError: a value is NaN or infinite.
    """
    if x.numel():
        least, most = x.aminmax()
        if not bool(least.isfinite() & most.isfinite()):
            raise DecodeError(f"expected finite {what}, got nan or an infinity")


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack two codes per byte, the first in the low half; each row starts at a byte.

    Args:
        codes: uint8 [rows, size] below 16.

    Returns:
        uint8 [rows, (size + 1) // 2].
    """
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, size: int) -> Tensor:
    """Return the codes, uint8 [rows, size], of packed rows, uint8 [rows, (size + 1) // 2].

    Raises:
        DecodeError: the unused half byte of a row of odd size is not 0.
    """
    codes = torch.stack([packed & 15, packed >> 4], dim=2).view(packed.shape[0], -1)
    if codes.shape[1] > size and bool(codes[:, size:].any()):
        raise DecodeError("expected 0 in the half byte after the last code of a sample")
    return codes[:, :size]


def vector(buffer: Buffer, dtype: torch.dtype) -> Tensor:
    """Return the elements of a buffer; only a read-only buffer is copied."""
    view = memoryview(buffer)
    if not view.nbytes:
        return torch.empty(0, dtype=dtype)
    # torch needs writable memory.
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=dtype)


def as_buffer(tensor: Tensor) -> Buffer:
    """Return the little-endian bytes of a tensor; a contiguous CPU tensor is not copied."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def head_and_values(encoded: Encoded, head_bytes: int) -> tuple[memoryview, memoryview]:
    """Return the two buffers of features or logits.

    Raises:
        DecodeError: there are not two buffers, or the first does not have ``head_bytes``.
    """
    if len(encoded.buffers) != 2:
        raise DecodeError(f"expected 2 buffers, got {len(encoded.buffers)}")
    head, values = (memoryview(each).cast("B") for each in encoded.buffers)
    if head.nbytes != head_bytes:
        raise DecodeError(f"the first buffer has {head.nbytes} bytes, it needs {head_bytes}")
    return head, values


def _outward(x: Tensor, to: float) -> Tensor:
    """Round float64 to bfloat16 towards an infinity."""
    near = x.to(torch.bfloat16)
    short = near.double() < x if to > 0 else near.double() > x
    return torch.where(short, torch.nextafter(near, torch.tensor(to, dtype=near.dtype)), near)
