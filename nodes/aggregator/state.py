"""What an aggregator's core is made of, and how it is saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from msgspec import UNSET
from torch import Tensor

from fedmq.nodes.aggregator.checkpoint import Fold
from fedmq.nodes.aggregator.computed import Computed
from fedmq.nodes.aggregator.evaluations import Evaluations
from fedmq.nodes.aggregator.fleet import Members
from fedmq.nodes.aggregator.progress import Progress
from fedmq.nodes.aggregator.results import Intake
from fedmq.nodes.aggregator.tasks import Letters, Tasks
from fedmq.nodes.aggregator.version import Gathering, Waiting
from fedmq.nodes.messages.actions import Commit
from fedmq.nodes.run.goal import Goal
from fedmq.nodes.run.setup import Setup


class AggregatorState:
    """The state of one run at its aggregator.

    Args:
        setup: what is learned, how, and when.
        run: id of the run.
        node: this node's name.
        computed: how; by default as this release does.
    """

    def __init__(self, setup: Setup, run: str, node: str, computed: Computed | None = None) -> None:
        self._setup = setup
        self._computed = computed or Computed()
        self._settings = setup.config.run
        self._goal = Goal.of(self._settings)
        self._letters = Letters(run, node)
        self._post = self._letters.post
        self._algorithm, self._schedule = setup.algorithm, setup.schedule
        self.state = self._algorithm.start(setup.problem)
        self.version = 0
        self._members = Members()
        self._progress = Progress(setup, self._computed.rules)
        self._tasks = Tasks(setup, self._members, self._progress)
        self._intake = Intake(setup, self._tasks, self.state, self._progress)
        self._evaluations = Evaluations()
        self._committing: tuple[Gathering, Commit] | None = None
        self._waiting = Waiting()
        self._running = False
        self._finishing = ""
        self._failed = False
        self._error: Exception | None = None
        self._asked_final: int | None = None
        self._ended = False
        self._evaluated = -1
        self._position = self._continues_at = -1
        self._now = 0.0
        self._checkpoint_at = -math.inf

    @property
    def failed(self) -> bool:
        """Tell whether the run ends, or has ended, without reaching its end."""
        return self._failed

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the current model by name."""
        return self._algorithm.tensors(self.state)

    def parts(self) -> dict[str, Any]:
        """Return all parts of this core by name, to find a difference between two."""
        current = self._intake.current
        return {
            "position": self._position,
            "version": self.version,
            "state": self.state,
            "gathered": current.gathered,
            "weights": current.weights,
            "results": current.absorbed,
            "staleness": current.staleness,
            "held": sorted(current.held),
            "tasks": self._tasks.flights,
            "hosts": self._members.hosts,
            "evaluating": sorted(self._evaluations.asked),
            "examinations": self._evaluations.examinations,
            "scores": self._evaluations.scores,
            "committing": self._committing[1].token if self._committing else "",
            "waiting": list(self._waiting.numbers()),
            "counts": self._intake.counts,
            "finishing": self._finishing,
            "next_id": self._letters.next_id,
        }

    def missing_clients(self) -> list[int]:
        """Return the clients that the run cannot go on without, and that cannot be reached.

        Before the first task these are all that have not come. Later, all that are away, where
        nothing is going on that could bring a result.
        """
        hosts, clients = self._members.hosts, self._setup.problem.clients
        if self._ended or self._finishing or self._committing is not None:
            return []
        busy = any(each.client in hosts for each in self._tasks.flights.values())
        if self._running and (busy or self._progress.waiting(hosts)):
            return []
        return [client for client in range(clients) if client not in hosts]

    def _fold(self) -> Fold:
        """Return what a session that starts from here has to know besides the state."""
        return Fold(
            position=self._position,
            at=self._now,
            version=self.version,
            next_id=self._letters.next_id + 1,
            flights=self._tasks.flights,
            hosts=self._members.hosts,
            evaluators=sorted(self._members.evaluators),
            evaluating=sorted(self._evaluations.asked),
            evaluated=self._evaluated,
            examinations=self._evaluations.examinations,
            scores=self._evaluations.scores,
            waiting=list(self._waiting.untold),
            counts=self._intake.counts,
            running=self._running,
            finishing=self._finishing,
            ended=self._ended,
            arithmetic=self._computed.arithmetic,
            failures=self._progress.failures,
            failed=self._failed,
            goal=self._goal,
            expects_evaluator=self._members.expects_evaluator or UNSET,
            rules=self._progress.rules,
        )
