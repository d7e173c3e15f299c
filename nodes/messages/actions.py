"""The start of an aggregator's core, and the actions of the nodes' cores."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from fedmq.broker.link.events import Delivery, PostMessage
from fedmq.broker.rejections import Rejection
from fedmq.broker.wire.schema import Message
from fedmq.nodes.errors import exits_as_errors

ANSWERS = ("result", "failed", "score")
"""Kinds of messages that answer a task or an evaluation."""


class Start(Struct, frozen=True):
    """The broker has admitted the aggregator.

    checkpoint: newest checkpoint of an earlier session.
    run_record: the run's record with the state of version 0, in a replay from the beginning:
        another machine would draw other first weights.
    continued: number of the last message that extended the run's goal; an end of the run before
        it is not reported.
    """

    checkpoint: Delivery | None = None
    run_record: Delivery | None = None
    continued: int = -1


class Handled(Struct, frozen=True):
    """A message has been handled.

    refused: reason if it was rejected, else "". code: the reason's code, see `rejections.Code`.
    """

    seq: int
    refused: str = ""
    code: str = ""

    @classmethod
    def of(cls, seq: int, why: Rejection | None) -> Handled:
        """Return the action for a message that was rejected, if ``why`` is given, or handled."""
        return cls(seq) if why is None else cls(seq, why.reason, why.code)


class AckUpTo(Struct, frozen=True):
    """Acknowledge all messages up to and including the current one.

    but: numbers of the messages that a later session of this node still needs.
    """

    but: tuple[int, ...] = ()


class EndRun(Struct, frozen=True):
    """End the run.

    failed: whether it ends without reaching its goal. error: the error of a user's code that
    ended it, if any.
    """

    reason: str
    failed: bool = False
    error: Exception | None = None


class Commit:
    """Long work that runs beside the inbox from now on; a message is posted when it is done.

    The result takes effect at that message's tick in the inbox. A recovery or replay of the inbox
    can do the work at that point.

    Args:
        token: token of the tick.
        message: timer message to post when the work is done.
        work: pure function that returns the result.
    """

    def __init__(self, token: str, message: Message, work: Callable[[], Any]) -> None:
        self.token, self.message = token, message
        self._work: Callable[[], Any] | None = work
        self._lock = threading.Lock()
        self._result: Any = None
        self._error: Exception | None = None

    def result(self) -> Any:
        """Return the result; do the work now if it has not been done."""
        with self._lock:
            if self._work is not None:
                try:
                    with exits_as_errors():
                        self._result = self._work()
                except Exception as error:  # noqa: BLE001 - raised below, at every call
                    self._error = error
                self._work = None
        if self._error is not None:
            raise self._error
        return self._result


AggregatorAction = PostMessage | Handled | AckUpTo | EndRun | Commit
