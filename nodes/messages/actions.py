"""What a node's core takes from its inbox, and the actions that end at its link."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct

from fedmq.broker.errors import WireError
from fedmq.broker.rejections import Rejection
from fedmq.broker.wire.schema import Buffer, Message
from fedmq.nodes.errors import exits_as_errors

Read = Callable[[int], Buffer]
"""Returns the bytes of a message's i-th blob."""
Stream = Callable[[int], Iterator[Buffer]]
"""Returns them in pieces, in order."""


class Inbound(Struct, frozen=True):
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


class Start(Struct, frozen=True):
    """An aggregator has been admitted.

    checkpoint: the newest one of the session before it.
    run_record: of a replay that starts from the beginning, the run's record, which holds the
        state of version 0: another machine would draw other first weights.
    continued: number of the message by which the run goes further than it was to: an end before
        that one is not told.
    """

    checkpoint: Inbound | None = None
    run_record: Inbound | None = None
    continued: int = -1


class PostMessage(Struct, frozen=True):
    """Post a message; ``data[i]`` are the bytes of its i-th blob."""

    message: Message
    data: tuple[Buffer, ...] = ()
    consumes: tuple[int, ...] = ()
    """Numbers of the messages that are dealt with once this one is in the ledger."""


class Handled(Struct, frozen=True):
    """This message has been dealt with.

    refused: why it could not be used; code: the same for programs, see `rejections.Code`.
    """

    seq: int
    refused: str = ""
    code: str = ""

    @classmethod
    def of(cls, seq: int, why: Rejection | None) -> Handled:
        """Return the action for a message that was rejected, or else used or not needed."""
        return cls(seq) if why is None else cls(seq, why.reason, why.code)


class AckUpTo(Struct, frozen=True):
    """No session of this node will need the messages so far again, this one included.

    but: numbers of those that one will.
    """

    but: tuple[int, ...] = ()


class EndRun(Struct, frozen=True):
    """The run is over.

    failed: it has not reached its end. error: what a user's code raised, if that is why.
    """

    reason: str
    failed: bool = False
    error: Exception | None = None


class Commit:
    """Work that takes long: it is begun now, beside the inbox, and its end is posted.

    What it comes to counts from where that message's tick stands in the inbox; whoever folds
    the inbox again may do the work only there.

    Args:
        token: of the tick.
        message: the timer to be posted at the end.
        work: what is to be done, from nothing but its own values.
    """

    def __init__(self, token: str, message: Message, work: Callable[[], Any]) -> None:
        self.token, self.message = token, message
        self._work: Callable[[], Any] | None = work
        self._lock = threading.Lock()
        self._result: Any = None
        self._error: Exception | None = None

    def result(self) -> Any:
        """Return what the work comes to; done here if nobody has begun it."""
        with self._lock:
            if self._work is not None:
                try:
                    with exits_as_errors():
                        self._result = self._work()
                except Exception as error:  # noqa: BLE001 - raised below, to whoever asks
                    self._error = error
                self._work = None
        if self._error is not None:
            raise self._error
        return self._result


def fail_on_partial_reread(stream: Stream) -> Stream:
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


AggregatorAction = PostMessage | Handled | AckUpTo | EndRun | Commit
