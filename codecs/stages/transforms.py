"""Bases in which a vector is spread evenly before its numbers are made coarse.

Konecny et al. 2016, "Federated Learning: Strategies for Improving Communication Efficiency",
section 4 (random rotation); Caldas et al. 2018, "Expanding the Reach of Federated Learning",
section 3 (Kashin's representation; Lyubarskii, Vershynin 2010).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from fedmq.codecs import kernels
from fedmq.codecs.base import Buffer
from fedmq.codecs.errors import SpecError
from fedmq.codecs.stages.base import Context, Shapes, StageOrder, Values, ValueStage, fraction

MAX_BLOCK = 1 << 16


class BasisStage(ValueStage):
    """A basis that quantization can apply block by block, while a block is in cache."""

    place = StageOrder.BASIS

    block: int

    @abstractmethod
    def basis(self, seed: int) -> kernels.Basis:
        """Return it as the kernels take it."""


class Identity(ValueStage):
    """The values as they are: the papers' I."""

    name = "identity"
    place = StageOrder.BASIS

    def parameters(self) -> str:
        """None."""
        return ""

    def size(self, n: int, shapes: Shapes) -> int:  # noqa: ARG002
        """N."""
        return n

    def encode(self, values: Values, context: Context) -> tuple[Values, list[Buffer]]:  # noqa: ARG002
        """Return the values."""
        return values, []

    def decode(self, values: Values, context: Context, sides: Sequence[Buffer]) -> Values:  # noqa: ARG002
        """Return the values."""
        return values


class Hadamard(BasisStage):
    """Randomized Hadamard rotation of blocks, H D / sqrt(block): the papers' HD.

    block: values rotated together, a power of two. The signs D follow from the seed and
    differ from block to block.
    """

    name = "hadamard"

    def __init__(self, block: int = 4096) -> None:
        self.block = power_of_two("hadamard", block)

    def parameters(self) -> str:
        """Return the block."""
        return str(self.block)

    def size(self, n: int, shapes: Shapes) -> int:  # noqa: ARG002
        """Return the number of coefficients of n values: n."""
        return kernels.rotated_size(n, self.block)

    def basis(self, seed: int) -> kernels.Basis:
        """Return H D."""
        return kernels.HadamardBasis(seed)

    def encode(self, values: Values, context: Context) -> tuple[Values, list[Buffer]]:
        """Rotate."""
        return kernels.rotate(values, self.block, context.seed), []

    def decode(self, values: Values, context: Context, sides: Sequence[Buffer]) -> Values:  # noqa: ARG002
        """Rotate back."""
        return kernels.unrotate(values, self.block, context.seed, context.n)


class Kashin(BasisStage):
    """Kashin's representation in a random Hadamard frame, block by block: the papers' K.

    A few more coefficients than values, none of which is large: see `kernels.Kashin`.

    block: coefficients of a block, a power of two. iterations: r. eta, delta: the uncertainty
    principle's parameters; each round clips at M, and M shrinks by eta. The last round is not
    clipped, so the representation is exact.
    """

    name = "kashin"

    def __init__(
        self, block: int = 4096, iterations: int = 3, eta: float = 0.3, delta: float = 0.5
    ) -> None:
        self.block = power_of_two("kashin", block)
        if not (type(iterations) is int and 1 <= iterations <= 100):
            raise SpecError(f"codec kashin: iterations must be from 1 to 100, got {iterations!r}")
        self.iterations = iterations
        self.eta = fraction("kashin", "eta", eta)
        self.delta = fraction("kashin", "delta", delta)

    def parameters(self) -> str:
        """Return all parameters."""
        return f"{self.block}, {self.iterations}, {self.eta!r}, {self.delta!r}"

    def size(self, n: int, shapes: Shapes) -> int:  # noqa: ARG002
        """Return the number of coefficients of n values: 16/15 of them."""
        return kernels.kashin_size(n, self.block)

    def basis(self, seed: int) -> kernels.Basis:
        """Return the frame and how it is iterated."""
        return kernels.KashinFrame(seed, self.iterations, self.eta, self.delta)

    def encode(self, values: Values, context: Context) -> tuple[Values, list[Buffer]]:
        """Return the coefficients."""
        found = kernels.kashin(
            values, self.block, self.iterations, self.eta, self.delta, context.seed
        )
        return found, []

    def decode(self, values: Values, context: Context, sides: Sequence[Buffer]) -> Values:  # noqa: ARG002
        """Return the values that the coefficients represent."""
        return kernels.unkashin(values, context.n, self.block, context.seed)


def power_of_two(codec: str, block: object) -> int:
    """Return a block's size.

    Raises:
        SpecError: it is no power of two from 2 to 65,536.
    """
    if type(block) is not int or not 2 <= block <= MAX_BLOCK or block & (block - 1):
        raise SpecError(
            f"codec {codec}: block must be a power of two from 2 to {MAX_BLOCK}, got {block!r}"
        )
    return block
