"""``fedmq codec bench``: measure a codec's bytes, error and time on a model."""

from __future__ import annotations

import time

import click

from fedmq.nodes.cli.options import Commands, WholeNumber, exit_2_on_error


@click.group(cls=Commands)
def codec() -> None:
    """Measure codecs."""


@codec.command()
@click.argument("spec")
@click.option(
    "--model", default="cnn", show_default=True, help="Model to encode, see fedmq list problems."
)
@click.option(
    "--repeats",
    type=WholeNumber(min=1),
    default=5,
    show_default=True,
    help="Number of measurements.",
)
@click.option(
    "--seed",
    type=WholeNumber(min=0),
    default=0,
    show_default=True,
    help="Seed of all random numbers.",
)
def bench(spec: str, model: str, repeats: int, seed: int) -> None:
    """Encode and decode a model's initial weights with the codec SPEC.

    fedmq list codecs shows the codecs. Prints the bytes on the wire, including metadata; the
    ratio of the float32 bytes to these; the mean normalised squared error (nmse), |decoded -
    weights|^2 / |weights|^2; and the median speed in GB of float32 per second on one thread.
    """
    with exit_2_on_error():
        rows = measure(spec, model, repeats, seed)
    width = max(len(name) for name, _ in rows)
    for name, figure in rows:
        click.echo(f"{name:{width}}  {figure}")


def measure(spec: str, model: str, repeats: int, seed: int) -> list[tuple[str, str]]:
    """Return names and values of the table.

    Raises:
        SpecError: the spec is invalid.
        ConfigError: there is no such model.
    """
    import msgspec
    import torch

    from fedmq.algorithms.problems.models import MODELS
    from fedmq.algorithms.toolkit.flat_model import FlatModel
    from fedmq.codecs.formats.flat import as_flat
    from fedmq.codecs.registry import decode, make_codec
    from fedmq.codecs.text import unknown
    from fedmq.nodes.errors import ConfigError

    chosen = make_codec(spec)
    if model not in MODELS:
        raise ConfigError(f"--model: {unknown('model', model, MODELS)}")
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    shape = (3, 32, 32) if "cifar" in model else (1, 28, 28)
    flat = FlatModel(MODELS[model](shape, 10))
    tensors = flat.layout.trained_views(flat.weights)
    before = as_flat(list(tensors.values()))
    encoding, decoding, errors = [], [], []
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        encoded = chosen.encode(tensors, seed + repeat)
        middle = time.perf_counter()
        after = as_flat(list(decode(encoded).values()))
        if repeat:  # the first repeat compiles
            encoding.append(middle - began)
            decoding.append(time.perf_counter() - middle)
        errors.append(float((after - before).square().sum() / before.square().sum()))
    nbytes = encoded.nbytes + len(msgspec.msgpack.encode([encoded.codec, encoded.meta]))
    size = before.numel() * 4
    return [
        ("codec", encoded.codec),
        ("values", f"{before.numel():,}"),
        ("bytes", f"{nbytes:,} (float32: {size:,})"),
        ("ratio", f"{size / nbytes:.2f}"),
        ("nmse", f"{sum(errors) / len(errors):.3g}"),
        ("encode", f"{size / 1e9 / sorted(encoding)[repeats // 2]:.2f} GB/s"),
        ("decode", f"{size / 1e9 / sorted(decoding)[repeats // 2]:.2f} GB/s"),
    ]
