"""Settings of a broker and of its ledger; a configuration imports them without the broker."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

Durability = Literal["process", "power"]

Retained = int | Literal["headers"] | None
"""Payload that a ledger keeps: see `Ledger`."""
EVERYTHING: Retained = None
"""Retention: delete nothing."""
HEADERS: Retained = "headers"
"""Retention: as 0, and no payload of a run that has ended."""

LEAST_SEGMENT_BYTES = 4 << 20
"""A broker would begin smaller segments many times a second: one batch writes up to 2 MiB."""
RETAINED_SEGMENTS = 4
"""Segments per retention limit: only full ones can be deleted, and one is being filled."""
LEAST_RETAIN_BYTES = RETAINED_SEGMENTS * LEAST_SEGMENT_BYTES


class InvalidLimit(ValueError):
    """A limit is not above zero, or not finite. ``name``: of its setting."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__(f"expected a finite number above 0, got {value!r:.200}")
        self.name = name


@dataclass(frozen=True)
class Limits:
    """What peers can make a broker use, at most. Each limit has a typed rejection.

    runs: runs that have not ended.
    nodes: names of nodes in a run.
    clients: clients in the Hello of one node.
    sessions: live sessions with one key, or without one from one other host: an IPv4 address, or a
        /64 of IPv6.
    waiting: connections that wait for a run that has not started.
    joins_per_s: sessions that one node may begin, on average; the nodes of one key, or of one other
        host, may begin twenty times as many.
    messages_per_s, bytes_per_s: that one connection may send; more waits.
    costly_per_s: Hellos, unreadable frames and rejected posts of one connection; more waits.
    held_bytes, held_bytes_total: of posts whose blobs have not arrived, by node and in all.
    queued_bytes, queued_bytes_total: queued for one connection that does not read, and for all.
    node_disk, run_disk: bytes in the ledger, by node and by run.
    log_lines_per_s: of one kind.
    handshake_s: within which a new connection must say what it is.
    reserved_files: file descriptors kept for the ledger and for admitted nodes.

    Raises:
        InvalidLimit: a limit is not above zero.
    """

    runs: int = 100
    nodes: int = 10_000
    clients: int = 1 << 16
    sessions: int = 2_000
    waiting: int = 4_000
    joins_per_s: float = 1.0
    messages_per_s: float = 50_000.0
    bytes_per_s: float = 4e9
    costly_per_s: float = 100.0
    held_bytes: int = 16 << 20
    held_bytes_total: int = 256 << 20
    queued_bytes: int = 32 << 20
    queued_bytes_total: int = 256 << 20
    node_disk: int = 256 << 30
    run_disk: int = 2 << 40
    log_lines_per_s: float = 20.0
    handshake_s: float = 3.0
    reserved_files: int = 64

    def __post_init__(self) -> None:
        """Check all limits.

        Raises:
            InvalidLimit: the first that is not above zero, or not finite.
        """
        for each in fields(self):
            if not 0 < getattr(self, each.name) < math.inf:
                raise InvalidLimit(each.name, getattr(self, each.name))


@dataclass(frozen=True)
class BrokerSettings:
    """Time limits of a broker, and its limit of deliveries.

    lease_s: silence, in seconds, after which a node without a connection has left.
    beat_s: longest time, in seconds, between two frames of a node.
    deliveries: number of worker sessions that may end while they handle a message; after that,
        the message is dead-lettered.
    limits: what peers can make it use.
    release_names: whether the name of a node that has left, and the place of an aggregator that
        has, may go to another owner: its key is lost, or an older release did not store it.
    only_run: id of the one run that it serves; "" serves any.
    once: whether it serves only the runs in its ledger, or else the first one that is opened.
    """

    lease_s: float = 10.0
    beat_s: float = 1.0
    deliveries: int = 5
    limits: Limits = Limits()
    release_names: bool = False
    only_run: str = ""
    once: bool = False


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
    retain_bytes: Retained = EVERYTHING
    redeliver_dead_letters: bool = False
    share_files: bool = True


@dataclass(frozen=True)
class Continuation:
    """A run that continues, with new sessions of all nodes, when the broker starts.

    run: its id.
    config: its new configuration.
    further: whether a run that has ended is reopened.
    """

    run: str
    config: str
    further: bool = False
