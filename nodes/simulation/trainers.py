"""Trainers of a simulated run: they compute the tasks that its clients start.

All trainers give the same bytes. Tasks that are in progress at the same virtual time can be
computed at the same time, by several processes; the simulation asks for each result when its task
ends in virtual time.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

import msgspec
import torch

from fedmq.algorithms.base import Payload
from fedmq.nodes.run.setup import Setup
from fedmq.nodes.simulation.training_jobs import Parcel, encode_job, read_answer
from fedmq.nodes.worker.core import Evaluate, Evaluated, Train, Trained
from fedmq.nodes.worker.training import compute

Action = Train | Evaluate
Event = Trained | Evaluated
Wait = Callable[[], Event]
"""Waits for the result of a started task and returns it; called at most once."""


class Trainer(Protocol):
    """Computes tasks."""

    def start(self, action: Action, due: float = 0.0) -> Wait:
        """Begin to train or evaluate.

        A task whose result is no longer needed is given up by deleting the returned function.

        Args:
            action: the task.
            due: virtual time at which the result is needed, in seconds. Tasks with an earlier one
                are computed first.

        Returns:
            A function that waits for the result. It raises what `compute` raises; for an error of
            a user's code in another process, a `RemoteError`; and a `RunFailed` if that process
            died.
        """

    def close(self) -> None:
        """Give up all tasks and end the processes."""


class InlineTrainer:
    """Computes a task in this process when its result is asked for.

    It sets the number of this process's torch threads, on which the bytes of results can depend.

    Args:
        setup: objects of the run.
        device: torch device.
    """

    def __init__(self, setup: Setup, device: str) -> None:
        torch.set_num_threads(setup.config.worker.threads)
        self._setup, self._device = setup, device

    def start(self, action: Action, due: float = 0.0) -> Wait:  # noqa: ARG002 - for other trainers
        """Return a function that computes the result; see `Trainer.start`."""
        return functools.partial(self._compute, action)

    def close(self) -> None:
        """Do nothing: there are no processes."""

    def _compute(self, action: Action) -> Event:
        # Tasks of one version may share tensors, and an algorithm may change them in place.
        task = dataclasses.replace(action.task, payload=_copy(action.task.payload))
        return compute(msgspec.structs.replace(action, task=task), self._setup, self._device)


def _copy(payload: Payload) -> Payload:
    groups = {
        name: {key: tensor.clone() for key, tensor in getattr(payload, name).items()}
        for name in ("weights", "exact", "features", "logits")
    }
    return dataclasses.replace(payload, **groups)


class _Entry:
    """A started task: it waits, is submitted, and its result is taken; or it is given up."""

    __slots__ = ("action", "future", "given_up")

    def __init__(self, action: Action) -> None:
        self.action: Action | None = action
        """Of a task that waits."""
        self.future: Future[Parcel] | None = None
        """Of a task that is submitted."""
        self.given_up = False

    def give_up(self) -> None:
        """Drop the task; called by the garbage collector, in any thread."""
        self.given_up, self.action = True, None


class QueuedTrainer(ABC):
    """A trainer whose processes compute the tasks in the order in which their results are needed.

    Only a few tasks are submitted before their results are asked for: tasks that start later may
    be due earlier, and a submitted task holds a copy of its model, or its result.

    Args:
        ahead: most tasks that are submitted without having been asked for.
    """

    def __init__(self, ahead: int) -> None:
        self._ahead, self._numbers = ahead, itertools.count()
        self._waiting: list[tuple[float, int, _Entry]] = []
        """Heap of the tasks that wait, and of some that do no longer."""
        self._submitted: list[_Entry] = []

    def start(self, action: Action, due: float = 0.0) -> Wait:
        """Enqueue a task; see `Trainer.start`.

        It is submitted when a result is asked for: until then, tasks that are due earlier may
        start at the same virtual time.
        """
        entry = _Entry(action)
        heapq.heappush(self._waiting, (due, next(self._numbers), entry))
        wait = functools.partial(self._wait, entry)
        weakref.finalize(wait, entry.give_up).atexit = False
        return wait

    @abstractmethod
    def close(self) -> None:
        """Give up all tasks and end the processes."""

    @abstractmethod
    def submit(self, job: Parcel, who: str) -> Future[Parcel]:
        """Give a job to the processes, which compute its answer with `run_job`.

        Args:
            job: from `encode_job`.
            who: for whom the task is, for an error.

        Returns:
            The answer to come. If a process dies, its exception is a `RunFailed`.
        """

    def _wait(self, entry: _Entry) -> Event:
        if entry.action is not None:
            self._submit(entry, entry.action)
        self._submit_more()
        if entry.future is None:
            raise RuntimeError("the result of this task was taken before")
        answer = entry.future.result()
        entry.future = None
        self._submitted.remove(entry)
        self._submit_more()
        return read_answer(answer)

    def _submit_more(self) -> None:
        """Submit the tasks that are due first, up to the limit."""
        if len(self._submitted) >= self._ahead:
            self._submitted = [each for each in self._submitted if not each.given_up]
        while self._waiting and len(self._submitted) < self._ahead:
            _, _, entry = heapq.heappop(self._waiting)
            if entry.action is not None:
                self._submit(entry, entry.action)

    def _submit(self, entry: _Entry, action: Action) -> None:
        who = "the evaluator" if action.client is None else f"client {action.client}"
        entry.future, entry.action = self.submit(encode_job(action), who), None
        self._submitted.append(entry)
