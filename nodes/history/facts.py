"""Facts of one ledger entry, and the task that it sends or answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from msgspec import Struct

from fedmq.broker.ledger.entries import AnyEntry
from fedmq.broker.wire.schema import Message


@dataclass(slots=True)
class SentTask:
    """A task or an evaluation that the aggregator has sent.

    seq, at: number and time of its entry, in seconds since 1970.
    to: address of its client or of the evaluator.
    client: its client; None for the evaluator.
    host: the connected node that hosted the address when it was sent, or None.
    version: of the model that it contains; None if the message does not say.
    is_evaluation: whether it asks for metrics instead of a result.
    redelivered: code of its first delivery's rejection, if that was dead-lettered; else None.
    rejected: code of its rejection, or None; it needs no answer then.
    dead_lettered: whether the broker rejected it, and may deliver it again.
    """

    seq: int
    at: float
    to: str
    client: int | None
    host: str | None
    version: int | None
    is_evaluation: bool
    redelivered: str | None = None
    rejected: str | None = None
    dead_lettered: bool = False


class Facts(Struct, frozen=True, gc=False):
    """Facts of one entry when it was written.

    entry: the entry.
    message: the message that it accepts, if it does.
    host: the connected node that hosts the message's recipient, or None.
    task: the task or evaluation that the message is, or that it answers.
    """

    entry: AnyEntry
    message: Message | None = None
    host: str | None = None
    task: SentTask | None = None

    @property
    def is_answer(self) -> bool:
        """Return whether the message answers a task or an evaluation."""
        return self.task is not None and self.task.seq != self.entry.seq

    @property
    def client(self) -> int | None:
        """Return the client of the task or result, or that the message is addressed to."""
        if self.message is None:
            return None
        client = self.task.client if self.task is not None else client_of(self.message.to)
        if client is None and self.message.kind == "result":
            return natural(self.message.body.get("client"))
        return client

    @property
    def version(self) -> int | None:
        """Return the version that the message commits, contains, answers or evaluates."""
        if self.message is None:
            return None
        if self.message.kind == "version":
            return natural(self.message.body.get("version"))
        own = natural(self.message.body.get("model_version"))
        return own if own is not None or self.task is None else self.task.version


def client_of(address: str) -> int | None:
    """Return the client that an address names, or None."""
    kind, _, number = address.partition("/")
    return int(number) if kind == "client" and number.isascii() and number.isdecimal() else None


def natural(value: Any) -> int | None:
    """Return a value from a message's body if it is a natural number below 2^62, else None."""
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
    return value if whole else None
