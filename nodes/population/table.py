"""``[simulation]``: devices, availability and faults of the clients of ``fedmq simulate``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from fedmq.nodes.population.availability_specs import check_availability
from fedmq.nodes.population.distributions import read_distribution

STARTS_AT = 946_684_800.0
"""Start of every simulated run: 2000-01-01, UTC, in seconds since 1970."""


def _check_spec(spec: float | str) -> float | str:
    read_distribution(spec)
    return spec


Spec = Annotated[float | str, AfterValidator(_check_spec)]
"""A number from 0, or the spec of a distribution."""


def _check_bandwidth(spec: float | str) -> float | str:
    if read_distribution(spec).draws_0:
        raise ValueError(f"expected a bandwidth above 0, got {spec}")
    return spec


Bandwidth = Annotated[Spec, AfterValidator(_check_bandwidth)]


class _SimulationTable(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


Rate = Annotated[float, Field(ge=0, le=3600)]
"""Events per hour of virtual time; faults are drawn at most once a second."""


class FaultsTable(_SimulationTable):
    """``[simulation.faults]``: probabilities, and rates per hour of virtual time.

    dropout: probability that a task is lost: its client never sends a result.
    node_crash, broker_crash: crashes of each population node, and of the broker, per hour.
    disconnect: broken connections of each node per hour.
    pause: suspensions of each process per hour.
    away_s: longest absence of a crashed process, in seconds.
    pause_s: longest suspension, in seconds.
    """

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    node_crash: Rate = 0.0
    broker_crash: Rate = 0.0
    disconnect: Rate = 0.0
    pause: Rate = 0.0
    away_s: Annotated[float, Field(gt=0)] = 60.0
    pause_s: Annotated[float, Field(gt=0)] = 60.0


class CurveTable(_SimulationTable):
    """``[simulation.curve]``: the stand-in that ``learner = "curve"`` trains.

    examples: number of training examples of a client, drawn once per client and rounded.
    heterogeneity: how far a client's optimum is from the common one, relative to the first
        model's distance; 0 for clients with the same optimum.
    noise: of the gradient of one example; its unit is in `fedmq.algorithms.problems.quadratic`.
    curvature: of the steepest direction: SGD of n steps covers about n * lr * curvature of the
        distance to the optimum along it.
    """

    examples: Spec = 100.0
    heterogeneity: Annotated[float, Field(ge=0)] = 0.5
    noise: Annotated[float, Field(ge=0)] = 1.0
    curvature: Annotated[float, Field(gt=0)] = 0.1


class SimulationTable(_SimulationTable):
    """``[simulation]``: times in seconds of virtual time; specs as in `distribution`.

    compute: time that a client trains for a task, drawn once per client.
    compute_per: unit of ``compute``: a whole ``task``, or an ``example`` of the client.
    jitter: factor of the training time, drawn per task.
    latency: time that a message takes besides its transfer, each way, drawn once per client.
    bandwidth_down, bandwidth_up: bytes a second of a client's downlink and uplink, drawn once per
        client; None for unlimited.
    devices: CSV file of device profiles, which replace these keys; None for none.
    availability_step: time between changes of availability, at least 1 s: each step takes real
        time for each client.
    availability: which clients are available when; None for all, always. A probability, drawn
        again at each step; ``spells(on, off)`` with distributions of their lengths;
        ``by_label(low, high)``, a probability that depends on the client's data; ``daily(hours,
        by)``; or a CSV file of intervals.
    learner: ``train``, or ``curve`` for a stand-in that needs no training.
    nodes: number of nodes that host the clients; None for the default.
    faults, curve: see there.
    """

    compute: Spec = 1.0
    compute_per: Literal["task", "example"] = "task"
    jitter: Spec = 1.0
    latency: Spec = 0.0
    bandwidth_down: Bandwidth | None = None
    bandwidth_up: Bandwidth | None = None
    devices: str | None = None
    availability_step: Annotated[float, Field(ge=1)] = 600.0
    availability: Annotated[float, Field(gt=0, le=1)] | str | None = None
    learner: Literal["train", "curve"] = "train"
    nodes: Annotated[int, Field(ge=1, le=1024)] | None = None
    faults: FaultsTable = FaultsTable()
    curve: CurveTable = CurveTable()

    @field_validator("availability")
    @classmethod
    def _check_availability(
        cls, spec: float | str | None, info: ValidationInfo
    ) -> float | str | None:
        if spec is not None and "availability_step" in info.data:
            check_availability(spec, info.data["availability_step"])
        return spec


def stand_in_of(table: SimulationTable | None) -> CurveTable | None:
    """Return what clients train in place of the problem; None if they train the problem."""
    return table.curve if table is not None and table.learner == "curve" else None
