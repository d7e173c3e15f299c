"""The base class of federated algorithms: a server half and a client half, both pure.

An algorithm is a frozen dataclass whose fields are its hyper-parameters. The aggregator
calls `start`, `task`, `new_accumulator`, `accumulate` and `commit`; a worker calls `train`; the
evaluator calls `evaluate`, or each client `evaluate_client`. An algorithm knows nothing of
messages, schedules, clocks or files.

A subclass sets `name` and `schedules`, and these class attributes where their defaults do not fit:

``task_per_client`` (default False)
    `task` depends on the client; otherwise the aggregator encodes a version's task once. Set by
    algorithms that send each client a model or knowledge of its own.
``commits_in_background`` (False)
    `commit` may take long, for example because it trains a network. The aggregator then runs it
    in a thread, and results that arrive meanwhile count towards the next version. Set by FedGKT
    and FAug.
``reproducible`` (False)
    The aggregator computes the same bits on every machine (`fedmq.algorithms.toolkit.arithmetic`),
    so a trace replays exactly anywhere. Otherwise it replays exactly on the kind of CPU that
    recorded it, and within a tolerance on others. A subclass inherits the promise and must keep it.
``fixed_reply`` (None)
    What clients send, ``update`` or ``model``, under every schedule; None: what the schedule asks
    for. Set by algorithms whose results are no models.
``counts_examples`` (False)
    n_k, the weight of a client's result, is the number of its training examples. A result that
    counts more than `Problem.most_examples` is then rejected. Not set where it counts repeated or
    generated examples, too. A subclass outside of fedmq does not inherit it, and sets it itself.
``bounds_updates`` (False)
    Results are updates of a model, or models, and `accumulate` rejects those that exceed
    `Result.bounds`. Set by algorithms that average models.
``server_hparams`` (empty)
    Fields that act only in `accumulate` and `commit`. A what-if replay may change them, because
    the recorded results stay valid.
``evaluated_by`` (``model``)
    ``model``: the evaluator evaluates a version on the problem's test data. ``clients``: each
    client evaluates it with its local state, on its own test data. Set by personalised algorithms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NewType, TypeAlias, TypeVar

from pydantic import ConfigDict
from torch import Tensor

from fedmq.algorithms.hyperparameters import check_hyperparameters, refuse_old_names
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.tasks import (
    UNBOUNDED,
    Bounds,
    Client,
    Payload,
    Reply,
    Result,
    Task,
    TrainResult,
    examples_of,
)
from fedmq.algorithms.toolkit.states import load_state, save_state

__all__ = [
    "UNBOUNDED",
    "Algorithm",
    "AnyAlgorithm",
    "Bounds",
    "Client",
    "OpaqueAccumulator",
    "OpaqueState",
    "Payload",
    "Reply",
    "Result",
    "Task",
    "TrainResult",
    "examples_of",
]

State = TypeVar("State")
Accumulator = TypeVar("Accumulator")

_RENAMED = {
    "gather": "new_accumulator",
    "absorb": "accumulate",
    "at_commit": "server_hparams",
    "trains": "commits_in_background",
    "sends": "fixed_reply",
    "personal": "task_per_client",
    "examined": "evaluation_task",
    "evaluated": "evaluated_by",
}


@dataclass(frozen=True)
class Algorithm(ABC, Generic[State, Accumulator]):
    """A federated algorithm. Subclasses are frozen dataclasses, one paper a file.

    State is the type of a version, Accumulator that of a running sum of results. States are never
    changed in place, because a version may still be in flight.

    An algorithm that draws random numbers at the aggregator has a field ``seed``, None by
    default; None is replaced by the run's seed. A subclass with a `__post_init__` calls that of its
    base class, which checks the fields.

    Raises:
        AlgorithmError: at construction, if a field does not fit its type; or, when a subclass is
            made, if it uses a name of version 0.1.
    """

    name: ClassVar[str]
    schedules: ClassVar[frozenset[str]]
    """Names of the schedules under which the algorithm makes sense."""
    task_per_client: ClassVar[bool] = False
    commits_in_background: ClassVar[bool] = False
    reproducible: ClassVar[bool] = False
    fixed_reply: ClassVar[Reply | None] = None
    counts_examples: ClassVar[bool] = False
    bounds_updates: ClassVar[bool] = False
    server_hparams: ClassVar[frozenset[str]] = frozenset()
    evaluated_by: ClassVar[Literal["model", "clients"]] = "model"

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "counts_examples" not in vars(cls) and not cls.__module__.startswith("fedmq."):
            cls.counts_examples = False  # a user's class may weight results in other ways
        refuse_old_names(cls, _RENAMED)

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    # ---- at the aggregator

    @abstractmethod
    def start(self, problem: Problem) -> State:
        """Return the state of version 0."""

    @abstractmethod
    def task(self, state: State, client: int) -> Payload:
        """Return the payload of this client's task."""

    def evaluation_task(self, state: State, client: int = 0) -> Payload:
        """Return the payload of an evaluation, for the evaluator or for this client."""
        return self.task(state, client)

    def result_bytes(self, state: State) -> int:
        """Return the largest size of an honest result's tensors, in bytes.

        A result that needs many times as much memory while it is decoded is rejected.
        """
        return sum(each.nbytes for each in self.tensors(state).values())

    @abstractmethod
    def new_accumulator(self, state: State) -> Accumulator:
        """Return an empty accumulator for the results of one version."""

    @abstractmethod
    def accumulate(
        self, accumulator: Accumulator, state: State, result: Result, weight: float
    ) -> Accumulator:
        """Add one result to the accumulator, in memory that does not grow with their number.

        Args:
            accumulator: from `new_accumulator` or the last `accumulate`; may be changed in place.
            state: of the current version.
            result: a client's result.
            weight: weight that the schedule gives it.

        Raises:
            ResultError: the result cannot be used; the accumulator is unchanged.
        """

    @abstractmethod
    def commit(self, state: State, accumulator: Accumulator, divisor: float) -> State:
        """Return the state of the next version; the weighted sum is divided by ``divisor``.

        With `commits_in_background` it runs in a thread: it must not touch what others use.
        """

    def save(self, state: State) -> Payload:
        """Return everything in a state, for a checkpoint; see `save_state`."""
        return save_state(state)

    def load(self, problem: Problem, saved: Payload) -> State:
        """Return the state that `save` was given; see `load_state`.

        Raises:
            ResultError: it is not a state of this algorithm and problem.
        """
        return load_state(self.start(problem), saved)

    @abstractmethod
    def tensors(self, state: State) -> Mapping[str, Tensor]:
        """Return the model in a state, for its digest and for saving."""

    # ---- at the client

    @abstractmethod
    def train(self, task: Task, client: Client) -> TrainResult:
        """Train on the client's data; return what it sends and what it keeps."""

    def evaluate_client(self, task: Task, client: Client) -> Mapping[str, float]:
        """Return this client's metrics, ``accuracy`` among them; its local state stays unchanged.

        For algorithms that are evaluated by ``clients``. ``task`` has the payload that
        `evaluation_task` returned; ``client.local`` is None if the client never trained.
        """
        raise NotImplementedError(f"{self.name} is not evaluated by clients")

    def try_model(self, problem: Problem, data: Examples, device: str) -> None:
        """Run one training step before the first task, to find unsuitable models; discard it.

        Args:
            problem: problem whose model is tried.
            data: a client's training examples.
            device: torch device to train on.

        Raises:
            ProblemError: the model changes its tensors in an unsupported way. Other errors are
                left to the task that meets them.
        """

    # ---- at the evaluator

    def evaluate(self, task: Task, problem: Problem, device: str) -> Mapping[str, float]:
        """Return the metrics of the task's model on the problem's test data."""
        raise NotImplementedError(f"{self.name} is not evaluated by an evaluator")

    # ---- for a client that never took part

    def personalise(self, state: State, version: int, client: Client) -> Mapping[str, float]:
        """Return the metrics of a new client that starts from this state, on its test data.

        By default those that `evaluate_client` returns for a client without a local state.
        """
        return self.evaluate_client(
            Task(version, self.evaluation_task(state, client.index)), client
        )


OpaqueState = NewType("OpaqueState", object)
OpaqueAccumulator = NewType("OpaqueAccumulator", object)
AnyAlgorithm: TypeAlias = Algorithm[OpaqueState, OpaqueAccumulator]
"""An algorithm for callers that only pass its states and accumulators back to it."""
