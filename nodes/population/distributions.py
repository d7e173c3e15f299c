"""Distributions by spec, such as ``lognormal(2, 1)``, for times, speeds and spells."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmq.codecs.errors import SpecError
from fedmq.codecs.spec import build
from fedmq.nodes.errors import ConfigError

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]
"""Draws that many independent values."""

_LARGEST_LOG = 700.0
"""Largest logarithm of a mean; a float holds it."""


@dataclass(frozen=True)
class Distribution:
    """A distribution of numbers.

    draw: draws float64 [n], given a generator and n.
    mean: expected value; infinite for very long tails.
    low: no value is below it.
    draws_0: whether it draws 0 with a probability above 0.
    """

    draw: Draw
    mean: float
    low: float = 0.0
    draws_0: bool = False

    def one(self, rng: np.random.Generator) -> float:
        """Draw one value."""
        return float(self.draw(rng, 1)[0])


def _numbers(**values: object) -> None:
    for name, value in values.items():
        if type(value) not in (int, float) or value != value:  # NaN
            raise SpecError(f"{name}: expected a number, got {value}")


def _positive(**values: float) -> None:
    _numbers(**values)
    for name, value in values.items():
        if not value > 0:
            raise SpecError(f"{name}: expected a number above 0, got {value}")


def _at_least_0(**values: float) -> None:
    _numbers(**values)
    for name, value in values.items():
        if value < 0:
            raise SpecError(f"{name}: expected a number of at least 0, got {value}")


def constant(value: float) -> Distribution:
    """Return the distribution of one value."""
    _numbers(value=value)
    given = float(value)
    return Distribution(lambda _, n: np.full(n, given), given, given, given == 0)


def _uniform(low: float, high: float) -> Distribution:
    _numbers(low=low, high=high)
    if high < low:
        raise SpecError(f"high: expected at least low, {low}, got {high}")
    mean = (low + high) / 2
    return Distribution(lambda rng, n: rng.uniform(low, high, n), mean, low, low == high == 0)


def _halfnormal(scale: float) -> Distribution:
    _at_least_0(scale=scale)
    mean = scale * math.sqrt(2 / math.pi)
    return Distribution(lambda rng, n: np.abs(rng.normal(0.0, scale, n)), mean, draws_0=scale == 0)


def _exponential(scale: float) -> Distribution:
    _at_least_0(scale=scale)
    return Distribution(lambda rng, n: rng.exponential(scale, n), scale, draws_0=scale == 0)


def _lognormal(median: float, sigma: float) -> Distribution:
    _positive(median=median)
    _at_least_0(sigma=sigma)
    mu = math.log(median)
    log_mean = mu + sigma * sigma / 2
    if not log_mean < _LARGEST_LOG:
        raise SpecError(
            f"sigma: expected a mean, median * exp(sigma**2 / 2), below exp({_LARGEST_LOG:g}), "
            f"got sigma {sigma} and median {median}"
        )
    return Distribution(lambda rng, n: rng.lognormal(mu, sigma, n), math.exp(log_mean))


def _pareto(shape: float, scale: float = 1.0, start: float = 0.0) -> Distribution:
    _positive(shape=shape, scale=scale)
    _numbers(start=start)
    mean = start + scale / (shape - 1) if shape > 1 else math.inf
    return Distribution(lambda rng, n: start + scale * rng.pareto(shape, n), mean, start)


def _choice(*values: float) -> Distribution:
    if not values:
        raise SpecError("choice: expected at least one value")
    _numbers(**{f"value {place}": each for place, each in enumerate(values, 1)})
    given = np.array(values, np.float64)
    mean, low = float(given.mean()), float(given.min())
    draws_0 = bool((given == 0).any())
    return Distribution(lambda rng, n: given[rng.integers(len(given), size=n)], mean, low, draws_0)


DISTRIBUTIONS: Mapping[str, Callable[..., Distribution]] = {
    "constant": constant,
    "uniform": _uniform,
    "halfnormal": _halfnormal,
    "exponential": _exponential,
    "lognormal": _lognormal,
    "pareto": _pareto,
    "choice": _choice,
}
"""Factories by name."""

ABOUT: Mapping[str, str] = {
    "constant": "always this value; a plain number is the same",
    "uniform": "equally likely between the two",
    "halfnormal": "scale * |N(0, 1)|",
    "exponential": "of mean scale",
    "lognormal": "median * exp(sigma * N(0, 1)): a long tail",
    "pareto": "start + scale * Lomax(shape); with start = scale, Pareto's own distribution; "
    "infinite mean up to shape 1",
    "choice": "one of the listed numbers, such as choice(1, 2, 8), equally likely",
}
"""What each of them is."""


@functools.lru_cache(maxsize=64)
def read_distribution(spec: float | str, least: float = 0.0) -> Distribution:
    """Return the distribution that a number or a spec describes.

    Args:
        spec: a number, or one of `DISTRIBUTIONS` with its parameters.
        least: no value may be below it.

    Raises:
        SpecError: unknown distribution, or a parameter out of range.
    """
    try:
        found = build(spec, DISTRIBUTIONS, "distribution") if isinstance(spec, str) else None
        chosen = constant(float(spec)) if found is None else found
        value = chosen.one(np.random.default_rng(0))
    except (ValueError, TypeError, OverflowError) as error:
        raise SpecError(str(error)) from None
    if not (value >= least and chosen.low >= least):  # nor is NaN
        raise SpecError(f"expected values of at least {least:g}, got {spec}")
    return chosen


def distribution(spec: float | str, key: str, least: float = 0.0) -> Distribution:
    """Do the same as `read_distribution`, for a key of the configuration.

    Raises:
        ConfigError: the message names the key.
    """
    try:
        return read_distribution(spec, least)
    except SpecError as error:
        raise ConfigError(f"{key}: {error}") from None
