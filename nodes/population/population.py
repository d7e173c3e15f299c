"""The clients of a simulated run: speed, connection, dropouts and availability of each."""

from __future__ import annotations

from collections.abc import Callable

from fedmq.algorithms.seeds import derive_rng
from fedmq.nodes.population.availability import Availability
from fedmq.nodes.population.distributions import distribution
from fedmq.nodes.population.table import SimulationTable

_LONGEST_S = 1e9
"""Longest time, in seconds: a long tail has no end, and virtual times must stay exact."""


class Population:
    """Numbers of each client, drawn from (seed, purpose, client) or (.., client, task).

    They depend neither on the number of clients nor on the order of the calls.

    Args:
        table: ``[simulation]``.
        clients: number of clients.
        seed: of the run.
        examples: returns a client's number of training examples.

    Attributes:
        availability: of the clients; None if all are always available.

    Raises:
        ConfigError: a spec or a file cannot be used; the message names the key.
    """

    def __init__(
        self, table: SimulationTable, clients: int, seed: int, examples: Callable[[int], int]
    ) -> None:
        self._table, self._seed, self._examples = table, seed, examples
        self._jitter = distribution(table.jitter, "simulation.jitter")
        self.clients = clients
        self.availability: Availability | None = None

    def download_s(self, client: int, nbytes: int) -> float:
        """Return how long a client takes to receive this many bytes, in seconds."""
        return self._transfer_s(client, nbytes, "bandwidth_down")

    def upload_s(self, client: int, nbytes: int) -> float:
        """Return how long a client takes to send this many bytes, in seconds."""
        return self._transfer_s(client, nbytes, "bandwidth_up")

    def compute_s(self, client: int, task: str) -> float:
        """Return how long a client trains for a task, given the id of its message, in seconds."""
        seconds = self._value("compute", client)
        if self._table.compute_per == "example":
            seconds *= self._examples(client)
        if self._table.jitter != 1.0:
            rng = derive_rng(self._seed, "jitter", client, task)
            seconds *= self._jitter.one(rng)
        return min(seconds, _LONGEST_S)

    def drops(self, client: int, task: str) -> bool:
        """Return whether a task is lost."""
        dropout = self._table.faults.dropout
        if not dropout:
            return False
        return bool(derive_rng(self._seed, "dropout", client, task).random() < dropout)

    def _transfer_s(self, client: int, nbytes: int, key: str) -> float:
        seconds = self._value("latency", client)
        if getattr(self._table, key) is not None:
            seconds += nbytes / self._value(key, client)
        return min(seconds, _LONGEST_S)

    def _value(self, key: str, client: int) -> float:
        spec = getattr(self._table, key)
        return distribution(spec, f"simulation.{key}").one(derive_rng(self._seed, key, client))
