"""The base class of schedules: pure functions of a view of the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from fedmq.algorithms.hyperparameters import check_hyperparameters, refuse_old_names
from fedmq.algorithms.schedules import staleness as functions
from fedmq.algorithms.schedules.staleness import StalenessSpec
from fedmq.algorithms.tasks import Reply


@dataclass(frozen=True)
class ScheduleView:
    """What a schedule sees of a run; all fields are of the current version unless stated.

    clients: K, the number of clients of the run.
    in_flight: tasks in flight, of any version.
    started: tasks sent.
    outstanding: tasks sent that can still return a result.
    results: results that have arrived, late ones of earlier versions included.
    deadline_passed: whether the deadline (`Schedule.deadline`) has passed.
    late: results that were made from earlier versions.
    behind: tasks of earlier versions whose clients have been connected since the version began.
    idle: clients that can be drawn; set only for ordered schedules, and if nothing is outstanding.
    """

    clients: int
    in_flight: int
    started: int
    outstanding: int
    results: int
    deadline_passed: bool
    late: int = 0
    behind: int = 0
    idle: int = 0


@dataclass(frozen=True)
class Schedule(ABC):
    """A frozen dataclass whose fields are the schedule's settings; it keeps no state.

    Raises:
        AlgorithmError: at construction, if a field does not fit its type; or, when a subclass is
            made, if it uses a name of version 0.1.
    """

    name: ClassVar[str]
    reply: ClassVar[Reply] = "update"
    """What clients send under this schedule."""
    ordered: ClassVar[bool] = False
    """Whether results are added up in cohort order instead of the order of arrival."""
    folding: ClassVar[frozenset[str]] = frozenset()
    """Settings that only decide how much a result counts and when a version is committed. A
    what-if replay may change them, because the recorded results stay valid."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        refuse_old_names(cls, {"wants": "num_to_start", "closes": "is_ready"})

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def deadline(self) -> float | None:
        """Return the seconds from a version's start to its deadline; None if it has none."""
        return None

    def cohort(self, clients: int) -> int | None:
        """Return the number of results that a version waits for; None if it has no cohort."""
        return None

    def at_once(self, clients: int) -> int:
        """Return the largest number of tasks in flight."""
        return clients

    def least_clients(self) -> tuple[str, int] | None:
        """Return the setting for the smallest number of clients and its value, or None."""
        return None

    @abstractmethod
    def num_to_start(self, view: ScheduleView) -> int:
        """Return how many more tasks to send now; their clients are drawn from the idle ones."""

    @abstractmethod
    def weight(self, n: int, staleness: int) -> float | None:
        """Return the weight of a result; None if it is too stale to be used.

        Args:
            n: n_k, the number of examples it was trained on.
            staleness: versions committed since its task was made.
        """

    @abstractmethod
    def is_ready(self, view: ScheduleView) -> bool:
        """Return whether to commit the version now."""

    @abstractmethod
    def divisor(self, weights: float, results: int) -> float:
        """Return the divisor of the weighted sum, from the sum of weights and their number."""


@dataclass(frozen=True)
class Asynchronous(Schedule):
    """What FedBuff and FedAsync share: a fixed number of tasks is in flight at all times.

    concurrency: tasks in flight; each starts from the newest version.
    staleness: s(tau), the weight of a result that is tau versions late.
    max_staleness: largest tau of a result that is used; None uses all.
    """

    folding: ClassVar[frozenset[str]] = frozenset({"staleness", "max_staleness"})

    concurrency: Annotated[int, Field(ge=1)] = 8
    staleness: StalenessSpec = "constant"
    max_staleness: Annotated[int, Field(ge=0)] | None = None

    def at_once(self, clients: int) -> int:
        """Return the concurrency, or the number of clients if that is smaller."""
        return min(self.concurrency, clients)

    def num_to_start(self, view: ScheduleView) -> int:
        """Send a task for each one that has ended."""
        return max(0, self.concurrency - view.in_flight)

    def weight(self, n: int, staleness: int) -> float | None:
        """s(tau), independent of n_k."""
        if self.max_staleness is not None and staleness > self.max_staleness:
            return None
        return functions.staleness(self.staleness)(staleness)
