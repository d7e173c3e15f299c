"""Settings of a broker and of its ledger; a configuration imports them without the broker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Durability = Literal["process", "power"]

EVERYTHING = None
"""Retention: delete nothing."""

LEAST_SEGMENT_BYTES = 4 << 20
"""A broker would begin smaller segments many times a second: one batch writes up to 2 MiB."""
RETAINED_SEGMENTS = 4
"""Segments per retention limit: only full ones can be deleted, and one is being filled."""
LEAST_RETAIN_BYTES = RETAINED_SEGMENTS * LEAST_SEGMENT_BYTES


@dataclass(frozen=True)
class BrokerSettings:
    """Time limits of a broker, and its limit of deliveries.

    lease_s: silence, in seconds, after which a node without a connection has left.
    beat_s: longest time, in seconds, between two frames of a node.
    deliveries: number of worker sessions that may end while they handle a message; after that,
        the message is dead-lettered.
    """

    lease_s: float = 10.0
    beat_s: float = 1.0
    deliveries: int = 5


@dataclass(frozen=True)
class LedgerSettings:
    """How a broker writes and keeps its ledger.

    durability: what acknowledged messages survive: the end of the broker's ``process``, or a
        ``power`` failure (each batch is synced to the device before it is acknowledged).
    retain_bytes: see `Ledger`.
    redeliver_dead_letters: deliver dead-lettered messages again.
    share_files: let nodes on the broker's host read blobs from the ledger's files.
    """

    durability: Durability = "process"
    retain_bytes: int | None = EVERYTHING
    redeliver_dead_letters: bool = False
    share_files: bool = True
