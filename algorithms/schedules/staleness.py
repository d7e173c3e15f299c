"""Staleness functions s(tau): the weight of a result that is tau versions late.

FedAsync (Xie, Koyejo, Gupta 2019, section 5.2): constant, polynomial, hinge.
FedBuff (Nguyen et al. 2022): inverse_sqrt.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Annotated

from pydantic import AfterValidator

from fedmq.algorithms.toolkit.arithmetic import power
from fedmq.codecs.errors import SpecError
from fedmq.codecs.spec import build

Staleness = Callable[[int], float]


def constant() -> Staleness:
    """s = 1: staleness is ignored."""
    return lambda _tau: 1.0


def polynomial(a: float) -> Staleness:
    """s = (tau + 1)^(-a), a > 0."""
    _positive("polynomial", "a", a)
    return lambda tau: power(tau + 1, -a)


def hinge(a: float, b: float) -> Staleness:
    """s = 1 up to tau = b, then 1 / (a (tau - b) + 1); a > 0, b >= 0."""
    _positive("hinge", "a", a)
    if not b >= 0:
        raise SpecError(f"staleness hinge: expected b of at least 0, got {b}")
    return lambda tau: 1.0 if tau <= b else 1.0 / (a * (tau - b) + 1.0)


def inverse_sqrt() -> Staleness:
    """s = 1 / sqrt(1 + tau)."""
    return lambda tau: 1.0 / math.sqrt(1.0 + tau)


STALENESS: Mapping[str, Callable[..., Staleness]] = {
    "constant": constant,
    "polynomial": polynomial,
    "hinge": hinge,
    "inverse_sqrt": inverse_sqrt,
}


@functools.lru_cache(maxsize=64)
def staleness(spec: str) -> Staleness:
    """Return the function of a spec such as ``polynomial(0.5)``.

    Raises:
        SpecError: unknown name or parameter; the message lists the choices.
    """
    return build(spec, STALENESS, "staleness function")


def _checked(spec: str) -> str:
    staleness(spec)
    return spec


StalenessSpec = Annotated[str, AfterValidator(_checked)]
"""The spec of a staleness function, checked with the field that holds it."""


def _positive(name: str, parameter: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise SpecError(f"staleness {name}: expected {parameter} greater than 0, got {value!r}")
