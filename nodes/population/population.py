"""The clients of a simulated run: speed, connection, dropouts and availability of each."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedmq.algorithms.seeds import derive_rng, derive_seed
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.population.availability import Availability
from fedmq.nodes.population.availability_specs import Position, make_availability
from fedmq.nodes.population.csv_files import Profiles, read_profiles
from fedmq.nodes.population.distributions import Distribution, distribution
from fedmq.nodes.population.table import SimulationTable

_LONGEST_S = 1e9
"""Longest time, in seconds: a long tail has no end, and virtual times must stay exact."""
_BLOCK = 4096
"""Clients whose numbers are drawn together."""


def examples_of(spec: float | str, seed: int) -> Callable[[int], int]:
    """Return the function from a client to its number of examples, at least 1.

    Args:
        spec: value of ``simulation.curve.examples``.
        seed: of the run.
    """
    drawn = _Blocks(distribution(spec, "simulation.curve.examples"), seed, "examples", 1.0)
    return lambda client: round(drawn.of(client))


class Population:
    """Numbers of each client, drawn from (seed, purpose, client) or (seed, purpose, client, task).

    They depend neither on the number of clients nor on the order of the calls. A client takes 4
    bytes for each key that is a distribution, from the first time on that its block is used.

    Args:
        table: ``[simulation]``.
        clients: number of clients.
        seed: of the run.
        examples: returns a client's number of training examples.
        position: returns where a client's labels are on average, from 0 (the first class) to 1
            (the last); needed where availability depends on labels.
        message_bytes: size of each task and of each result, which takes the place of the actual
            size; None for the actual one.

    Attributes:
        clients: as given.
        availability: of the clients; None if all are always available.

    Raises:
        ConfigError: a spec or a file cannot be used; the message names the key.
    """

    def __init__(
        self,
        table: SimulationTable,
        clients: int,
        seed: int,
        examples: Callable[[int], int],
        position: Position | None = None,
        message_bytes: tuple[int, int] | None = None,
    ) -> None:
        self._message_bytes = message_bytes
        self.clients, self._table, self._seed, self._examples = clients, table, seed, examples
        profile = None
        if table.devices is not None:
            profile = _Devices(read_profiles(table.devices, "simulation.devices"), seed, clients)
        self._compute = self._values("compute", profile)
        self._latency = self._values("latency", profile)
        self._down = self._values("bandwidth_down", profile)
        self._up = self._values("bandwidth_up", profile)
        self._jitter = distribution(table.jitter, "simulation.jitter")
        self.availability: Availability | None = None
        if table.availability is not None:
            self.availability = make_availability(
                table.availability, table.availability_step, clients, seed, position
            )

    def download_s(self, client: int, nbytes: int) -> float:
        """Return how long a client takes to receive a task of this many bytes, in seconds."""
        nbytes = nbytes if self._message_bytes is None else self._message_bytes[0]
        return min(self._latency(client) + nbytes / self._down(client), _LONGEST_S)

    def upload_s(self, client: int, nbytes: int) -> float:
        """Return how long a client takes to send a result of this many bytes, in seconds."""
        nbytes = nbytes if self._message_bytes is None else self._message_bytes[1]
        return min(self._latency(client) + nbytes / self._up(client), _LONGEST_S)

    def compute_s(self, client: int, task: str) -> float:
        """Return how long a client trains for a task, given the id of its message, in seconds."""
        seconds = self._compute(client)
        if self._table.compute_per == "example":
            seconds *= self._examples(client)
        if self._table.jitter != 1.0:
            seconds *= self._jitter.one(derive_rng(self._seed, "jitter", client, task))
        return min(seconds, _LONGEST_S)

    def drops(self, client: int, task: str) -> bool:
        """Return whether a task is lost."""
        dropout = self._table.faults.dropout
        if not dropout:
            return False
        return bool(derive_rng(self._seed, "dropout", client, task).random() < dropout)

    def _values(self, key: str, profile: _Devices | None) -> Callable[[int], float]:
        """Return the function from a client to its number of one key."""
        if profile is not None and profile.has(key):
            return profile.column(key)
        spec = getattr(self._table, key)
        if spec is None:
            return lambda _: math.inf  # a bandwidth without a limit
        chosen = distribution(spec, f"simulation.{key}")
        if isinstance(spec, str):
            # A bandwidth of 0 would be no connection at all.
            least = 1e-6 if key.startswith("bandwidth") else 0.0
            return _Blocks(chosen, self._seed, key, least).of
        value = float(spec)
        return lambda _: value


class _Blocks:
    """Numbers of clients, drawn in whole blocks so that they depend on the client alone."""

    def __init__(self, chosen: Distribution, seed: int, key: str, least: float) -> None:
        self._distribution, self._seed, self._key, self._least = chosen, seed, key, least
        self._blocks: dict[int, NDArray[np.float32]] = {}

    def of(self, client: int) -> float:
        block, place = divmod(client, _BLOCK)
        values = self._blocks.get(block)
        if values is None:
            drawn = self._distribution.draw(derive_rng(self._seed, self._key, block), _BLOCK)
            values = np.clip(drawn, self._least, _LONGEST_S).astype(np.float32)
            self._blocks[block] = values
        return values.item(place)


class _Devices:
    """The profile of each client: assigned by the file, or drawn by weight."""

    def __init__(self, profiles: Profiles, seed: int, clients: int) -> None:
        self._profiles, self._key = profiles, derive_seed(seed, "device")
        if profiles.weight is not None:
            self._bounds = np.cumsum(profiles.weight / profiles.weight.sum())[:-1].tolist()
        elif (missing := _missing(profiles, clients)) is not None:
            raise ConfigError(
                f"simulation.devices: expected a row for each of {clients} clients, client "
                f"{missing} has none"
            )

    def has(self, key: str) -> bool:
        return key in self._profiles.values

    def column(self, key: str) -> Callable[[int], float]:
        values: list[float] = self._profiles.values[key].tolist()
        return lambda client: values[self._row(client)]

    def _row(self, client: int) -> int:
        assigned = self._profiles.client
        if assigned is not None:
            return assigned[client]
        return bisect(self._bounds, derive_seed(self._key, "row", client) * 2.0**-63)


def _missing(profiles: Profiles, clients: int) -> int | None:
    """Return the first client without a row."""
    there = profiles.client or {}
    return next((client for client in range(clients) if client not in there), None)
