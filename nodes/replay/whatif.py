"""What if: aggregate the recorded results with other settings.

The clients trained from the models of the recorded run, so only settings that decide how a result
counts may change. The staleness of a result is counted in the versions of the new settings, since
its task was sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedmq.algorithms.allowed import NOTHING, Allowed
from fedmq.algorithms.base import OpaqueState, Task
from fedmq.broker.errors import LedgerError
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.link.events import Delivery, PostMessage
from fedmq.broker.rejections import Code
from fedmq.nodes.aggregator.version import Outcome, VersionBuffer, room_for
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.history.tracker import TaskTracker
from fedmq.nodes.messages.actions import Handled, Start
from fedmq.nodes.messages.metrics import received_metrics
from fedmq.nodes.replay.fold import Replay, ReplayStep, recorded_setup
from fedmq.nodes.run.config import Config, changed
from fedmq.nodes.run.devices import choose_device
from fedmq.nodes.run.setup import Setup

_STALE = frozenset({Code.STALE, Code.LATE})
"""Rejections that do not apply to the new settings."""
_REASONS = {
    "schedule": "other clients would have been given tasks",
    "algorithm": "the clients would have sent other results",
    "problem": "the clients would have had other data",
    "codec": "the results would have been encoded differently",
    "worker": "the results would have arrived at other times, or not at all",
    "broker": "it does not affect how a result counts",
    "run": "it does not affect how a result counts",
}


@dataclass(frozen=True)
class ComparedPoint:
    """Metrics of both models at an evaluation of the recorded run.

    at: seconds since the run's start.
    results: used so far, (recorded, other).
    versions: (recorded, other).
    recorded: metrics from the ledger; None if the evaluation has no score.
    other: metrics of the model with the new settings.
    """

    at: float
    results: tuple[int, int]
    versions: tuple[int, int]
    recorded: dict[str, float] | None
    other: dict[str, float]


def _scores(trace: Trace) -> dict[str, dict[str, float]]:
    """Return the metrics of each evaluation that has a score, by the evaluation's id."""
    found: dict[str, dict[str, float]] = {}
    tracker = TaskTracker()
    with contextlib.suppress(LedgerError):  # the replay raises it later
        for entry in trace.entries():
            facts = tracker.feed(entry)
            message = facts.message
            if message is not None and facts.is_answer and message.re is not None:
                metrics = message.body.get("metrics")
                if message.kind == "score" and isinstance(metrics, dict):
                    found.setdefault(message.re, received_metrics(metrics))
    return found


def changed_setup(trace: Trace, settings: Sequence[str], allowed: Allowed = NOTHING) -> Setup:
    """Return the setup of a run with other settings.

    Args:
        trace: of the run.
        settings: ``key=value``.
        allowed: the code that the run's configuration may name; a setting cannot name any.

    Raises:
        ConfigError: a setting is invalid, or affects more than how a result counts.
    """
    before = recorded_setup(trace, allowed=allowed)
    asked = changed(before.config, settings)
    for table in _REASONS:
        named = table in ("schedule", "algorithm")
        _check_table(table, before, asked, only=("name",) if named else ())
    if before.algorithm.evaluated_by != "model":
        raise ConfigError(
            f"--set: clients evaluate {before.algorithm.name} with their local states, which the "
            "record does not have for other settings"
        )
    setup = recorded_setup(trace, asked, allowed)  # raises for unknown keys and invalid values
    for table in ("schedule", "algorithm"):
        _check_table(table, before, setup.config)
    return setup


def _check_table(table: str, before: Setup, asked: Config, only: Sequence[str] = ()) -> None:
    """Raise ConfigError if a key differs that may not; ``only``: check these keys."""
    old, new = before.config.model_dump()[table], asked.model_dump()[table]
    can = {"schedule": before.schedule.folding, "algorithm": before.algorithm.server_hparams}
    for key in only or sorted({*old, *new}):
        if old.get(key) != new.get(key) and key not in can.get(table, ()):
            raise ConfigError(_refusal(f"{table}.{key}", _REASONS[table], before))


def _refusal(name: str, why: str, before: Setup) -> str:
    choices = [f"schedule.{key}" for key in sorted(before.schedule.folding)]
    choices += [f"algorithm.{key}" for key in sorted(before.algorithm.server_hparams)]
    return (
        f"--set {name}: cannot be computed from the recorded results: {why}; "
        f"choose from {', '.join(choices)}"
    )


class WhatIf:
    """Replays a recorded run, and aggregates its results with other settings beside it.

    Args:
        trace: of the run.
        setup: with the other settings, from `changed_setup`.
        allowed: the code that the run's configuration may name.
    """

    def __init__(self, trace: Trace, setup: Setup, allowed: Allowed = NOTHING) -> None:
        self._replay = Replay(trace, allowed=allowed)
        self._setup = setup
        self._algorithm, self._schedule = setup.algorithm, setup.schedule
        state = self._algorithm.start(setup.problem)
        self._max_bytes = room_for(self._algorithm, state)
        self._begin_version(state, 0)
        self._used = 0
        self._sent: dict[str, tuple[int, int]] = {}
        """Client of each task, and the new version at which it was sent, by the task's id."""
        self._deferred: dict[int, Delivery] = {}
        """Results that the recorded run has received but not handled."""

    def points(self) -> Iterator[ComparedPoint]:
        """Yield a point for each evaluation of the recorded run, in order.

        Raises:
            Diverged: the recorded run does not replay.
            LedgerError: the trace is damaged.
        """
        scores = _scores(self._replay.trace)
        began: float | None = None
        version = used = 0
        finishing = False
        device = choose_device(self._setup.config.worker.device)
        for step in self._replay.steps():
            event, core = step.event, self._replay.core
            if isinstance(event, Start):
                self._begin_version(core.state, 0)  # version 0 from the record
            if isinstance(event, Delivery):
                began = event.at if began is None else began
            if not finishing:  # results after the last version count in neither
                self._count(step, committed=core.version > version)
                used = core.counts.used
            version, finishing = core.version, bool(core.finishing)
            for action in step.actions:
                if isinstance(action, PostMessage) and action.message.kind == "task":
                    client = action.message.body["client"]
                    self._sent[action.message.id] = client, self._current.version
                elif isinstance(action, PostMessage) and action.message.kind == "evaluate":
                    current = self._current
                    task = Task(current.version, self._algorithm.evaluation_task(current.state))
                    metrics = self._algorithm.evaluate(task, self._setup.problem, device)
                    yield ComparedPoint(
                        event.at - began if isinstance(event, Delivery) and began else 0.0,
                        (used, self._used),
                        (version, current.version),
                        scores.get(action.message.id),
                        dict(metrics),
                    )

    def _count(self, step: ReplayStep, *, committed: bool) -> None:
        """Count the results that the recorded run handled in this step."""
        if isinstance(step.event, Delivery) and step.event.message.kind == "result":
            self._deferred[step.event.seq] = step.event
        for action in step.actions:
            if isinstance(action, Handled) and action.seq in self._deferred:
                event = self._deferred.pop(action.seq)
                if not action.refused or action.code in _STALE:
                    self._add(event)
        if self._schedule.ordered and committed and self._current.num_results:
            self._commit()  # both settings close a round together

    def _add(self, result: Delivery) -> None:
        current = self._current
        added = current.add(result, *self._sent[result.message.re or ""])
        if added.outcome is not Outcome.USED:
            return  # no settings make it usable, or it is stale under these
        self._used += 1
        if not self._schedule.ordered and current.is_ready(current.view()):
            self._commit()

    def _commit(self) -> None:
        self._begin_version(self._current.commit(), self._current.version + 1)

    def _begin_version(self, state: OpaqueState, version: int) -> None:
        self._current = VersionBuffer(
            self._setup,
            state,
            version,
            self._max_bytes,
            in_order=False,
            rules=self._replay.computed.rules,
        )
