"""Carry out the actions of a worker's core, over a port to the live or another world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import msgspec
from structlog.typing import FilteringBoundLogger

from fedmq.algorithms.values import ReturnedError
from fedmq.broker.errors import BrokerError
from fedmq.broker.link.events import Delivery, PostMessage
from fedmq.broker.rejections import Code
from fedmq.broker.wire.schema import Buffer, Message
from fedmq.nodes.errors import NodeError, StorageError
from fedmq.nodes.messages.actions import Handled
from fedmq.nodes.process.logs import Repeats
from fedmq.nodes.run.setup import Setup
from fedmq.nodes.worker.client_state import SavedClientState
from fedmq.nodes.worker.core import (
    Action,
    Evaluate,
    Evaluated,
    Failed,
    Pause,
    SaveClientState,
    Saved,
    Train,
    Trained,
    Worker,
)
from fedmq.nodes.worker.training import RemoteError, check_ranges

_FULL_RETRY_S = 1.0


class Dropped(Exception):
    """Raised by `WorkerPort.compute`: the client drops out, so its task fails."""


class WorkerPort(Protocol):
    """What carries out the actions: a link and files; a simulation; or a record."""

    @property
    def log(self) -> FilteringBoundLogger:
        """Return the log of this node."""

    def now(self) -> float:
        """Return the time in seconds, to measure durations."""

    def post(self, message: Message, data: Sequence[Buffer], consumes: tuple[int, ...]) -> None:
        """Post a message, as `NodeLink.post` does."""

    def done(
        self,
        seqs: Sequence[int],
        refused: Mapping[int, str] | None = None,
        codes: Mapping[int, str] | None = None,
    ) -> None:
        """Acknowledge or reject messages, as `NodeLink.done` does."""

    def away(self) -> AbstractContextManager[None]:
        """Return a context for training and evaluation, in which the link keeps working."""

    def compute(self, action: Train | Evaluate, /) -> Trained | Evaluated:
        """Train or evaluate; return and raise what `fedmq.nodes.worker.training.compute` does.

        Raises:
            Dropped: the client of a simulation drops out.
        """

    def pause(self, seconds: float) -> None:
        """Wait, as `NodeLink.pause` does."""

    def save(self, client: int, state: SavedClientState) -> SavedClientState:
        """Save a client's state, as `ClientStateStore.put` does."""


class WorkerDriver:
    """Passes events to the core of a worker or evaluator, and carries out its actions.

    Args:
        core: the worker.
        setup: objects of the run.
        port: carries out single actions.
        repeats: counts equal failures for the log; drivers of one node can share it.

    Attributes:
        core: as given.
        error: because of which the last task failed; None if no error has failed a task.
    """

    def __init__(
        self, core: Worker, setup: Setup, port: WorkerPort, repeats: Repeats | None = None
    ) -> None:
        self.core, self._setup, self._port = core, setup, port
        self.error: Exception | None = None
        self._repeats = repeats or Repeats()

    def handle(self, delivery: Delivery) -> None:
        """Pass a message to the core, and carry out its actions, for a task until its result.

        Raises:
            LinkClosed: the link has ended.
            NodeError: a client's saved state is damaged.
            ReturnedError: the first evaluation of this session returned invalid metrics.
        """
        self.carry_out(self.core.handle(delivery))

    def carry_out(self, actions: Sequence[Action]) -> None:
        """Carry out the core's actions, each followed by those that result from it."""
        waiting = list(actions)
        while waiting:
            event: Trained | Evaluated | Failed | Saved | None = None
            match waiting.pop(0):
                case Train() | Evaluate() as action:
                    event = self._compute(action)
                case Pause(seconds):
                    self._port.pause(seconds)
                case SaveClientState(client, state):
                    event = self._saved(client, state)
                case PostMessage(message, data, consumes):
                    self._port.post(message, data, consumes)
                case Handled(seq, refused, code):
                    self._port.done([seq], {seq: refused} if refused else {}, {seq: code})
            if event is not None:
                waiting = [*self.core.handle(event), *waiting]

    def _compute(self, action: Train | Evaluate) -> Trained | Evaluated | Failed:
        """Train or evaluate; any error of a user's code fails only this task."""
        began = self._port.now()
        try:
            with self._port.away():
                event = self._port.compute(action)
                if isinstance(event, Evaluated):
                    check_ranges(event.metrics, self._setup.problem)
        except (BrokerError, NodeError):
            raise  # not an error of the task: the link has ended
        except Dropped:
            return Failed("dropped on demand", Code.DROPPED)
        except Exception as error:  # a model can raise anything
            invalid = isinstance(error, ReturnedError) and isinstance(action, Evaluate)
            if invalid and not self.core.evaluations:
                raise  # every other evaluation would fail, too
            return self._failed(error)
        if isinstance(event, Trained):
            return msgspec.structs.replace(event, elapsed_s=self._port.now() - began)
        return event

    def _failed(self, error: Exception) -> Failed:
        """Return the failure of a task; log the first of equal ones, and then a count."""
        self.error = error
        if isinstance(error, RemoteError):
            name, failed = error.name, Failed(error.reason, error.code, error.where)
        else:
            name, failed = type(error).__name__, Failed.of(error, self._setup)
        if times := self._repeats.count((name, failed.where), self._port.now()):
            about = {"reason": failed.reason, "where": failed.where, "times": times}
            self._port.log.error("task failed", **about, exc_info=error if times == 1 else None)
        return failed

    def _saved(self, client: int, state: SavedClientState) -> Saved | Failed:
        """Save a client's state; one that cannot be encoded fails only this task."""
        try:
            return Saved(self._save(client, state))
        except (BrokerError, NodeError):
            raise  # not an error of the task: the link has ended, or a saved state is damaged
        except Exception as error:  # noqa: BLE001 - a state can hold anything
            return self._failed(error)

    def _save(self, client: int, state: SavedClientState) -> SavedClientState:
        """Save a client's state; retry while it cannot be written, as on a full disk."""
        while True:
            try:
                return self._port.save(client, state)
            except StorageError as error:
                reason = str(error)
            self._port.log.error("cannot save local state", reason=reason)
            self._port.pause(_FULL_RETRY_S)
