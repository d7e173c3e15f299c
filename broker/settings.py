"""Settings of a broker and of its ledger; a configuration reads them without the broker itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EVERYTHING = None
"""Retention: nothing is ever deleted."""

LEAST_SEGMENT_BYTES = 4 << 20
"""Smaller ones would be begun many times a second. (One batch writes up to 2 MiB.)"""
RETAINED_SEGMENTS = 4
"""Segments that a limit is divided into: only full ones can be deleted, and one is being filled."""
LEAST_RETAIN_BYTES = RETAINED_SEGMENTS * LEAST_SEGMENT_BYTES


@dataclass(frozen=True)
class BrokerSettings:
    """How patient a broker is.

    lease_s: a node that has been silent for this long, and whose connection is gone, has
        left.
    beat_s: a node says something at least this often.
    deliveries: a task at which so many sessions of workers died is parked.
    """

    lease_s: float = 10.0
    beat_s: float = 1.0
    deliveries: int = 5


@dataclass(frozen=True)
class LedgerSettings:
    """How a broker keeps its ledger.

    durability: what a receipt promises: that the message outlives the broker's ``process``,
        or a failure of ``power`` (each batch is synced to the device before its receipts).
    retain_bytes: see `Ledger`.
    redeliver_dead_letters: deliver dead-lettered messages again.
    share_files: tell nodes where the ledger lies: those on its host read blobs there.
    """

    durability: Literal["process", "power"] = "process"
    retain_bytes: int | None = EVERYTHING
    redeliver_dead_letters: bool = False
    share_files: bool = True
