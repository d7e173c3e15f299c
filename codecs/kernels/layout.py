"""The layout of a vector in blocks: bases, coefficients, bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MAX_BLOCK = 1 << 20

_SMALLEST_FRAME = 64


@dataclass(frozen=True)
class HadamardBasis:
    """A rotation of each block, y = H D x / sqrt(block); Konecny et al. 2016, section 4 (iii).

    D is a diagonal of random signs, determined by ``seed`` and the block's number; H is the
    Sylvester-Hadamard matrix. There are as many coefficients as values: the values after the
    last whole block are cut into decreasing powers of two, each rotated separately.
    """

    seed: int


@dataclass(frozen=True)
class KashinFrame:
    """Kashin coefficients of each block; Lyubarskii and Vershynin 2010, Caldas et al. 2018.

    This is a variant of our own, since published ones differ. A block of N coefficients
    (N = ``block``) represents n = 15 N / 16 values x, rounded down. The frame is
    U = H D E / sqrt(N), where E appends N - n zeros, D is a diagonal of random signs and H the
    Sylvester-Hadamard matrix; U^T U = I. Starting with a = 0 and M = ||x|| / sqrt(delta N),
    each of ``iterations`` does

        b = U x;  c = clip(b, -M, M);  a += c;  x -= U^T c;  M *= eta

    The last one sets c = b, unless ``clipped``: then U^T a = x up to rounding, and the bound on
    max|a| holds except for the peaks of a small residual. A block of zeros stays zeros.

    The redundancy is 16/15 and not 2, because a coefficient takes as many bits as a value.
    Measured (blocks of 4096, three iterations), the squared error is 0.82 of `HadamardBasis`
    for the same bits per coefficient, and for the same bytes 0.97, 1.04, 1.13 and 1.22 of it
    at 1, 2, 3 and 4 bits (six iterations with eta 0.5, delta 0.8: 0.88, 0.94, 1.03, 1.12). With
    n = 3 N / 4 the figures are 0.54, and 1.2, 1.7, 2.5 and 3.8. ``eta`` and ``delta`` are the
    best found for three and four iterations.

    The values after the last whole block go into frames of decreasing powers of two down to
    64, and the last few values into the smallest frame that holds them.
    """

    seed: int
    iterations: int = 3
    eta: float = 0.3
    delta: float = 0.5
    clipped: bool = False


Basis = HadamardBasis | KashinFrame | None


@dataclass(frozen=True)
class Cut:
    """A vector cut into pieces: whole blocks, and a tail of smaller pieces.

    block: coefficients of a whole block.
    inputs: values of a whole block.
    whole: number of whole blocks.
    tail: (values, coefficients) of each smaller piece; together they are one short block.
    """

    block: int
    inputs: int
    whole: int
    tail: tuple[tuple[int, int], ...]

    @property
    def rest(self) -> int:
        """Number of coefficients of the short block."""
        return sum(size for _, size in self.tail)

    @property
    def coefficients(self) -> int:
        """Number of coefficients of all blocks."""
        return self.whole * self.block + self.rest

    @property
    def blocks(self) -> int:
        """Number of blocks, including the short one."""
        return self.whole + bool(self.tail)

    def code_bytes(self, bits: int) -> int:
        """Return the size of all packed codes in bytes; each block starts at a byte."""
        return self.whole * ((self.block * bits + 7) // 8) + (self.rest * bits + 7) // 8


def cut(n: int, block: int, basis: Basis) -> Cut:
    """Cut ``n`` values into blocks of ``block`` coefficients.

    Raises:
        ValueError: n is negative; block is not in 1..MAX_BLOCK, or with a basis not a power
            of two; a parameter of the basis is out of range.
    """
    if type(n) is not int or n < 0:
        raise ValueError(f"expected a number of values, got {n!r}")
    if type(block) is not int or not 1 <= block <= MAX_BLOCK:
        raise ValueError(f"expected a block of 1 to {MAX_BLOCK} values, got {block!r}")
    if basis is not None and block & (block - 1):
        raise ValueError(f"expected a block that is a power of two, got {block}")
    if isinstance(basis, KashinFrame) and not (
        1 <= basis.iterations <= 100 and 0 < basis.eta <= 1 and 0 < basis.delta <= 1
    ):
        raise ValueError(f"expected 1..100 iterations, eta and delta in (0, 1], got {basis}")
    inputs = capacity(block) if isinstance(basis, KashinFrame) else block
    return Cut(block, inputs, n // inputs, tuple(_tail(n % inputs, block, basis)))


def capacity(size: int) -> int:
    """Return the number of values in a Kashin frame of ``size`` coefficients."""
    return max(1, size * 15 // 16)


def _tail(rest: int, block: int, basis: Basis) -> Iterator[tuple[int, int]]:
    if rest and basis is None:
        yield rest, rest
        return
    size = block
    smallest = min(_SMALLEST_FRAME, block) if isinstance(basis, KashinFrame) else 1
    while rest:
        holds = capacity(size) if isinstance(basis, KashinFrame) else size
        if holds <= rest:
            yield holds, size
            rest -= holds
        elif size > smallest:
            size //= 2
        else:
            while size > 1 and capacity(size // 2) >= rest:
                size //= 2
            yield rest, size
            return
