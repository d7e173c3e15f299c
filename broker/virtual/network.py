"""A network in memory with a virtual clock and seeded faults, for the real cores.

Everything follows from one seed, so a history that failed can be run again. `VirtualNetwork`
carries frames between a broker (`fedmq.broker.virtual.broker`) and any number of nodes (`node`); it
loses, delays, duplicates and reorders them, and cuts connections.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedmq.broker.access.rights import Origin
from fedmq.broker.wire.encoding import decode_frame, encode_frame
from fedmq.broker.wire.schema import AnyFrame, Buffer, Frame


class BrokerEnd(Protocol):
    """The broker's end of the network."""

    def receive(
        self, peer: bytes, frame: AnyFrame, buffers: Sequence[Buffer], origin: Origin
    ) -> None:
        """Handle a frame from a connection."""


class NodeEnd(Protocol):
    """A node's end of the network."""

    name: str
    peer: bytes
    origin: Origin

    def arrive(self, frame: AnyFrame, buffers: Sequence[Buffer]) -> None:
        """Handle a frame from the broker."""


@dataclass(frozen=True)
class Faults:
    """The faults of a network.

    loss, duplicate: probability for a frame. reorder: probability that a frame is delayed by up
        to ``reorder_s`` seconds, while others overtake it. delay_s: mean delay, in seconds.
    """

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    reorder_s: float = 0.5
    delay_s: float = 0.005


NO_FAULTS = Faults(delay_s=0.0)
LEDGER = "/ledger"
"""Name of the ledger's folder in the virtual world: counts of bytes do not depend on its path."""
START_S = 1000.0
"""Time at which a network starts, in virtual seconds."""


class VirtualNetwork:
    """The clock, and the connections between nodes and their broker.

    Args:
        rng: draws all faults and delays.
        faults: can be replaced at any time.

    Attributes:
        now: virtual time, in seconds.
        broker: the broker's end; a `VirtualBroker` sets it.
        ledger: path of the folder that is called `LEDGER`.
        made: number of faults made so far, by kind; `VirtualDisk.made` has those of the disk.
    """

    def __init__(self, rng: random.Random, faults: Faults | None = None) -> None:
        self.rng = rng
        self.faults = faults or Faults()
        self.now = START_S
        self.broker: BrokerEnd | None = None
        self.ledger = ""
        self.made: Counter[str] = Counter()
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._count = itertools.count()
        self._ends: dict[bytes, NodeEnd] = {}
        """Nodes by their present connection, until the node connects again."""
        self._hung_up: set[bytes] = set()
        """Connections among them that the node has closed."""
        self._last_at: dict[tuple[bytes, bool], float] = {}
        self._away: set[str] = set()

    def at(self, when: float, act: Callable[[], object]) -> None:
        """Schedule a call at a time."""
        now = self.now
        heapq.heappush(self._events, (when if when > now else now, next(self._count), act))

    def after(self, seconds: float, act: Callable[[], object]) -> None:
        """Schedule a call after a delay."""
        self.at(self.now + seconds, act)

    def step(self) -> bool:
        """Make the next scheduled call; return False if there is none."""
        if not self._events:
            return False
        self.now, _, act = heapq.heappop(self._events)
        act()
        return True

    def connect(self, host: NodeEnd) -> bytes:
        """Give a node a new connection; the old one is lost with its frames in flight."""
        for peer in [peer for peer, each in self._ends.items() if each.name == host.name]:
            del self._ends[peer]
            self._hung_up.discard(peer)
        peer = f"{host.name}#{next(self._count)}".encode()
        self._ends[peer] = host
        return peer

    def cut(self, host: NodeEnd) -> None:
        """Break a node's connection, and give it another one at once."""
        if host.peer in self._ends and host.peer not in self._hung_up:
            host.peer = self.connect(host)
            self.made["connection cut"] += 1

    def disconnect(self, peer: bytes) -> None:
        """Break a connection, as the broker does."""
        if peer in self._ends:
            self.cut(self._ends[peer])

    def hang_up(self, host: NodeEnd) -> None:
        """Close a node's connection; what it has sent still arrives."""
        if host.peer in self._ends:
            self._hung_up.add(host.peer)

    def partition(self, name: str, seconds: float) -> None:
        """Lose all frames between a node and the broker for a number of seconds."""
        self._away.add(name)
        self.made["partition"] += 1
        self.after(seconds, lambda: self._away.discard(name))

    def is_up(self, peer: bytes) -> bool:
        """Return whether a connection is up."""
        return self._carries(peer) and peer not in self._hung_up

    def _carries(self, peer: bytes) -> bool:
        """Return whether what was sent over a connection still arrives."""
        host = self._ends.get(peer)
        return host is not None and host.name not in self._away

    def to_broker(self, peer: bytes, frame: Frame, buffers: Sequence[Buffer]) -> None:
        """Carry a frame from a node."""
        header, parts = encode_frame(frame), [bytes(each) for each in buffers]
        self._carry(peer, lambda: self._arrive_at_broker(peer, header, parts), up=True)

    def to_node(self, peer: bytes, header: bytes, buffers: Sequence[Buffer]) -> None:
        """Carry an encoded frame to the node of a connection."""
        parts = [bytes(each) for each in buffers]
        self._carry(peer, lambda: self._arrive_at_node(peer, header, parts), up=False)

    def _carry(self, peer: bytes, act: Callable[[], None], *, up: bool) -> None:
        if not self.is_up(peer):
            return
        if self.faults is NO_FAULTS:
            self.at(self.now, act)
            return
        faults, draw, way = self.faults, self.rng.random, (peer, up)
        copies = 1
        if draw() < faults.duplicate:
            copies = 2
            self.made["frame duplicated"] += 1
        for _ in range(copies):
            if draw() < faults.loss:
                self.made["frame lost"] += 1
                continue
            when = self.now - math.log(1.0 - draw()) * faults.delay_s  # exponential
            if draw() < faults.reorder:
                when += draw() * faults.reorder_s
                self.made["frame delayed past others"] += 1
            else:
                # A connection keeps order, except for the reorder fault.
                before = self._last_at.get(way, 0.0)
                if when < before:
                    when = before
                self._last_at[way] = when
            self.at(when, act)

    def _arrive_at_broker(self, peer: bytes, header: bytes, parts: list[bytes]) -> None:
        if self.broker is not None and self._carries(peer):
            self.broker.receive(peer, decode_frame(header), parts, self._ends[peer].origin)

    def _arrive_at_node(self, peer: bytes, header: bytes, parts: list[bytes]) -> None:
        if self.is_up(peer):
            self._ends[peer].arrive(decode_frame(header), parts)
