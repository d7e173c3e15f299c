"""Bases that spread a vector's values evenly before they are quantized.

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


class Identity(ValueStage):
    """The values unchanged: the papers' I."""

    name = "identity"
    place = StageOrder.BASIS

    def parameters(self) -> str:
        """Return an empty string."""
        return ""

    def size(self, n: int, shapes: Shapes) -> int:  # noqa: ARG002
        """Return ``n``."""
        return n

    def encode(self, values: Values, context: Context) -> tuple[Values, list[Buffer]]:  # noqa: ARG002
        """Return the values."""
        return values, []

    def decode(self, values: Values, context: Context, side: Sequence[Buffer]) -> Values:  # noqa: ARG002
        """Return the values."""
        return values


class BasisStage(ValueStage):
    """A basis for blocks of values.

    Quantization of the same blocks applies it itself, while a block is in cache.

    block: coefficients per block, a power of two.
    """

    place = StageOrder.BASIS

    def __init__(self, block: int = 4096) -> None:
        if type(block) is not int or not 2 <= block <= MAX_BLOCK or block & (block - 1):
            raise SpecError(
                f"codec {self.name}: block must be a power of two from 2 to {MAX_BLOCK}, "
                f"got {block!r}"
            )
        self.block = block

    @abstractmethod
    def basis(self, seed: int) -> kernels.HadamardBasis | kernels.KashinFrame:
        """Return the basis of a seed, as the kernels take it."""

    def size(self, n: int, shapes: Shapes) -> int:  # noqa: ARG002
        """Return the number of coefficients of ``n`` values."""
        return kernels.coefficients(n, self.block, self.basis(0))

    def encode(self, values: Values, context: Context) -> tuple[Values, list[Buffer]]:
        """Return the coefficients."""
        return kernels.transform(values, self.block, self.basis(context.seed)), []

    def decode(self, values: Values, context: Context, side: Sequence[Buffer]) -> Values:  # noqa: ARG002
        """Return the values of the coefficients."""
        return kernels.restore(values, context.n, self.block, self.basis(context.seed))


class Hadamard(BasisStage):
    """Randomized Hadamard rotation of blocks, H D / sqrt(block): the papers' HD.

    block: values rotated together, a power of two. The signs D follow from the seed and
    differ from block to block.
    """

    name = "hadamard"

    def parameters(self) -> str:
        """Return the block."""
        return str(self.block)

    def basis(self, seed: int) -> kernels.HadamardBasis:
        """Return H D."""
        return kernels.HadamardBasis(seed)


class Kashin(BasisStage):
    """Kashin's representation in a random Hadamard frame, block by block: the papers' K.

    There are a few more coefficients than values, and none is large: see `kernels.KashinFrame`.

    block: coefficients per block, a power of two. iterations: r. eta, delta: the uncertainty
    principle's parameters; each iteration clips at M, and M shrinks by eta. The last iteration
    does not clip, so the representation is exact.
    """

    name = "kashin"

    def __init__(
        self, block: int = 4096, iterations: int = 3, eta: float = 0.3, delta: float = 0.5
    ) -> None:
        super().__init__(block)
        if not (type(iterations) is int and 1 <= iterations <= 100):
            raise SpecError(f"codec kashin: iterations must be from 1 to 100, got {iterations!r}")
        self.iterations = iterations
        self.eta = fraction("kashin", "eta", eta)
        self.delta = fraction("kashin", "delta", delta)

    def parameters(self) -> str:
        """Return all parameters."""
        return f"{self.block}, {self.iterations}, {self.eta!r}, {self.delta!r}"

    def basis(self, seed: int) -> kernels.KashinFrame:
        """Return the frame and its iteration."""
        return kernels.KashinFrame(seed, self.iterations, self.eta, self.delta)
