"""FAug's conditional GAN: its size, what it learns, and that all its chance is its own."""

import math
import threading

import pytest
import torch

from fedmq.algorithms.faug.cgan import (
    Discriminator,
    GanSettings,
    augmented,
    make_generator,
    make_images,
    train_gan,
)
from fedmq.algorithms.toolkit.flat_model import FlatModel
from fedmq.codecs.registry import make_codec

SMALL = (16, 24, 32)


def two_shapes():
    """Three images a label: label 0 is bright above, label 2 is bright below."""
    x = torch.full((6, 1, 8, 8), -1.0)
    x[:3, :, :4], x[3:, :, 4:] = 1.0, 1.0
    return x, torch.tensor([0, 0, 0, 2, 2, 2])


def test_the_generator_has_the_papers_1_493_520_parameters_without_its_label_embedding():
    generator = make_generator((1, 28, 28), 10, (256, 512, 1024))
    trained = sum(each.numel() for each in generator.parameters())
    statistics = 2 * (256 + 512 + 1024)  # Keras counts a BatchNorm's running ones in
    assert generator.embedding.weight.numel() == 1_000
    assert trained + statistics - 1_000 == 1_493_520
    assert FlatModel(generator).layout.dim == 1_494_520


def test_what_travels_of_it_is_the_papers_bits_and_the_embedding():
    flat = FlatModel(make_generator((1, 28, 28), 10, (256, 512, 1024)))
    encoded = make_codec("raw").encode(flat.layout.views(flat.weights), 0)
    assert 8 * encoded.nbytes == 1_493_520 * 32 + 1_000 * 32


def test_the_discriminator_is_of_four_layers():
    sizes = [list(each.shape) for each in Discriminator((1, 28, 28), 10).parameters()]
    assert sizes[0] == [10, 784]
    assert sizes[1::2] == [[512, 784], [512, 512], [512, 512], [1, 512]]


def test_a_fresh_generator_has_keras_first_parameters():
    generator = make_generator((1, 28, 28), 10, (256, 512, 1024), seed=1)
    first = generator.layers[0].weight
    limit = math.sqrt(6 / (100 + 256))
    assert 0.99 * limit < first.abs().max() <= limit
    assert generator.embedding.weight.abs().max() <= 0.05
    assert not generator.layers[0].bias.any()
    norm = generator.layers[2]
    assert (norm.momentum, norm.eps) == (pytest.approx(0.2), 1e-3)


@pytest.mark.slow
def test_images_are_of_the_labels_asked_for():
    x, y = two_shapes()
    generator = train_gan(x, y, 3, GanSettings(250, 16, 2e-3, SMALL), seed=0)
    labels = torch.tensor([0] * 20 + [2] * 20)
    made = make_images(generator, labels, 1)
    assert made.shape == (40, 1, 8, 8)
    assert made.abs().max() <= 1
    above = made[:, 0, 1:3].mean(dim=(1, 2)) - made[:, 0, 5:7].mean(dim=(1, 2))
    assert (above[:20] > 0).float().mean() > 0.9
    assert (above[20:] < 0).float().mean() > 0.9


def test_no_images_are_made_for_no_labels():
    generator = make_generator((1, 8, 8), 3, SMALL)
    assert make_images(generator, torch.zeros(0, dtype=torch.int64), 1).shape == (0, 1, 8, 8)


def test_the_same_seed_makes_the_same_generator_beside_a_thread_that_draws():
    x, y = two_shapes()
    settings = GanSettings(5, 8, 1e-3, SMALL)
    before = torch.random.get_rng_state()
    alone = FlatModel(train_gan(x, y, 3, settings, seed=4)).weights
    assert torch.random.get_rng_state().equal(before)
    stop = threading.Event()

    def draw():
        while not stop.is_set():
            torch.rand(8)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        beside = FlatModel(train_gan(x, y, 3, settings, seed=4)).weights
    finally:
        stop.set()
        thread.join()
    torch.random.set_rng_state(before)
    assert alone.equal(beside)
    assert not alone.equal(FlatModel(train_gan(x, y, 3, settings, seed=5)).weights)


def test_augmented_images_are_moved_and_stay_in_range():
    x, _ = two_shapes()
    found = augmented(x, torch.Generator().manual_seed(0))
    assert found.shape == x.shape
    assert found.abs().max() <= 1
    assert not found[0].equal(found[1])
    # What comes in from outside is background, not grey.
    edges = augmented(torch.full((50, 1, 8, 8), -1.0), torch.Generator().manual_seed(0))
    assert edges.mean() < -0.97
