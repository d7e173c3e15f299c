"""``[simulation]``: devices, availability and faults of the clients of ``fedmq simulate``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Spec = Annotated[float, Field(ge=0)] | str
"""A number, or the spec of a distribution."""


class _SimulationTable(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class FaultsTable(_SimulationTable):
    """``[simulation.faults]``: probabilities, and rates per hour of virtual time.

    dropout: probability that a task is lost: its client never sends a result.
    node_crash, broker_crash: crashes of each population node, and of the broker, per hour.
    power: power failures of the broker's machine per hour; messages then survive as
        ``broker.durability = "power"`` promises.
    disconnect: broken connections of each node per hour.
    pause: suspensions of each process per hour.
    away_s: longest absence of a crashed process, in seconds.
    pause_s: longest suspension, in seconds.
    """

    dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    node_crash: Annotated[float, Field(ge=0)] = 0.0
    broker_crash: Annotated[float, Field(ge=0)] = 0.0
    power: Annotated[float, Field(ge=0)] = 0.0
    disconnect: Annotated[float, Field(ge=0)] = 0.0
    pause: Annotated[float, Field(ge=0)] = 0.0
    away_s: Annotated[float, Field(gt=0)] = 60.0
    pause_s: Annotated[float, Field(gt=0)] = 60.0


class CurveTable(_SimulationTable):
    """``[simulation.curve]``: the stand-in that ``learner = "curve"`` trains.

    heterogeneity: how far a client's optimum is from the common one, relative to the first
        model's distance; 0 for clients with the same optimum.
    noise: standard deviation of the gradient of one example, relative to the first gradient.
    """

    heterogeneity: Annotated[float, Field(ge=0)] = 0.5
    noise: Annotated[float, Field(ge=0)] = 1.0


class SimulationTable(_SimulationTable):
    """``[simulation]``: times in seconds of virtual time; specs as in `distribution`.

    compute: time that a client trains for a task, drawn once per client.
    compute_per: unit of ``compute``: a whole ``task``, or an ``example`` of the client.
    jitter: factor of the training time, drawn per task.
    latency: time that a message takes besides its transfer, each way, drawn once per client.
    bandwidth_down, bandwidth_up: bytes a second of a client's downlink and uplink, drawn once per
        client; None for unlimited.
    devices: CSV file of device profiles, which replace these keys; None for none.
    availability: which clients are available when, see `Availability`; None for always.
    availability_step: time between changes of availability.
    learner: ``train``, or ``curve`` for a stand-in that needs no training.
    nodes: number of nodes that host the clients; None for the default.
    faults, curve: see there.
    """

    compute: Spec = 1.0
    compute_per: Literal["task", "example"] = "task"
    jitter: Spec = 1.0
    latency: Spec = 0.0
    bandwidth_down: Spec | None = None
    bandwidth_up: Spec | None = None
    devices: str | None = None
    availability: Annotated[float, Field(gt=0, le=1)] | str | None = None
    availability_step: Annotated[float, Field(gt=0)] = 600.0
    learner: Literal["train", "curve"] = "train"
    nodes: Annotated[int, Field(ge=1, le=1024)] | None = None
    faults: FaultsTable = FaultsTable()
    curve: CurveTable = CurveTable()
