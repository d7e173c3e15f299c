"""Simulated stragglers: distributions of ``worker.slowdown``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np

from fedmq.codecs.errors import SpecError
from fedmq.codecs.spec import build
from fedmq.nodes.errors import ConfigError

Slowdown = Callable[[np.random.Generator], float]
"""Draws the factor, at least 1, by which one task takes longer."""


def _added(draw: Callable[[np.random.Generator], float]) -> Slowdown:
    return lambda rng: 1.0 + max(0.0, float(draw(rng)))


_DISTRIBUTIONS: Mapping[str, Callable[..., Slowdown]] = {
    "uniform": lambda low, high: _added(lambda rng: rng.uniform(low, high)),
    "halfnormal": lambda scale: _added(lambda rng: abs(rng.normal(0.0, scale))),
    "pareto": lambda shape: _added(lambda rng: rng.pareto(shape)),
    "exponential": lambda scale: _added(lambda rng: rng.exponential(scale)),
}


@functools.lru_cache(maxsize=64)
def slowdown(spec: float | str) -> Slowdown:
    """Return the distribution of the factor by which tasks take longer.

    Raises:
        ConfigError: unknown distribution, a factor below 1, or parameters out of range.
    """
    if not isinstance(spec, str):
        if spec < 1:
            raise ConfigError(f"worker.slowdown: expected a factor of at least 1, got {spec}")
        return lambda _rng: spec
    try:
        chosen = build(spec, _DISTRIBUTIONS, "distribution")
        chosen(np.random.default_rng(0))
    except (SpecError, ValueError, TypeError) as error:
        raise ConfigError(f"worker.slowdown: {error}") from None
    return chosen
