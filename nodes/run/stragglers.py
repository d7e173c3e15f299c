"""Simulated stragglers: distributions of ``worker.slowdown``."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fedmq.nodes.errors import ConfigError
from fedmq.nodes.population.distributions import distribution

Slowdown = Callable[[np.random.Generator], float]
"""Draws the factor, at least 1, by which one task takes longer."""


def slowdown(spec: float | str) -> Slowdown:
    """Return the distribution of the factor by which tasks take longer.

    Raises:
        ConfigError: unknown distribution, a factor below 1, or parameters out of range.
    """
    if not isinstance(spec, str):
        if spec < 1:
            raise ConfigError(f"worker.slowdown: expected a factor of at least 1, got {spec}")
        return lambda _rng: spec
    chosen = distribution(spec, "worker.slowdown", -math.inf)
    return lambda rng: 1.0 + max(0.0, chosen.one(rng))
