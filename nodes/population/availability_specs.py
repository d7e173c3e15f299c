"""What ``simulation.availability`` can be: a probability, spells, hours of the day, a trace."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import numpy as np

from fedmq.algorithms.seeds import derive_seed
from fedmq.codecs.errors import SpecError
from fedmq.codecs.spec import build_call, parse_one
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.population.availability import Availability
from fedmq.nodes.population.csv_files import read_intervals
from fedmq.nodes.population.distributions import Distribution, read_distribution
from fedmq.nodes.population.hashing import uniforms
from fedmq.nodes.population.spells import (
    DAY_S,
    DailySpells,
    DrawnSpells,
    RandomSteps,
    Spells,
    TracedSpells,
)

KEY = "simulation.availability"
_SPELLS = re.compile(r"\s*spells\s*\((.*)\)\s*", re.DOTALL)
_COMMA = re.compile(r",(?![^()]*\))")
"""A comma outside of the parentheses of a distribution."""

Position = Callable[[int], float]
"""Returns where a client's labels are on average, from 0 (the first class) to 1 (the last)."""


def check_availability(spec: float | str, step_s: float) -> None:
    """Check all but the file of a value of ``simulation.availability``.

    Raises:
        SpecError: it cannot be used.
    """
    if isinstance(spec, str) and not _is_file(spec):
        _builder(spec, step_s)


def make_availability(
    spec: float | str, step_s: float, clients: int, seed: int, position: Position | None
) -> Availability:
    """Return when each client is available.

    Args:
        spec: value of ``simulation.availability``.
        step_s: of ``simulation.availability_step``.
        clients: number of clients.
        seed: of the run.
        position: of each client's labels; None if the problem has no classes.

    Raises:
        ConfigError: the value or its file cannot be used.
    """
    if not isinstance(spec, str):
        return Availability(RandomSteps(spec, seed), clients, step_s)
    if _is_file(spec):
        found = read_intervals(spec, KEY)
        traced = TracedSpells(found.client, found.start, found.end, clients, step_s)
        return Availability(traced, clients, step_s)
    try:
        spells = _builder(spec, step_s)(_Clients(clients, seed, position))
    except SpecError as error:
        raise ConfigError(f"{KEY}: {error}") from None
    return Availability(spells, clients, step_s)


def _is_file(spec: str) -> bool:
    return spec.lower().endswith(".csv")


class _Clients:
    def __init__(self, clients: int, seed: int, position: Position | None) -> None:
        self.clients, self.seed, self._position = clients, seed, position

    def positions(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Return the position of each client's labels."""
        if self._position is None:
            raise SpecError("expected a problem with classes for availability by label")
        return np.fromiter(map(self._position, range(self.clients)), np.float64, self.clients)


_Builder = Callable[[_Clients], Spells]


def _builder(spec: str, step_s: float) -> _Builder:
    if match := _SPELLS.fullmatch(spec):
        return _spells([each.strip() for each in _COMMA.split(match[1])], step_s)

    def daily(hours: float, by: str = "chance") -> _Builder:
        return _daily(hours, by, step_s)

    choices: Mapping[str, Callable[..., _Builder]] = {"by_label": _by_label, "daily": daily}
    call = parse_one(spec)
    if call.name not in choices:
        raise SpecError(
            "expected a probability, spells(on, off), by_label(low, high), daily(hours, by) or a "
            f"file FILE.csv, got {spec!r:.100}"
        )
    return build_call(call, choices, "availability")


def _spells(texts: list[str], step_s: float) -> _Builder:
    if len(texts) != 2:
        raise SpecError(f"expected spells(on, off), two lengths in seconds, got {len(texts)}")
    on, off = (_length(each) for each in texts)
    return lambda of: DrawnSpells(on, off, step_s, of.seed)


def _length(text: str) -> Distribution:
    try:
        length: float | str = float(text)
    except ValueError:
        length = text
    found = read_distribution(length)
    if not 0 < found.mean < math.inf:
        raise SpecError(f"expected spells of a finite mean above 0, got {text}")
    return found


def _by_label(low: float, high: float) -> _Builder:
    for name, value in (("low", low), ("high", high)):
        if not 0 <= value <= 1:
            raise SpecError(f"{name}: expected a probability, got {value}")
    return lambda of: RandomSteps(low + (high - low) * of.positions(), of.seed)


def _daily(hours: float, by: str, step_s: float) -> _Builder:
    if not 0 < hours < 24:
        raise SpecError(f"hours: expected more than 0 and less than 24, got {hours}")
    if by not in {"chance", "label"}:
        raise SpecError(f"by: expected chance or label, got {by!r}")
    if step_s > DAY_S / 2:
        raise SpecError(f"expected an availability_step of at most {DAY_S / 2:g}, got {step_s:g}")

    def build(of: _Clients) -> Spells:
        if by == "label":
            start = of.positions() * (1 - hours / 24)
        else:
            start = uniforms(derive_seed(of.seed, "start of the day"), np.arange(of.clients))
        return DailySpells(hours * 3600.0, start, step_s)

    return build
