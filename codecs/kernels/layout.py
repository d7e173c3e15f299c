"""How a vector is cut: blocks, bases, and what each of them costs in coefficients and bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MAX_BLOCK = 1 << 20

_SMALLEST_FRAME = 64


@dataclass(frozen=True)
class HadamardBasis:
    """Blocks are rotated, y = H D x / sqrt(block); Konecny et al. 2016, section 4 (iii).

    D is a diagonal of random signs that follow from ``seed`` and the number of the block,
    H the Sylvester-Hadamard matrix. There are as many coefficients as values: what is left
    behind the last whole block is cut into decreasing powers of two, each rotated by itself.
    """

    seed: int


@dataclass(frozen=True)
class KashinFrame:
    """Blocks become Kashin coefficients; Lyubarskii and Vershynin 2010, Caldas et al. 2018.

    Our own variant, since those in use differ. A block of N coefficients (N = ``block``)
    stands for n = 15 N / 16 values x, rounded down. The frame is U = H D E / sqrt(N), where E
    appends N - n zeros, D is a diagonal of random signs and H the Sylvester-Hadamard matrix;
    U^T U = I. With a = 0 and M = ||x|| / sqrt(delta N), ``iterations`` times

        b = U x;  c = clip(b, -M, M);  a += c;  x -= U^T c;  M *= eta

    but the last time c = b, unless ``clipped``: then U^T a = x to rounding, and the bound on
    max|a| holds only up to the peaks of a small residual. A block of zeros stays zeros.

    The redundancy of 16/15, not 2, is what makes it worth its bytes, since a coefficient takes
    as many bits as a value does. Measured (blocks of 4096, three iterations), the squared error
    is 0.82 of `Hadamard`'s for the same bits a coefficient, and for the same bytes 0.97, 1.04,
    1.13 and 1.22 of it at 1, 2, 3 and 4 bits (six iterations: 0.88, 0.94, 1.03, 1.12 with eta
    0.5, delta 0.8). At n = 3 N / 4 these are 0.54, but 1.2, 1.7, 2.5 and 3.8. ``eta`` and
    ``delta`` are the best found for three and four iterations.

    What is left behind the last whole block goes into frames of decreasing powers of two
    down to 64, and the last few values into the smallest frame that holds them.
    """

    seed: int
    iterations: int = 3
    eta: float = 0.3
    delta: float = 0.5
    clipped: bool = False


Basis = HadamardBasis | KashinFrame | None


@dataclass(frozen=True)
class Cut:
    """A vector cut into pieces.

    block: coefficients of a whole block; inputs: values of one; whole: their number;
    tail: (values, coefficients) of each piece behind, which together are one short block.
    """

    block: int
    inputs: int
    whole: int
    tail: tuple[tuple[int, int], ...]

    @property
    def rest(self) -> int:
        """Return the coefficients of the short block."""
        return sum(size for _, size in self.tail)

    @property
    def coefficients(self) -> int:
        """Return the coefficients of all blocks."""
        return self.whole * self.block + self.rest

    @property
    def blocks(self) -> int:
        """Return the number of blocks, the short one included."""
        return self.whole + bool(self.tail)

    def code_bytes(self, bits: int) -> int:
        """Return the bytes of all packed codes; each block begins at a byte."""
        return self.whole * ((self.block * bits + 7) // 8) + (self.rest * bits + 7) // 8


def cut(n: int, block: int, basis: Basis) -> Cut:
    """Return how ``n`` values are cut into blocks of ``block`` coefficients.

    Raises:
        ValueError: n is negative; block is not in 1..MAX_BLOCK, or no power of two though
            there is a basis; the basis has a parameter that is out of range.
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
    """Return how many values a Kashin frame of ``size`` coefficients holds."""
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
