"""The results of an aggregator's next version."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedmq.algorithms.base import AnyAlgorithm, OpaqueAccumulator, OpaqueState, Result, examples_of
from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.rng import derive_rng
from fedmq.algorithms.toolkit.returned import check_tensors
from fedmq.algorithms.values import ReturnedError, kind_of_value, plain_number
from fedmq.broker.errors import WireError
from fedmq.broker.link.events import Delivery
from fedmq.broker.rejections import Rejection
from fedmq.codecs.errors import CodecError
from fedmq.nodes.errors import rejection_of
from fedmq.nodes.messages.actions import fail_on_partial_reread
from fedmq.nodes.messages.payloads import unpack

_ROOM = 16
"""Memory that codecs need to decode a result, as a multiple of its size."""
_LEAST_BYTES = 1 << 20


def room_for(algorithm: AnyAlgorithm, state: OpaqueState) -> int:
    """Return the memory limit for decoding a result, in bytes.

    Raises:
        ReturnedError: the algorithm does not say how large one is, or has no tensors by name.
    """
    check_tensors(algorithm.tensors(state), "the model", f"{type(algorithm).__name__}.tensors")
    found = algorithm.result_bytes(state)
    number = plain_number(found)
    if number is None or not 0 <= number < math.inf:
        who = f"{type(algorithm).__name__}.result_bytes"
        raise ReturnedError(f"{who}: expected a number of bytes, got {kind_of_value(found)}")
    return max(_LEAST_BYTES, int(_ROOM * number))


@dataclass
class VersionBuffer:
    """The results of one version, and the tasks sent for them.

    accumulator: the algorithm's accumulator of results.
    order: ids of the tasks sent, in cohort order.
    settled: number of tasks, from the first on, whose results are all accumulated or rejected.
    held: results that wait for earlier ones of the cohort: (message, weight, client).
    contributed: in a synchronous round, clients whose results were received; each counts once.
    num_results, late: number of accumulated results, and of those from earlier versions.
    weights, staleness: sum of the results' weights, and the staleness of each, in versions.
    started, draws: number of tasks sent, and of random draws of clients.
    deadline_passed: whether the version no longer waits for outstanding tasks.
    """

    accumulator: OpaqueAccumulator
    order: list[str] = field(default_factory=list)
    settled: int = 0
    held: dict[str, tuple[Delivery, float, int]] = field(default_factory=dict)
    contributed: set[int] = field(default_factory=set)
    num_results: int = 0
    late: int = 0
    weights: float = 0.0
    started: int = 0
    draws: int = 0
    deadline_passed: bool = False
    staleness: list[int] = field(default_factory=list)

    def facts(self) -> dict[str, int | float]:
        """Return the fields about results in the version's record."""
        return {
            "results": self.num_results,
            "late": self.late,
            "weights": self.weights,
            "mean_staleness": sum(self.staleness) / len(self.staleness) if self.staleness else 0.0,
            "max_staleness": max(self.staleness, default=0),
        }

    def draw(self, idle: npt.NDArray[np.int64], count: int, seed: int, version: int) -> list[int]:
        """Draw ``count`` of the idle clients, or all if there are fewer; return them in order."""
        if len(idle) <= count:
            return [int(client) for client in idle]
        rng = derive_rng(seed, "cohort", version, self.draws)
        self.draws += 1
        return sorted(int(client) for client in rng.choice(idle, count, replace=False))

    def add(
        self,
        algorithm: AnyAlgorithm,
        state: OpaqueState,
        delivery: Delivery,
        weight: float,
        about: tuple[int, int],
        max_bytes: int,
    ) -> Rejection | None:
        """Add one result; return why it cannot be used, if so.

        Args:
            algorithm: whose accumulator it is.
            state: of the current version.
            delivery: the result's message.
            weight: how much it counts.
            about: client and staleness.
            max_bytes: that it may take in memory while it is decoded.
        """
        try:
            stream = fail_on_partial_reread(delivery.chunks)
            payload = unpack(delivery.message, delivery.read, stream, max_bytes)
            result = Result(*about, payload, examples_of(payload.numbers))
            self.accumulator = algorithm.accumulate(self.accumulator, state, result, weight)
        except (ResultError, CodecError, WireError) as error:
            return rejection_of(error)
        self.num_results += 1
        self.weights += weight
        self.staleness.append(about[1])
        self.late += about[1] > 0
        return None


@dataclass
class DeferredResults:
    """Results that arrive during the commit of a version in the background.

    received: results by number.
    awaited: numbers of results of an earlier session that will be delivered again.
    unsettled: numbers of results from before the last checkpoint that it does not include.
    """

    received: dict[int, Delivery] = field(default_factory=dict)
    awaited: set[int] = field(default_factory=set)
    unsettled: tuple[int, ...] = ()

    def add(self, delivery: Delivery) -> None:
        """Defer a result."""
        self.received[delivery.seq] = delivery
        self.awaited.discard(delivery.seq)

    def numbers(self) -> tuple[int, ...]:
        """Return the numbers of all deferred results, received or awaited."""
        return tuple(sorted({*self.received, *self.awaited}))
