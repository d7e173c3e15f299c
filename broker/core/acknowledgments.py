"""Receipts: cumulative, and a little late, because nobody waits for them."""

from __future__ import annotations

import math

from fedmq.broker.core.state import Node, Send
from fedmq.broker.wire.schema import Receipt

RECEIPT_WITHIN_S = 0.1
"""One receipt tells of all the frames of this long,"""
RECEIPT_MESSAGES = 128
"""or of this many messages from one node, which may be waiting to say more."""


class Receipts:
    """Which nodes are owed a receipt, and by when.

    Attributes:
        due: when the oldest receipt owed is to go out; infinite if none is.
    """

    def __init__(self) -> None:
        self.due = math.inf
        self._owed: dict[int, Node] = {}
        self._said: dict[int, int] = {}

    def owe(self, node: Node, now: float, messages: int = 1) -> None:
        """Note that a frame of this node, of so many messages, has taken effect, or had before."""
        key = id(node)
        self._owed[key] = node
        said = self._said[key] = self._said.get(key, 0) + messages
        self.due = min(self.due, now + (RECEIPT_WITHIN_S if said < RECEIPT_MESSAGES else 0.0))

    def take(self) -> list[Send]:
        """Return all receipts that are owed."""
        sends = []
        for node in self._owed.values():
            settled = node.held[0].frame.n if node.held else node.next_n
            if settled:
                sends.append(Send(node.peer, Receipt(upto=settled - 1)))
        self._owed.clear()
        self._said.clear()
        self.due = math.inf
        return sends
