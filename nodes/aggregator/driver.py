"""Carry out the actions of an aggregator's core, over a port to the live or another world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from fedmq.broker.link.events import Delivery, PostMessage
from fedmq.broker.wire.schema import Buffer, Message
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.messages.actions import (
    AckUpTo,
    AggregatorAction,
    Commit,
    EndRun,
    Handled,
    Start,
)


class AggregatorPort(Protocol):
    """What carries out the actions: a link, files and threads; a simulation; or a record."""

    def post(self, message: Message, data: Sequence[Buffer], consumes: tuple[int, ...]) -> None:
        """Post a message, as `NodeLink.post` does."""

    def done(
        self,
        seqs: Sequence[int],
        refused: Mapping[int, str] | None = None,
        codes: Mapping[int, str] | None = None,
    ) -> None:
        """Acknowledge or reject messages, as `NodeLink.done` does."""

    def begin_commit(self, commit: Commit) -> None:
        """Start a commit beside the inbox; post its message when it is done."""

    def log_failure(self, reason: str, error: Exception | None) -> None:
        """Log that the run ends without reaching its goal."""

    def save_model(self, core: Aggregator) -> None:
        """Save the final model."""

    def over(self, reason: str) -> None:
        """End the run, as `NodeLink.over` does."""


class AggregatorDriver:
    """Passes events to the core of an aggregator, and carries out its actions.

    Args:
        core: the aggregator.
        port: carries out single actions.
    """

    def __init__(self, core: Aggregator, port: AggregatorPort) -> None:
        self.core, self._port = core, port
        self._unsettled: list[int] = []
        """Numbers of the messages that have been handled, but not acknowledged."""

    def handle(self, event: Start | Delivery) -> list[AggregatorAction]:
        """Pass an event to the core; return the actions for `carry_out`.

        Raises:
            BrokerError, NodeError: as `Aggregator.handle`.
        """
        if isinstance(event, Delivery):
            self._unsettled.append(event.seq)
        return self.core.handle(event)

    def carry_out(self, actions: Sequence[AggregatorAction]) -> None:
        """Carry out the core's actions, in order.

        Raises:
            LinkClosed: the link has ended.
            NodeError: the final model cannot be written.
        """
        for action in actions:
            match action:
                case PostMessage(message, data, consumes):
                    self._port.post(message, data, consumes)
                case Handled(seq, refused, code):
                    if refused:  # others are acknowledged with the next checkpoint
                        self._port.done([], {seq: refused}, {seq: code})
                case AckUpTo(but):
                    later = frozenset(but)
                    self._port.done([seq for seq in self._unsettled if seq not in later])
                    self._unsettled = [seq for seq in self._unsettled if seq in later]
                case Commit():
                    self._port.begin_commit(action)
                case EndRun(reason, failed, error):
                    if failed:
                        self._port.log_failure(reason, error)
                    if error is None:
                        # Before the run ends: a later session could not save it.
                        self._port.save_model(self.core)
                    self._port.over(reason)
