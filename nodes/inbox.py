"""What a node's core takes from its inbox, and the actions that end at its link."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedmq.broker.errors import WireError
from fedmq.broker.wire import Buffer, Message

Read = Callable[[int], Buffer]
"""Returns the bytes of a message's i-th blob."""
Stream = Callable[[int], Iterator[Buffer]]
"""Returns them in pieces, in order."""


@dataclass(frozen=True)
class Inbound:
    """A message from the inbox: its number, its time, and how to read its blobs.

    Blobs are content-addressed, so reading one is a pure function of its name.
    """

    seq: int
    at: float
    message: Message
    read: Read
    stream: Stream | None = None

    def pieces(self, index: int) -> Iterator[Buffer]:
        """Return the bytes of the i-th blob in pieces, without holding all of them."""
        return self.stream(index) if self.stream is not None else iter((self.read(index),))


@dataclass(frozen=True)
class Post:
    """Post a message; ``data[i]`` are the bytes of its i-th blob."""

    message: Message
    data: tuple[Buffer, ...] = ()
    consumes: tuple[int, ...] = ()
    """Numbers of the messages that are dealt with once this one is in the ledger."""


@dataclass(frozen=True)
class Done:
    """This message has been dealt with; ``refused``: why it could not be used."""

    seq: int
    refused: str = ""


@dataclass(frozen=True)
class Settle:
    """No session of this node will need the messages so far again, this one included."""


@dataclass(frozen=True)
class Finish:
    """The run is over."""

    reason: str


def steady(stream: Stream) -> Stream:
    """Return a stream whose second reading cannot fail half-way and be taken for a refusal."""
    whole = set()

    def pieces(index: int) -> Iterator[Buffer]:
        try:
            yield from stream(index)
        except WireError as error:
            if index in whole:
                raise RuntimeError("a blob that was read cannot be read again") from error
            raise
        whole.add(index)

    return pieces
