"""What a schedule is: pure answers to four questions, from a view of the run."""

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
    """What a schedule may look at; all about the current version unless it says otherwise.

    clients: K, the number of clients of the run.
    flying: tasks out, of any version.
    started: tasks sent.
    outstanding: tasks sent that may still bring a result.
    results: results in hand, late ones of earlier versions included.
    deadline_passed: whether `Schedule.deadline_s` is over.
    late: how many of the results were made from earlier versions.
    behind: tasks of earlier versions that are with clients who have been here since the version
        began.
    idle: clients that can be drawn; looked up only for ordered schedules, and where nothing is
        outstanding.
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
            made, if it uses a name of version 0.2.
    """

    name: ClassVar[str]
    reply: ClassVar[Reply] = "update"
    """What clients send."""
    ordered: ClassVar[bool] = False
    """Whether results are added up in cohort order, whatever order they come in."""
    folding: ClassVar[frozenset[str]] = frozenset()
    """Settings that only decide what a result counts and when a version is committed: under
    others, the results of a recorded run still mean something."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        refuse_old_names(cls, {"wants": "num_to_start", "closes": "is_ready"})

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def deadline(self) -> float | None:
        """Return how long after a version's start `View.deadline_passed` turns true, in seconds."""
        return None

    def cohort(self, clients: int) -> int | None:
        """Return how many clients a version wants results from; None where that means nothing."""
        return None

    def at_once(self, clients: int) -> int:
        """Return how many tasks may be out at once."""
        return clients

    def least_clients(self) -> tuple[str, int] | None:
        """Return how many clients a version cannot do without, and the setting that says so."""
        return None

    @abstractmethod
    def num_to_start(self, view: ScheduleView) -> int:
        """Return how many more clients are to get a task now; idle ones are drawn."""

    @abstractmethod
    def weight(self, n: int, staleness: int) -> float | None:
        """Return how much a result counts; None if it is too stale to be used.

        Args:
            n: n_k, examples it was trained on.
            staleness: versions committed since its task was made.
        """

    @abstractmethod
    def is_ready(self, view: ScheduleView) -> bool:
        """Tell whether the version is to be committed now."""

    @abstractmethod
    def divisor(self, weights: float, results: int) -> float:
        """Return what the weighted sum is divided by: given the sum of weights and their number."""


@dataclass(frozen=True)
class Asynchronous(Schedule):
    """What FedBuff and FedAsync have in common: tasks are kept out, whoever comes back when.

    concurrency: tasks kept out at all times; each starts from the newest version.
    staleness: s(tau), the function of how many versions late a result is.
    max_staleness: a result later than this many versions is not used; None uses all.
    """

    folding: ClassVar[frozenset[str]] = frozenset({"staleness", "max_staleness"})

    concurrency: Annotated[int, Field(ge=1)] = 8
    staleness: StalenessSpec = "constant"
    max_staleness: Annotated[int, Field(ge=0)] | None = None

    def at_once(self, clients: int) -> int:
        """As many as are kept out."""
        return min(self.concurrency, clients)

    def num_to_start(self, view: ScheduleView) -> int:
        """Replace every task that has ended."""
        return max(0, self.concurrency - view.in_flight)

    def weight(self, n: int, staleness: int) -> float | None:
        """s(tau), whatever n_k."""
        if self.max_staleness is not None and staleness > self.max_staleness:
            return None
        return functions.staleness(self.staleness)(staleness)
