"""The conditional GAN of FAug (Jeong et al., 2018): Mirza and Osindero's, of four dense layers.

The paper states "4-layer" networks and 1,493,520 parameters of the generator. The widely used dense
one for MNIST with widths 256, 512 and 1024 has exactly as many, with its BatchNorms' running
statistics and without its label embedding. The discriminator's widths, the optimizer and the batch
size are also taken from it, because the paper states none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmq.algorithms.rng import derive_rng, derive_seed

M = TypeVar("M", bound=nn.Module)

NOISE = 100
"""Length of z."""
WIDTHS = (256, 512, 1024)
"""Widths of the generator's hidden layers; its last layer is as wide as an image."""
_DROPPED = 0.4
_SLOPE = 0.2
_MAX_BATCH = 256


class _Linear(nn.Linear):
    """A linear layer that draws no first parameters from torch's global generator."""

    def reset_parameters(self) -> None:
        """Do nothing: `_initialised` sets the parameters."""


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Do nothing: `_initialised` sets the parameters."""


class Generator(nn.Module):
    """z * embedding(label) -> 256 -> 512 -> 1024 -> an image in -1 to 1.

    LeakyReLU 0.2, then BatchNorm (momentum 0.8 in Keras's sense) after each hidden layer; tanh.
    """

    def __init__(
        self, shape: tuple[int, ...], classes: int, widths: tuple[int, int, int] = WIDTHS
    ) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = _Embedding(classes, NOISE)
        layers: list[nn.Module] = []
        for before, after in zip((NOISE, *widths), widths, strict=False):
            norm = nn.BatchNorm1d(after, eps=1e-3, momentum=0.2)
            layers += [_Linear(before, after), nn.LeakyReLU(_SLOPE), norm]
        self.layers = nn.Sequential(*layers, _Linear(widths[-1], math.prod(shape)), nn.Tanh())

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """z: float32 [n, 100], labels: int64 [n] -> float32 [n, C, H, W] in -1 to 1."""
        images: Tensor = self.layers(z * self.embedding(labels))
        return images.view(len(labels), *self.shape)


class Discriminator(nn.Module):
    """image * embedding(label) -> 512 -> 512 -> 512 -> a logit of being real.

    LeakyReLU 0.2; dropout 0.4 after the second and third, drawn from the given random source.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, width: int = 512) -> None:
        super().__init__()
        pixels = math.prod(shape)
        self.embedding = _Embedding(classes, pixels)
        self.fc1 = _Linear(pixels, width)
        self.fc2 = _Linear(width, width)
        self.fc3 = _Linear(width, width)
        self.fc4 = _Linear(width, 1)

    def forward(self, images: Tensor, labels: Tensor, source: torch.Generator) -> Tensor:
        """images: float32 [n, C, H, W] in -1 to 1, labels: int64 [n] -> logits [n, 1]."""
        x = F.leaky_relu(self.fc1(images.flatten(1) * self.embedding(labels)), _SLOPE)
        x = _dropout(F.leaky_relu(self.fc2(x), _SLOPE), source)
        x = _dropout(F.leaky_relu(self.fc3(x), _SLOPE), source)
        logits: Tensor = self.fc4(x)
        return logits


@dataclass(frozen=True)
class GanSettings:
    """How a GAN is trained.

    steps: number of steps; each is one of the discriminator, on as many real as generated images,
        and one of the generator.
    batch_size: images a batch.
    lr: learning rate of Adam, whose betas are 0.5 and 0.999.
    widths: widths of the generator's hidden layers; the second is that of the discriminator's.
    """

    steps: int
    batch_size: int = 32
    lr: float = 2e-4
    widths: tuple[int, int, int] = WIDTHS


def make_generator(
    shape: tuple[int, ...], classes: int, widths: tuple[int, int, int], seed: int = 0
) -> Generator:
    """Return a fresh generator; torch's global generator is not used."""
    return _initialised(Generator(shape, classes, widths), _source(seed, "generator"))


def train_gan(x: Tensor, y: Tensor, classes: int, settings: GanSettings, seed: int) -> Generator:
    """Return a generator trained on a few images with augmentation.

    It uses no global random generator, so that it can run beside other threads.

    Args:
        x: float32 [n, C, H, W] in -1 to 1.
        y: int64 [n], their labels; each is equally likely in a batch.
        classes: L.
        settings: of the training.
        seed: seed of all random draws.
    """
    shape = tuple(x.shape[1:])
    generator = make_generator(shape, classes, settings.widths, seed)
    judge = Discriminator(shape, classes, settings.widths[1])
    _initialised(judge, _source(seed, "discriminator"))
    source, rng = _source(seed, "noise"), derive_rng(seed, "gan batches")
    optimizers = [
        torch.optim.Adam(each.parameters(), lr=settings.lr, betas=(0.5, 0.999))
        for each in (generator, judge)
    ]
    labels = torch.bincount(y).nonzero()[:, 0]
    rows = [(y == label).nonzero()[:, 0].numpy() for label in labels]
    real, made = torch.ones((settings.batch_size, 1)), torch.zeros((settings.batch_size, 1))
    generator.train()
    judge.train()
    for _ in range(settings.steps):
        chosen = torch.from_numpy(_balanced(rows, settings.batch_size, rng))
        images, of = augmented(x[chosen], source), y[chosen]
        with torch.no_grad():
            fakes = generator(_noise(settings.batch_size, source), of)
        loss = _bce(judge(images, of, source), real) + _bce(judge(fakes, of, source), made)
        _step(optimizers[1], loss / 2)
        wanted = labels[torch.randint(len(labels), (settings.batch_size,), generator=source)]
        fakes = generator(_noise(settings.batch_size, source), wanted)
        _step(optimizers[0], _bce(judge(fakes, wanted, source), real))
    return generator


def make_images(generator: Generator, labels: Tensor, seed: int) -> Tensor:
    """Return an image for each label, float32 [n, C, H, W] in -1 to 1."""
    source = _source(seed, "made images")
    generator.eval()
    with torch.no_grad():
        parts = [
            generator(_noise(len(part), source), part) for part in torch.split(labels, _MAX_BATCH)
        ]
    return torch.cat(parts)


def augmented(x: Tensor, source: torch.Generator) -> Tensor:
    """Return randomly rotated, scaled and shifted images with noise, float32 [n, C, H, W].

    By up to 15 degrees and a tenth of their size; noise of standard deviation 0.05. New pixels at
    the border are -1, the background. x, like the returned images, has values in -1 to 1.
    """
    n = len(x)
    angle, size, across, down = (torch.rand((4, n), generator=source) * 2 - 1).unbind()
    angle, size = angle * math.radians(15), 1 + size / 10
    cos, sin = angle.cos() * size, angle.sin() * size
    # Shifts are in halves of an image.
    theta = torch.stack([cos, -sin, across / 5, sin, cos, down / 5], dim=1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    moved = F.grid_sample(x + 1, grid, align_corners=False) - 1
    noise = torch.randn(moved.shape, generator=source) * 0.05
    return (moved + noise).clamp(-1, 1)


def _balanced(rows: list[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw ``size`` rows: for each a label, then one of its rows."""
    return np.array([rng.choice(rows[each]) for each in rng.integers(len(rows), size=size)])


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call] # torch's
    optimizer.step()


_bce: Callable[[Tensor, Tensor], Tensor] = F.binary_cross_entropy_with_logits


def _noise(n: int, source: torch.Generator) -> Tensor:
    return torch.randn((n, NOISE), generator=source)


def _dropout(x: Tensor, source: torch.Generator) -> Tensor:
    keep = torch.rand(x.shape, generator=source) >= _DROPPED
    return x * keep / (1 - _DROPPED)


def _source(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, purpose))


def _initialised(module: M, source: torch.Generator) -> M:
    """Initialise a module's parameters as Keras does."""
    for each in module.modules():
        match each:
            case nn.Linear():
                nn.init.xavier_uniform_(each.weight, generator=source)
                nn.init.zeros_(each.bias)
            case nn.Embedding():
                nn.init.uniform_(each.weight, -0.05, 0.05, generator=source)
    return module
