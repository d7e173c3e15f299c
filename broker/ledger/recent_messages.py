"""Accepted messages at hand, found by their numbers, whether they came alone or with others."""

from __future__ import annotations

import bisect
from collections import OrderedDict, deque

from fedmq.broker.ledger.entries import Accepted, AcceptedAll


class RecentMessages:
    """The newest accepted messages.

    Attributes:
        nbytes: of all messages here.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._entries: OrderedDict[int, Accepted | AcceptedAll] = OrderedDict()
        """By their first number."""
        self._many: deque[int] = deque()
        """Of these, the first numbers of those of many, in order."""

    def add(self, entry: Accepted | AcceptedAll) -> None:
        """Put the newest here."""
        self._entries[entry.seq] = entry
        if isinstance(entry, Accepted):
            self.nbytes += len(entry.message)
        else:
            self.nbytes += entry.nbytes
            self._many.append(entry.seq)

    def find(self, seq: int) -> Accepted | None:
        """Return the message of a number, if it is here."""
        entry = self._entries.get(seq)
        if entry is None and self._many:
            index = bisect.bisect_right(self._many, seq) - 1
            entry = self._entries[self._many[index]] if index >= 0 else None
        return entry.find(seq) if entry is not None else None

    def drop_oldest(self) -> None:
        """Take the oldest away, with all that came with it."""
        _, entry = self._entries.popitem(last=False)
        if isinstance(entry, Accepted):
            self.nbytes -= len(entry.message)
        else:
            self.nbytes -= entry.nbytes
            self._many.popleft()

    def clear(self) -> None:
        """Take all away."""
        self._entries.clear()
        self._many.clear()
        self.nbytes = 0
