"""Receipts: cumulative, and a little late, because nobody waits for them."""

from __future__ import annotations

import math

from fedmq.broker.core.state import Node, SendTo
from fedmq.broker.wire.schema import Ack

ACK_WITHIN_S = 0.1
"""One receipt tells of all the frames of this long,"""
ACK_MESSAGES = 128
"""or of this many messages from one node, which may be waiting to say more."""


class PendingAcks:
    """Which nodes are owed a receipt, and by when.

    Attributes:
        due: when the oldest receipt owed is to go out; infinite if none is.
    """

    def __init__(self) -> None:
        self.due = math.inf
        self._pending: dict[int, Node] = {}
        self._sent: dict[int, int] = {}

    def add(self, node: Node, now: float) -> None:
        """Note that a frame of this node has taken effect, or had before."""
        key = id(node)
        self._pending[key] = node
        said = self._sent[key] = self._sent.get(key, 0) + 1
        self.due = min(self.due, now + (ACK_WITHIN_S if said < ACK_MESSAGES else 0.0))

    def take(self) -> list[SendTo]:
        """Return all receipts that are owed."""
        sends = []
        for node in self._pending.values():
            settled = node.pending_posts[0].frame.n if node.pending_posts else node.next_n
            if settled:
                sends.append(SendTo(node.peer, Ack(upto=settled - 1)))
        self._pending.clear()
        self._sent.clear()
        self.due = math.inf
        return sends
