"""Cumulative acknowledgments, sent a little late because no node waits for them."""

from __future__ import annotations

import math

from fedmq.broker.core.events import SendTo
from fedmq.broker.core.state import Node
from fedmq.broker.wire.schema import Ack

ACK_WITHIN_S = 0.1
"""Longest time until a frame is acknowledged, in seconds."""
ACK_FRAMES = 128
"""Frames of one node after which they are acknowledged at once: its link waits for acknowledgments
of `WINDOW_FRAMES`."""
_ACK_BYTES = 8192
"""Bytes with a frame that count as another frame: its link waits for those of `WINDOW_BYTES`."""


class PendingAcks:
    """Nodes with frames that were applied but not acknowledged yet.

    Attributes:
        due: when the oldest of them must be acknowledged; infinite if there are none.
    """

    def __init__(self) -> None:
        self.due = math.inf
        self._pending: dict[int, Node] = {}
        self._counts: dict[int, int] = {}

    def add(self, node: Node, now: float, nbytes: int = 0) -> None:
        """Schedule an acknowledgment for a frame that has just been applied, or had been before.

        nbytes: size of what came with the frame.
        """
        key = id(node)
        self._pending[key] = node
        count = self._counts[key] = self._counts.get(key, 0) + 1 + nbytes // _ACK_BYTES
        self.due = min(self.due, now + (ACK_WITHIN_S if count < ACK_FRAMES else 0.0))

    def take(self) -> list[SendTo]:
        """Return all acknowledgments that are pending, and clear them."""
        sends = []
        for node in self._pending.values():
            first = node.pending_frames[0].n if node.pending_frames else node.next_n
            if first:
                sends.append(SendTo(node.peer, Ack(upto=first - 1)))
        self._pending.clear()
        self._counts.clear()
        self.due = math.inf
        return sends

    def validate_state(self) -> None:
        """Raise AssertionError if acknowledgments are pending without a time, or the reverse."""
        waiting = self.due < math.inf
        if waiting != bool(self._pending) or self._pending.keys() != self._counts.keys():
            names = [node.name for node in self._pending.values()]
            raise AssertionError(f"acknowledgments of {names} are due at {self.due}")
