"""How often each kind of fault happens in a simulated run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedmq.broker.virtual.disk import DiskFault
from fedmq.broker.virtual.network import Faults
from fedmq.nodes.population.table import FaultsTable


@dataclass
class Chances:
    """Fault rates of a simulated run, per second of virtual time, and durations in seconds.

    faults: faults of single frames.
    crash: rate of crashes of each process.
    broker_crash, worker_crash: rates of further crashes of the broker, and of each worker.
    doom: rate of crashes at the worst moment: of the broker in the middle of a commit, or while it
        sends the frames of a turn; of a node right after a post, or after any frame.
    power: rate of power failures of the broker's machine; if positive, its durability is `power`,
        and half of its crashes at the worst moment are power failures.
    disk: rates of faults of the broker's disk, for each operation.
    full: rate at which the broker's disk gets full.
    pause: rate at which each process is suspended; then it continues, or is killed.
    cut, partition: rates of broken and partitioned connections, for each connection.
    away_s, pause_s, full_s, partition_s: longest absence of a crashed process, pause, time
        without space on the disk, and partition.
    jump, jump_s: rate at which each wall clock is set, and by how much at most, either way.
    drift: largest relative error of the rate of a machine's clocks.
    train_s: mean duration of a task or a commit.
    batch_s: longest time that the broker's frames wait for others, to be handled in one turn.
    chat: rate of bursts of small messages from each worker and the evaluator that nobody asked for,
        which the broker rejects.
    availability: rate at which each worker reports that one of its clients is away, or is back.
    share_files: whether nodes read blobs from the ledger's files, as on one host.
    """

    faults: Faults = field(default_factory=Faults)
    crash: float = 0.0
    broker_crash: float = 0.0
    worker_crash: float = 0.0
    doom: float = 0.0
    power: float = 0.0
    disk: Mapping[DiskFault, float] = field(default_factory=dict)
    full: float = 0.0
    pause: float = 0.0
    cut: float = 0.0
    partition: float = 0.0
    away_s: float = 5.0
    pause_s: float = 5.0
    full_s: float = 5.0
    partition_s: float = 8.0
    jump: float = 0.0
    jump_s: float = 3600.0
    drift: float = 0.0
    train_s: float = 0.5
    batch_s: float = 0.0
    chat: float = 0.0
    availability: float = 0.0
    share_files: bool = False

    @property
    def hurts_disk(self) -> bool:
        """Return whether a fault needs a virtual disk."""
        return bool(self.disk) or max(self.power, self.full, self.doom) > 0

    @property
    def total(self) -> float:
        """Sum of the rates of all faults that are drawn, per second and process."""
        killed = self.crash + self.broker_crash + self.worker_crash + self.doom + self.power
        other = self.full + self.pause + self.cut + self.partition + self.jump
        return killed + other + self.chat + self.availability

    @property
    def any_faults(self) -> bool:
        """Return whether faults are drawn, other than those of frames and disk operations."""
        return self.total > 0


def chances_of(faults: FaultsTable) -> Chances:
    """Return the fault rates of a configuration; dropouts are those of its `Population`."""
    return Chances(
        broker_crash=faults.broker_crash / 3600,
        worker_crash=faults.node_crash / 3600,
        cut=faults.disconnect / 3600,
        pause=faults.pause / 3600,
        away_s=faults.away_s,
        pause_s=faults.pause_s,
    )
