"""What a node's core takes from its inbox, and the actions that end at its link."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedmq.broker.wire import Buffer, Message

Read = Callable[[int], Buffer]
"""Returns the bytes of a message's i-th blob."""


@dataclass(frozen=True)
class Inbound:
    """A message from the inbox: its number, its time, and how to read its blobs.

    Blobs are content-addressed, so reading one is a pure function of its name.
    """

    seq: int
    at: float
    message: Message
    read: Read


@dataclass(frozen=True)
class Post:
    """Post a message; ``data[i]`` are the bytes of its i-th blob."""

    message: Message
    data: tuple[Buffer, ...] = ()
    consumes: tuple[int, ...] = ()
    """Numbers of the messages that are dealt with once this one is in the ledger."""


@dataclass(frozen=True)
class Tick:
    """Ask for a tick."""

    token: str
    after_s: float


@dataclass(frozen=True)
class Done:
    """This message has been dealt with; ``refused``: why it could not be used."""

    seq: int
    refused: str = ""


@dataclass(frozen=True)
class Finish:
    """The run is over."""

    reason: str
