"""The life of a message and of a session: the states, and the tables of what may happen in each.

Recovery and audit of a ledger move messages along the first table; core and recovery move sessions
along the second. docs/architecture.md shows both.
"""

from __future__ import annotations

import enum
from collections import Counter


class MessageState(enum.IntEnum):
    """The state of an entry's message; a ledger's entries determine it."""

    NONE = 0
    """The entry is not a message."""
    ACCEPTED = 1
    """In the ledger; it waits for its recipient, or was delivered to it."""
    REJECTED = 2
    """Rejected by its recipient, but not consumed yet."""
    DEAD_LETTERED = 3
    """Kept with its bytes, but not delivered."""
    CONSUMED = 4
    """Its recipient has handled it."""
    SETTLED = 5
    """Rejected by its recipient, then consumed."""
    REDELIVERED = 6
    """A dead letter that was accepted again, under a new number."""
    DROPPED = 7
    """Unfinished when its run ended."""
    RECORDED = 8
    """Kept for readers of the ledger; delivered to nobody."""


class MessageEvent(enum.IntEnum):
    """What an entry does to a message."""

    ACCEPT = 1
    """The broker accepts a post, or sends a message of its own."""
    RECORD = 2
    """The same, for a message to the address `record`."""
    CONSUME = 3
    """Its recipient has handled it; or a checkpoint, or the same message again, replaces it."""
    REJECT = 4
    """Its recipient cannot use it; its sender is notified."""
    DEAD_LETTER = 5
    """Too many sessions ended while they handled it, or its blobs were lost."""
    END_RUN = 6
    """Its run ends."""
    REOPEN_RUN = 7
    """Its run is extended; for the run's last checkpoint only."""


MESSAGE = {
    MessageState.NONE: {
        MessageEvent.ACCEPT: MessageState.ACCEPTED,
        MessageEvent.RECORD: MessageState.RECORDED,
    },
    MessageState.ACCEPTED: {
        MessageEvent.CONSUME: MessageState.CONSUMED,
        MessageEvent.REJECT: MessageState.REJECTED,
        MessageEvent.DEAD_LETTER: MessageState.DEAD_LETTERED,
        MessageEvent.END_RUN: MessageState.DROPPED,
    },
    MessageState.REJECTED: {
        MessageEvent.CONSUME: MessageState.SETTLED,
        MessageEvent.END_RUN: MessageState.DROPPED,
    },
    MessageState.DEAD_LETTERED: {
        MessageEvent.CONSUME: MessageState.REDELIVERED,
        MessageEvent.END_RUN: MessageState.DROPPED,
    },
    MessageState.DROPPED: {
        MessageEvent.REOPEN_RUN: MessageState.ACCEPTED,
    },
    MessageState.CONSUMED: {},
    MessageState.SETTLED: {},
    MessageState.REDELIVERED: {},
    MessageState.RECORDED: {},
}
UNFINISHED = frozenset({MessageState.ACCEPTED, MessageState.REJECTED})
"""States of messages that a recipient still needs."""


class SessionState(enum.IntEnum):
    """The state of one session of a node at its broker."""

    WAITING = 1
    """Its run has not started."""
    CONNECTED = 2
    """Admitted; its frames arrive."""
    SILENT = 3
    """Its lease has ended, but its connection is up: it is slow."""
    AWAITED = 4
    """Admitted; since then the broker restarted, or another key uses its connection."""
    FINISHING = 5
    """Its run has ended; it has not said goodbye."""
    LEFT = 6
    """It said goodbye, or it is gone; its messages wait for another session."""
    REPLACED = 7
    """A newer session of the node has taken over."""


class SessionEvent(enum.IntEnum):
    """What happens to a session."""

    HELLO = 1
    """Its Hello is answered with Welcome, or with RunEnded."""
    FRAME = 2
    """Another frame arrives."""
    LEASE_END = 3
    """Nothing has arrived for a lease, but its connection is up."""
    LEAVE = 4
    """Goodbye; or silence, and its connection is gone or it has been silent for ten leases."""
    REPLACE = 5
    """A newer session of the node is admitted."""
    RUN_END = 6
    """The aggregator ends the run."""
    RESTART = 7
    """The broker starts, and recovers the session from its ledger."""
    DISCONNECT = 8
    """A frame with another key comes over its connection."""


SESSION = {
    SessionState.WAITING: {
        SessionEvent.HELLO: SessionState.CONNECTED,
        SessionEvent.LEAVE: SessionState.LEFT,
        SessionEvent.REPLACE: SessionState.REPLACED,
    },
    SessionState.CONNECTED: {
        SessionEvent.HELLO: SessionState.CONNECTED,
        SessionEvent.FRAME: SessionState.CONNECTED,
        SessionEvent.LEASE_END: SessionState.SILENT,
        SessionEvent.LEAVE: SessionState.LEFT,
        SessionEvent.RUN_END: SessionState.FINISHING,
        SessionEvent.RESTART: SessionState.AWAITED,
        SessionEvent.DISCONNECT: SessionState.AWAITED,
    },
    SessionState.SILENT: {
        SessionEvent.HELLO: SessionState.CONNECTED,
        SessionEvent.FRAME: SessionState.CONNECTED,
        SessionEvent.LEASE_END: SessionState.SILENT,
        SessionEvent.LEAVE: SessionState.LEFT,
        SessionEvent.RUN_END: SessionState.FINISHING,
        SessionEvent.RESTART: SessionState.AWAITED,
        SessionEvent.DISCONNECT: SessionState.AWAITED,
    },
    SessionState.AWAITED: {
        SessionEvent.HELLO: SessionState.CONNECTED,
        SessionEvent.LEAVE: SessionState.LEFT,
        SessionEvent.RUN_END: SessionState.FINISHING,
        SessionEvent.RESTART: SessionState.AWAITED,
    },
    SessionState.FINISHING: {
        SessionEvent.HELLO: SessionState.FINISHING,
        SessionEvent.LEAVE: SessionState.LEFT,
        SessionEvent.RESTART: SessionState.LEFT,
        SessionEvent.DISCONNECT: SessionState.FINISHING,
    },
    SessionState.LEFT: {
        SessionEvent.HELLO: SessionState.CONNECTED,
        SessionEvent.REPLACE: SessionState.REPLACED,
        SessionEvent.RESTART: SessionState.LEFT,
    },
    SessionState.REPLACED: {},
}
PRESENT = frozenset(
    {
        SessionState.CONNECTED,
        SessionState.SILENT,
        SessionState.AWAITED,
        SessionState.FINISHING,
    }
)
"""States of sessions that have not left."""
WITHOUT_CONNECTION = frozenset({SessionState.AWAITED, SessionState.FINISHING})
"""Those in which a session may have no connection."""


class ImpossibleTransition(ValueError):
    """The table has no such transition; the message is one sentence."""


def word(member: enum.IntEnum) -> str:
    """Return the name of a state or an event as people write it."""
    return member.name.lower().replace("dead_", "dead-").replace("_", " ")


def next_state(state: SessionState, event: SessionEvent) -> SessionState:
    """Return the state of a session after an event.

    Raises:
        ImpossibleTransition: the event cannot happen in this state.
    """
    after = SESSION[state].get(event)
    if after is None:
        raise ImpossibleTransition(
            f"no {word(event)} can happen to a session that is {word(state)}"
        )
    return after


class MessageLives:
    """The state of each message of a ledger, by number; one byte for each entry."""

    def __init__(self) -> None:
        self._states = bytearray()

    def state_of(self, seq: int) -> MessageState:
        """Return the state of a message; NONE if the entry is not a message, or does not exist."""
        known = 0 <= seq < len(self._states)
        return MessageState(self._states[seq]) if known else MessageState.NONE

    def move(self, seq: int, event: MessageEvent) -> None:
        """Apply an event to a message.

        Raises:
            ImpossibleTransition: the event cannot happen in this state; nothing is changed.
        """
        before = self.state_of(seq)
        after = MESSAGE[before].get(event)
        if after is None:
            what = word(before) if before else "not an accepted message"
            raise ImpossibleTransition(f"cannot {word(event)} entry {seq}, which is {what}")
        if seq >= len(self._states):
            self._states.extend(bytes(seq + 1 - len(self._states)))
        self._states[seq] = after

    def count(self) -> Counter[MessageState]:
        """Return the number of messages in each state."""
        found = Counter(self._states)
        return Counter({state: found[state] for state in MessageState if state and found[state]})
